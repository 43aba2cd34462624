"""A distillation step on two packed GGUFs, beside TRL's own loss over transformers' dequantized float32 copies."""

from __future__ import annotations

import json
from pathlib import Path

from harness import Command, Job, Measurement, Row, Workshop, run_once, run_side_by_side, show_seconds

SCRIPT = str(Path(__file__).resolve().with_name("distill_steps.py"))
N_STEPS = 2
N_TOKENS = 256


def measure_distilling(shop: Workshop) -> list[Row]:
    """Step time and peak memory: a Q4_K_M teacher, and a student of half its layers that learns through LoRA."""
    teacher = make_gguf(shop, shop.large_layers)
    student = make_gguf(shop, max(1, shop.large_layers // 2))
    numbers = (str(N_TOKENS), str(N_STEPS), str(shop.n_threads))
    sides = [
        Command(kind, shop.python(SCRIPT, kind, str(teacher), str(student), *numbers)) for kind in ("packed", "trl")
    ]
    ours, theirs = run_side_by_side(sides, shop.repeats)
    step, their_step = _step(ours), _step(theirs)
    files = teacher.stat().st_size + student.stat().st_size
    return [
        Row(
            f"distillation step, {N_TOKENS} tokens",
            show_seconds(step),
            f"TRL's loss on dense float32 + peft: {show_seconds(their_step)}",
            f"{step / their_step:.2f}x its time",
            "",
            None,
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


def _step(measurement: Measurement) -> float:
    """Seconds of the median run's step."""
    steps = sorted(float(json.loads(run.output.splitlines()[-1])["step"]) for run in measurement.runs)
    return steps[len(steps) // 2]


JOBS = (Job("distilling", measure_distilling),)
