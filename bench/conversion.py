"""Convert and quantize: beside llama.cpp's converter and quantizer, against copying and against the kernels alone."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from harness import (
    Command,
    Job,
    Measurement,
    Row,
    Workshop,
    ratio_in_pairs,
    removing,
    run_in_slices,
    run_side_by_side,
    show,
    show_seconds,
)
from peer_converter import find_llama_cpp
from random_models import LlamaShape

BENCH_DIR = Path(__file__).resolve().parent
SMALL_LAYERS = 4
RSS_SLACK_BYTES = 300_000_000


def large_folder(shop: Workshop) -> tuple[Path, LlamaShape]:
    shape = LlamaShape(n_layers=shop.large_layers)
    return shop.make("llama", f"llama-{shape.n_layers}", shape.n_layers), shape


def ready_bf16(shop: Workshop) -> Path:
    """The large model as a bf16 GGUF, made once: the input of the quantizers and of landing."""
    folder, shape = large_folder(shop)
    made = shop.folder / f"llama-{shape.n_layers}-bf16.gguf"
    if not made.is_file():
        convert = ("convert", str(folder), "-o", str(made), "--outtype", "bf16", "--quiet")
        run_side_by_side([Command("input", shop.forge(*convert))], 1)
    return made


def find_llama_quantize() -> str | None:
    """`$LLAMA_QUANTIZE`, or `llama-quantize` on PATH."""
    return os.environ.get("LLAMA_QUANTIZE") or shutil.which("llama-quantize")


def _kernels_of(tool: str) -> Path | None:
    """The library with a llama-quantize's kernels, where it is built as one: with it both run the same code."""
    place = Path(shutil.which(tool) or tool).resolve().parent
    return next(
        (path for path in (place / "libggml-base.so", place.parent / "lib/libggml-base.so") if path.is_file()), None
    )


def measure_convert(shop: Workshop) -> list[Row]:
    """To bf16, beside convert_hf_to_gguf.py, on the large model; and our memory on a small one."""
    folder, shape = large_folder(shop)
    ours, theirs = shop.folder / "ours.gguf", shop.folder / "theirs.gguf"
    copied = shop.folder / "copied"
    commands = [
        _forge_convert(shop, folder, ours, "--outtype", "bf16"),
        Command("cp of the shards", ("sh", "-c", f'mkdir -p "{copied}" && cp "{folder}"/*.safetensors "{copied}"')),
        Command(
            "cp and fsync",
            ("sh", "-c", f'cp "{folder}"/*.safetensors "{copied}" && sync "{copied}"/*.safetensors'),
        ),
    ]
    if find_llama_cpp():
        peer = (str(BENCH_DIR / "peer_converter.py"), str(folder), "--outfile", str(theirs), "--outtype", "bf16")
        commands.append(Command("convert_hf_to_gguf.py", shop.python(*peer), clean=removing(theirs)))
    measured = run_side_by_side(commands, shop.repeats)
    ours_cost, copy_cost, sync_cost = measured[:3]
    shutil.rmtree(copied)
    removing(ours, theirs)()
    size = f"{shape.n_parameters / 1e9:.2f} B parameters, {shape.n_parameters * 2 / 1e9:.2f} GB"
    rows = []
    if len(measured) > 3:
        speed = measured[3].seconds / ours_cost.seconds
        note = f"processor time {ours_cost.cpu_seconds:.1f} s against {measured[3].cpu_seconds:.1f} s; "
        note += f"ours {ours_cost.spread}, theirs {measured[3].spread}; ours also hashes and fsyncs"
        rows.append(
            Row(
                f"folder to bf16 GGUF ({size})",
                show(ours_cost),
                show(measured[3]),
                f"{speed:.2f}x as fast",
                ">= 2x as fast",
                speed >= 2,
                note,
            )
        )
    copies = f"{show(copy_cost)}; with fsync {show_seconds(sync_cost.seconds)}"
    over = f"{ours_cost.seconds / sync_cost.seconds:.2f}x the time of cp and fsync"
    rows.append(Row(f"floor of the same ({size})", show(ours_cost), copies, over, "", None))
    return [*rows, _memory_row(shop, ours_cost, shape)]


