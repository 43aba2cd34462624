"""Cutting a model smaller, beside `cp` of what comes out; and the importance pass, beside a plain forward pass."""

from __future__ import annotations

import json
from pathlib import Path

from harness import Command, Job, Row, Workshop, removing, run_once, run_side_by_side, show_seconds

SCRIPT = str(Path(__file__).resolve().with_name("importance_pass.py"))
N_TOKENS = 512
N_ROWS = 4


def measure_prune(shop: Workshop) -> list[Row]:
    """A third of the layers goes; the rest is copied and renumbered."""
    folder = shop.make("llama", f"llama-{shop.large_layers}", shop.large_layers)
    whole = shop.folder / f"llama-{shop.large_layers}-bf16.gguf"
    if not whole.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(whole), "--outtype", "bf16")))
    n_dropped = max(1, shop.large_layers // 3)
    first = (shop.large_layers - n_dropped) // 2
    small, copy = shop.folder / "pruned.gguf", shop.folder / "pruned-copy.gguf"
    layers = f"{first}-{first + n_dropped - 1}"
    prune = shop.forge("downsize", "prune", str(whole), "--drop-layers", layers, "-o", str(small), "-q")
    run_once(Command("once", prune, clean=removing(small)))
    ours, floor = run_side_by_side(
        [
            Command("prune", prune, clean=removing(small)),
            Command("cp", ("sh", "-c", f"cp '{small}' '{copy}' && sync '{copy}'"), clean=removing(copy)),
        ],
        max(shop.repeats, 3),
    )
    size_bytes = small.stat().st_size
    removing(small, copy)()
    ratio = ours.seconds / floor.seconds
    return [
        Row(
            f"prune {n_dropped} of {shop.large_layers} layers (bf16)",
            f"{show_seconds(ours.seconds)}, {ours.peak_bytes / 1e6:.0f} MB",
            f"cp of the result: {show_seconds(floor.seconds)}",
            f"{ratio:.2f}x",
            "<= 1.3x",
            ratio <= 1.3,
            f"the result has {size_bytes / 1e6:.0f} MB; start-up and fsync are included on our side, fsync on "
            f"cp's; runs took {ours.spread} and {floor.spread}",
        )
    ]


def measure_importance_pass(shop: Workshop) -> list[Row]:
    """Layers alone, and everything that can be measured of a dense model."""
    folder = shop.make("llama", f"llama-{shop.large_layers}", shop.large_layers)
    path = shop.folder / f"llama-{shop.large_layers}-q4.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(path), "--quant", "Q4_K_M")))
    run = run_once(
        Command(
            "passes", shop.python(SCRIPT, *map(str, (path, N_ROWS, N_TOKENS, max(shop.repeats, 3), shop.n_threads)))
        )
    )
    seconds = json.loads(run.output.splitlines()[-1])
    rows = []
    for name, words in (("layers", "layers"), ("everything", "layers, channels, heads, hidden")):
        ratio = seconds[name] / seconds["plain"]
        rows.append(
            Row(
                f"importance pass: {words} ({N_ROWS} x {N_TOKENS} tokens)",
                show_seconds(seconds[name]),
                f"plain forward pass: {show_seconds(seconds['plain'])}",
                f"{ratio:.2f}x",
                "<= 1.2x",
                ratio <= 1.2,
            )
        )
    return rows


JOBS = (Job("prune", measure_prune), Job("importance", measure_importance_pass))
