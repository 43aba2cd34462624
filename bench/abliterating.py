"""Taking a direction out of a GGUF, beside `cp` of the same file; and finding it, beside a loop over transformers."""

from __future__ import annotations

import json
from pathlib import Path

from harness import Command, Job, Measurement, Row, Workshop, removing, run_once, run_side_by_side, show, show_seconds

SCRIPT = str(Path(__file__).resolve().with_name("direction_states.py"))
APPLY_LIMIT = 2.5
LEAST_TIMED_BYTES = 1 << 30  # of a smaller file, start-up is most of the time
MEMORY_ROOM_BYTES = 300_000_000
SMALL_LAYERS = 4
N_PROMPTS = 16
N_TOKENS = 32


def measure_apply(shop: Workshop) -> list[Row]:
    """Wall time and memory of `abliterate apply` on 16-bit weights, of two sizes; on Q4_K_M the time alone."""
    rows = []
    for n_layers, quant, flags, repeats in (
        (shop.large_layers, "bf16", ("--outtype", "bf16"), shop.repeats),
        (SMALL_LAYERS, "bf16", ("--outtype", "bf16"), shop.repeats),
        (shop.large_layers, "Q4_K_M", ("--quant", "Q4_K_M"), 1),
    ):
        folder = shop.make("llama", f"llama-{n_layers}", n_layers)
        directions = shop.folder / f"direction-{n_layers}.safetensors"
        write_random_directions(folder, directions)
        source = shop.folder / f"llama-{n_layers}-ablated-{quant}.gguf"
        if not source.exists():
            run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(source), *flags)))
        out, copied = shop.folder / "ablated.gguf", shop.folder / "copied.gguf"
        words = ("abliterate", "apply", str(source), "--directions", str(directions), "-o", str(out))
        sides = [
            Command(
                "ollama-forge abliterate apply",
                shop.forge(*words, "--threads", str(shop.n_threads), "--json"),
                {"OMP_NUM_THREADS": str(shop.n_threads)},
                removing(out),
            ),
            Command("cp, sync", ("sh", "-c", f"cp '{source}' '{copied}' && sync '{copied}'"), {}, removing(copied)),
        ]
        ours, floor = run_side_by_side(sides, repeats)
        removing(out, copied)()
        rows.append(_apply_row(quant, source, _largest_bytes(folder), ours, floor))
    return rows


def _apply_row(quant: str, source: Path, largest_bytes: int, ours: Measurement, floor: Measurement) -> Row:
    ratio = ours.seconds / floor.seconds
    most = 2 * largest_bytes + MEMORY_ROOM_BYTES
    size_bytes = source.stat().st_size
    is_plain = quant == "bf16" and size_bytes > LEAST_TIMED_BYTES
    in_memory = ours.peak_bytes <= most
    return Row(
        f"take a direction out ({quant}, {size_bytes / 1e9:.2f} GB)",
        show(ours),
        show(floor),
        f"{ratio:.2f}x its time",
        f"<= {APPLY_LIMIT}x, <= {most / 1e6:.0f} MB" if is_plain else f"<= {most / 1e6:.0f} MB",
        (ratio <= APPLY_LIMIT or not is_plain) and in_memory,
        ours.spread,
    )


def measure_directions(shop: Workshop) -> list[Row]:
    """Load time, time for all prompts and peak memory of finding directions."""
    folder = shop.make("llama", f"llama-{shop.large_layers}", shop.large_layers)
    path = shop.folder / f"llama-{shop.large_layers}-q4.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(path), "--quant", "Q4_K_M")))
    numbers = (str(N_PROMPTS), str(N_TOKENS), str(shop.n_threads))
    sides = [Command(kind, shop.python(SCRIPT, kind, str(path), *numbers)) for kind in ("packed", "dense")]
    ours, theirs = run_side_by_side(sides, shop.repeats)
    (load, states), (dense_load, dense_states) = _reported(ours), _reported(theirs)
    return [
        Row(
            f"find a direction, {2 * N_PROMPTS} prompts of {N_TOKENS} tokens",
            f"load {show_seconds(load)}, states {show_seconds(states)}",
            f"transformers, float32, one by one: load {show_seconds(dense_load)}, states {show_seconds(dense_states)}",
            f"{(load + states) / (dense_load + dense_states):.2f}x its time",
            "<= 1x",
            load + states <= dense_load + dense_states,
        ),
        Row(
            "find a direction: peak memory",
            f"{ours.peak_bytes / 1e6:.0f} MB",
            f"transformers, float32: {theirs.peak_bytes / 1e6:.0f} MB",
            f"{ours.peak_bytes / theirs.peak_bytes:.2f}x",
            "<= 0.5x",
            ours.peak_bytes <= 0.5 * theirs.peak_bytes,
        ),
    ]


def _reported(measurement: Measurement) -> tuple[float, float]:
    """(load, states) in seconds: of the run with the median sum."""
    documents = [json.loads(run.output.splitlines()[-1]) for run in measurement.runs]
    chosen = sorted(documents, key=lambda document: document["load"] + document["states"])[len(documents) // 2]
    return float(chosen["load"]), float(chosen["states"])


def write_random_directions(folder: Path, path: Path) -> None:
    """A file of directions for a Llama folder; what it points at does not matter for time and memory."""
    import numpy as np

    from ollama_forge.transform.directions import Directions, write_directions

    config = json.loads((folder / "config.json").read_text("utf-8"))
    draw = np.random.default_rng(0).standard_normal((config["num_hidden_layers"], 1, config["hidden_size"]))
    draw /= np.linalg.norm(draw, axis=2, keepdims=True)
    write_directions(path, Directions(draw.astype(np.float32), 0), overwrite=True)


def _largest_bytes(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return 4 * int(config["hidden_size"]) * max(int(config["vocab_size"]), int(config["intermediate_size"]))


JOBS = (Job("ablation", measure_apply), Job("directions", measure_directions))
