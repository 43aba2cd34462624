"""Scoring a quantized model against a better one, beside `llama-perplexity --kl-divergence`, where that is present."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from harness import Command, Job, Measurement, Row, Workshop, removing, run_once, run_side_by_side

CONTEXT = 512
N_WINDOWS = 4


def find_llama_perplexity() -> str | None:
    """On PATH, or where LLAMA_PERPLEXITY says."""
    return os.environ.get("LLAMA_PERPLEXITY") or shutil.which("llama-perplexity")


def measure_scoring(shop: Workshop) -> list[Row]:
    """Tokens through both models in a second, and the high-water mark."""
    source = shop.make("llama", f"llama-{shop.large_layers}", shop.large_layers)
    better, smaller = (_converted(shop, source, quant) for quant in ("Q8_0", "Q4_K_M"))
    text = shop.folder / "measure.txt"
    text.write_text(_long_text(), "utf-8")
    ours = Command(
        "ollama-forge measure",
        shop.forge(
            *("measure", str(smaller), "--against", str(better), "--text", str(text)),
            *("--context", str(CONTEXT), "--json"),
        ),
        {"OMP_NUM_THREADS": str(shop.n_threads), "CUDA_VISIBLE_DEVICES": ""},
    )
    program = find_llama_perplexity()
    if program is None:
        (alone,) = run_side_by_side([ours], shop.repeats)
        return [_row(alone, "llama-perplexity is absent", "", None)]
    measured, first, second = run_side_by_side([ours, *_peer(program, shop, better, smaller, text)], shop.repeats)
    seconds = first.seconds + second.seconds
    peak = max(first.peak_bytes, second.peak_bytes)
    n_tokens = _tokens(measured)
    beside = f"llama-perplexity, both passes: {n_tokens / seconds:.0f} tokens/s, {peak / 1e6:.0f} MB"
    return [_row(measured, beside, f"{seconds / measured.seconds:.2f}x its speed", None)]


def _peer(program: str, shop: Workshop, better: Path, smaller: Path, text: Path) -> list[Command]:
    """Two passes: the better model's probabilities are written to a file, then read beside the smaller model's."""
    kept = str(shop.folder / "measure.kld")
    flags = ["-c", str(CONTEXT), "-t", str(shop.n_threads), "-f", str(text), "--kl-divergence-base", kept]
    return [
        Command("llama-perplexity, base", (program, "-m", str(better), *flags), {}, removing(Path(kept))),
        Command("llama-perplexity --kl-divergence", (program, "-m", str(smaller), *flags, "--kl-divergence")),
    ]


def _converted(shop: Workshop, source: Path, quant: str) -> Path:
    path = shop.folder / f"llama-{shop.large_layers}-{quant}.gguf"
    if not path.exists():
        run_once(Command("make it", shop.forge("convert", str(source), "-o", str(path), "--quant", quant)))
    return path


def _long_text() -> str:
    """About `N_WINDOWS` windows: the random model's tokenizer makes three tokens of a word."""
    words = ("river", "lamp", "seven", "green", "to carry", "bread", "against", "window", "of the", "slowly")
    n_words = CONTEXT * N_WINDOWS // 3
    return " ".join(words[(number * 7 + number // 10) % len(words)] for number in range(n_words)) + "\n"


def _tokens(measurement: Measurement) -> int:
    document = json.loads(measurement.runs[0].output[measurement.runs[0].output.index("{") :])
    return int(document["windows"]) * CONTEXT


def _row(ours: Measurement, beside: str, ratio: str, held: bool | None) -> Row:
    n_tokens = _tokens(ours)
    cell = f"{n_tokens / ours.seconds:.0f} tokens/s through both, {ours.peak_bytes / 1e6:.0f} MB"
    note = f"{n_tokens} tokens in windows of {CONTEXT}; start and loading included"
    return Row("`measure` Q4_K_M against Q8_0", cell, beside, ratio, "", held, note)


JOBS = (Job("measure", measure_scoring),)
