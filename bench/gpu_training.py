"""Fine-tuning on an NVIDIA card: the packed GGUF beside QLoRA (bitsandbytes NF4) and LoRA on bf16 weights.

    python bench/run.py --topic "Train on a card"

A random model of 8 billion parameters in Q4_K_M, rank 16 on all linear layers, checkpointed, one row of 1,024 tokens.
Without a card the topic is left out; without bitsandbytes its rows are.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from harness import Command, Job, Row, Workshop, run_once
from turns import Turns, ratio_of, take_turns

SCRIPT = str(Path(__file__).resolve().with_name("train_steps.py"))
N_LAYERS = 32
N_TOKENS = 1024
N_STEPS = 8
PEAK_LIMIT_BYTES = 7_000_000_000


def has_card() -> bool:
    """Whether torch finds an NVIDIA card."""
    if not shutil.which("nvidia-smi"):
        return False
    import torch

    return torch.cuda.is_available()


def measure_card(shop: Workshop) -> list[Row]:
    """Tokens a second, and the high-water mark of the card's memory."""
    if not has_card():
        return []
    folder = shop.make("llama-8b", f"llama-8b-{N_LAYERS}", N_LAYERS)
    path = shop.folder / f"llama-8b-{N_LAYERS}-q4.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(folder), "-o", str(path), "--quant", "Q4_K_M")))
    kinds = ["packed", "bf16"] + ["nf4"] * bool(importlib.util.find_spec("bitsandbytes"))
    sides = []
    for kind in kinds:
        source = path if kind == "packed" else folder
        arguments = (kind, str(source), str(N_TOKENS), str(shop.n_threads), "cuda")
        sides.append(Command(kind, shop.python(SCRIPT, *arguments)))
    ours, *others = take_turns(sides, N_STEPS, slice_seconds=None)  # a card works on while its program is stopped
    return [_row(kind, ours, theirs) for kind, theirs in zip(kinds[1:], others, strict=True)]


def _row(kind: str, ours: Turns, theirs: Turns) -> Row:
    name = {"nf4": "bitsandbytes NF4 QLoRA", "bf16": "bf16 LoRA"}[kind]
    ratio, pairs = ratio_of(theirs, ours)
    is_promised = kind == "nf4"
    return Row(
        f"LoRA step, 8 B, {N_TOKENS} tokens",
        _show(ours),
        f"{name}: {_show(theirs)}",
        f"{ratio:.2f}x its speed",
        f">= 1.0x, <= {PEAK_LIMIT_BYTES / 1e9:.0f} GB" if is_promised else "",
        ratio >= 1 and ours.card_bytes <= PEAK_LIMIT_BYTES if is_promised else None,
        pairs,
    )


def _show(turns: Turns) -> str:
    return f"{N_TOKENS / turns.seconds:.0f} tokens/s, {turns.card_bytes / 1e9:.2f} GB"


JOBS = (Job("card", measure_card),)