def _memory_row(shop: Workshop, large_cost: Measurement, large: LlamaShape) -> Row:
    small = LlamaShape(n_layers=SMALL_LAYERS)
    folder = shop.make("llama", f"llama-{small.n_layers}", small.n_layers)
    out = shop.folder / "small.gguf"
    (small_cost,) = run_side_by_side([_forge_convert(shop, folder, out, "--outtype", "bf16")], shop.repeats)
    removing(out)()
    bound = 2 * large.largest_tensor_bytes + RSS_SLACK_BYTES
    return Row(
        "memory of the conversion at two sizes",
        f"{large.n_parameters / 1e9:.2f} B: {large_cost.peak_bytes / 1e6:.0f} MB",
        f"{small.n_parameters / 1e9:.2f} B: {small_cost.peak_bytes / 1e6:.0f} MB",
        f"{large_cost.peak_bytes / small_cost.peak_bytes:.2f}x for {large.n_parameters / small.n_parameters:.1f}x",
        f"both under 2x the largest tensor in float32 + 300 MB = {bound / 1e6:.0f} MB",
        max(large_cost.peak_bytes, small_cost.peak_bytes) <= bound,
        "files that are mapped count in the high-water mark while their pages are resident",
    )


def measure_one_pass(shop: Workshop) -> list[Row]:
    """Folder to Q4_K_M in one pass, beside llama-quantize alone on the ready-made bf16 file."""
    folder, shape = large_folder(shop)
    ready = ready_bf16(shop)
    names = ("ours.gguf", "theirs.gguf", "quantized.gguf", "same.gguf")
    ours, theirs, requantized, same = (shop.folder / name for name in names)
    quantize = shop.forge(
        *("quantize", str(ready), "-o", str(requantized), "--type", "Q4_K_M"),
        *("--threads", str(shop.n_threads), "--quiet"),
    )
    commands = [
        _forge_convert(shop, folder, ours, "--quant", "Q4_K_M"),
        Command("ollama-forge quantize", quantize, clean=removing(requantized)),
        Command("kernels alone", shop.python(str(BENCH_DIR / "kernels.py"), str(ready), str(shop.n_threads))),
    ]
    if tool := find_llama_quantize():
        peer = (tool, str(ready), str(theirs), "Q4_K_M", str(shop.n_threads))
        commands.append(Command("llama-quantize", peer, clean=removing(theirs)))
        if library := _kernels_of(tool):
            convert = _forge_convert(shop, folder, same, "--quant", "Q4_K_M")
            environment = {"OLLAMA_FORGE_GGML_LIBRARY": str(library)}
            commands.append(replace(convert, label="ollama-forge convert", environment=environment))
    measured = run_in_slices(commands, shop.repeats)
    removing(ours, theirs, requantized, same)()
    one_pass, from_gguf, kernels = measured[:3]
    beside = measured[3] if len(measured) > 3 else kernels
    bound = 2 * shape.largest_tensor_bytes + RSS_SLACK_BYTES
    size = f"{shape.n_parameters / 1e9:.2f} B parameters, {shop.n_threads} threads"
    target = "no slower than llama-quantize alone"
    same_kernels = f"the same with that llama-quantize's build of the kernels ({size})"
    rows = [
        _against(f"folder to Q4_K_M in one pass ({size})", one_pass, beside, target),
        *(_against(same_kernels, cost, beside, target) for cost in measured[4:]),
        _against(f"bf16 GGUF to Q4_K_M ({size})", from_gguf, beside, ""),
        Row(f"floor of the same ({size})", show(one_pass), show(kernels), _times(one_pass, kernels), "", None),
        Row(
            "memory of the one pass",
            f"{one_pass.peak_bytes / 1e6:.0f} MB",
            f"{beside.label}: {beside.peak_bytes / 1e6:.0f} MB",
            f"{one_pass.peak_bytes / beside.peak_bytes:.2f}x",
            f"under 2x the largest tensor in float32 + 300 MB = {bound / 1e6:.0f} MB",
            one_pass.peak_bytes <= bound,
        ),
    ]
    return rows


def _against(job: str, ours: Measurement, beside: Measurement, target: str) -> Row:
    note = f"processor time {ours.cpu_seconds:.1f} s against {beside.cpu_seconds:.1f} s; "
    note += f"ours {ours.spread}, {beside.label} {beside.spread}; the ratio is the median of the rounds' ratios"
    held = ratio_in_pairs(ours, beside) <= 1 if target else None
    return Row(job, show(ours), show(beside), _times(ours, beside), target, held, note)


def _times(ours: Measurement, beside: Measurement) -> str:
    return f"{ratio_in_pairs(ours, beside):.3f}x the time"


def _forge_convert(shop: Workshop, folder: Path, output: Path, *options: str) -> Command:
    argv = ("convert", str(folder), "-o", str(output), "--threads", str(shop.n_threads), "--quiet", *options)
    return Command("ollama-forge convert", shop.forge(*argv), clean=removing(output))


JOBS = (
    Job("convert", measure_convert),
    Job("one-pass", measure_one_pass),
)
