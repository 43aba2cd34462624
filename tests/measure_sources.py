"""The demo's model in several quantizations and a text that it has learnt: what measurements are judged on.

In: a folder. Out: GGUF files and a text, the same bytes on every machine. The tests and
scripts/make_measure_goldens.py share it.
"""

from __future__ import annotations

from pathlib import Path

from learnt_model import MODEL_DIR, held_out_facts, held_out_tasks, held_out_unknowns

from ollama_forge.jobs.conversion import ConvertOptions, convert_folder, quantize_file, quantize_options

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
CONTEXT = 256
GOLDEN = Path(__file__).parent / "goldens" / "measure" / "demo.txt"


def write_base(folder: Path) -> Path:
    """The demo's model in float32."""
    path = folder / "base.gguf"
    if not path.exists():
        convert_folder(MODEL_DIR, path, ConvertOptions(outtype="f32"))
    return path


def write_quantized(folder: Path, type_name: str) -> Path:
    """The same, quantized."""
    path = folder / f"{type_name}.gguf"
    if not path.exists():
        quantize_file(write_base(folder), path, quantize_options(type_name, n_threads=1))
    return path


def golden_text() -> str:
    """Questions and answers of the demo's world, as one text."""
    examples = [*held_out_facts(), *held_out_unknowns(), *held_out_tasks()[::4]]
    return "\n".join(f"{example.question} {example.answer}" for example in examples) + "\n"
