"""Fine-tuning on the packed GGUF, beside transformers' `gguf_file=` (dequantized to float32) with peft."""

from __future__ import annotations

from pathlib import Path

from harness import Command, Job, Row, Workshop, run_once, show_seconds
from turns import Turns, ratio_of, take_turns

SCRIPT = str(Path(__file__).resolve().with_name("train_steps.py"))
N_STEPS = {128: 8, 512: 8}
ROOM_BYTES = 1_200_000_000


def measure_training(shop: Workshop) -> list[Row]:
    """Load time, step time and peak memory of LoRA (rank 16, all linear layers) at 128 and 512 tokens."""
    path = _quantized(shop, "llama", shop.large_layers)
    return [*_measure(shop, path, 128, 1.25, "128 tokens"), *_measure(shop, path, 512, 1.05, "512 tokens")]


def measure_wide_training(shop: Workshop) -> list[Row]:
    """The same with a vocabulary of 150,000 tokens, in a few layers: here the head and its logits are what costs."""
    path = _quantized(shop, "wide-llama", max(1, shop.large_layers // 5))
    return _measure(shop, path, 512, None, "512 tokens, vocabulary of 150,000")


def _quantized(shop: Workshop, what: str, n_layers: int) -> Path:
    folder = shop.make(what, f"{what}-{n_layers}", n_layers)
    path = shop.folder / f"{what}-{n_layers}-q4.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(path), "--quant", "Q4_K_M")))
    return path


def _measure(shop: Workshop, path: Path, n_tokens: int, limit: float | None, label: str) -> list[Row]:
    sides = [
        Command(kind, shop.python(SCRIPT, kind, str(path), str(n_tokens), str(shop.n_threads)))
        for kind in ("packed", "dense")
    ]
    ours, theirs = take_turns(sides, N_STEPS[n_tokens])
    return _rows(label, limit, path.stat().st_size, ours, theirs)


def _rows(label: str, limit: float | None, file_bytes: int, ours: Turns, theirs: Turns) -> list[Row]:
    load, dense_load = ours.load_seconds, theirs.load_seconds
    ratio, pairs = ratio_of(ours, theirs)
    most = file_bytes + ROOM_BYTES
    memory, dense_memory = f"{ours.peak_bytes / 1e6:.0f} MB", f"{theirs.peak_bytes / 1e6:.0f} MB"
    return [
        Row(
            f"load for training ({label})",
            show_seconds(load),
            f"transformers gguf_file=: {show_seconds(dense_load)}",
            f"{dense_load / load:.1f}x as fast",
            ">= 5x",
            dense_load / load >= 5,
            "loaded once each",
        ),
        Row(
            f"LoRA step, {label}",
            show_seconds(ours.seconds),
            f"dense float32 + peft: {show_seconds(theirs.seconds)}",
            f"{ratio:.2f}x its time",
            f"<= {limit}x" if limit else "",
            ratio <= limit if limit else None,
            pairs,
        ),
        Row(
            f"peak memory, {label}",
            memory,
            f"dense float32 + peft: {dense_memory}",
            f"{ours.peak_bytes / theirs.peak_bytes:.2f}x",
            f"<= file + 1.2 GB ({most / 1e6:.0f} MB)",
            ours.peak_bytes <= most,
            f"the file has {file_bytes / 1e6:.0f} MB",
        ),
    ]


JOBS = (Job("training", measure_training), Job("wide-training", measure_wide_training))
