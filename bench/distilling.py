"""A distillation step on two packed GGUFs, beside TRL's own loss over transformers' dequantized float32 copies."""

from __future__ import annotations

from pathlib import Path

from harness import Command, Job, Row, Workshop, run_once, show_seconds
from turns import ratio_of, take_turns

SCRIPT = str(Path(__file__).resolve().with_name("distill_steps.py"))
N_STEPS = 4
N_TOKENS = 256


def measure_distilling(shop: Workshop) -> list[Row]:
    """Step time and peak memory: a Q4_K_M teacher, and a student of half its layers that learns through LoRA."""
    teacher = make_gguf(shop, shop.large_layers)
    student = make_gguf(shop, max(1, shop.large_layers // 2))
    numbers = (str(N_TOKENS), str(shop.n_threads))
    sides = [
        Command(kind, shop.python(SCRIPT, kind, str(teacher), str(student), *numbers)) for kind in ("packed", "trl")
    ]
    ours, theirs = take_turns(sides, N_STEPS)
    ratio, pairs = ratio_of(ours, theirs)
    files = teacher.stat().st_size + student.stat().st_size
    return [
        Row(
            f"distillation step, {N_TOKENS} tokens",
            show_seconds(ours.seconds),
            f"TRL's loss on dense float32 + peft: {show_seconds(theirs.seconds)}",
            f"{ratio:.2f}x its time",
            "",
            None,
            pairs,
        ),
        Row(
            f"its peak memory, {N_TOKENS} tokens",
            f"{ours.peak_bytes / 1e6:.0f} MB",
            f"TRL's loss on dense float32 + peft: {theirs.peak_bytes / 1e6:.0f} MB",
            f"{ours.peak_bytes / theirs.peak_bytes:.2f}x",
            "< 1x",
            ours.peak_bytes < theirs.peak_bytes,
            f"the two files have {files / 1e6:.0f} MB",
        ),
    ]


def make_gguf(shop: Workshop, n_layers: int) -> Path:
    """A random Llama of so many layers, in Q4_K_M."""
    folder = shop.make("llama", f"llama-{n_layers}", n_layers)
    path = shop.folder / f"llama-{n_layers}-q4.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(path), "--quant", "Q4_K_M")))
    return path


JOBS = (Job("distilling", measure_distilling),)
