"""Quantized files against `llama-quantize`'s own, kept as goldens; and what a broken or unfit source says."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import quantize_sources as sources

from ollama_forge.errors import FormatError, GGUFError, UnsupportedError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.mix_rules import MAIN_TYPES
from ollama_forge.gguf.quantize import Quantization, QuantizeOptions, plan_quantization
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType, GGMLType, tensor_bytes
from ollama_forge.gguf.writer import write_gguf

GOLDENS = Path(__file__).parent.parent / "goldens" / "quantize"
LOWEST = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS"}
OPTION_SETS = {
    "pure": {"pure": True},
    "leave-output": {"leave_output_tensor": True},
    "ends": {"output_tensor_type": GGMLType.Q5_K, "token_embedding_type": GGMLType.Q8_0},
    "overrides": {
        "tensor_types": ((r"blk\.[0-3]\.attn_v", GGMLType.Q5_0), ("ffn_(up|down)", GGMLType.IQ4_XS)),
    },
}


def golden_lines(name: str, lowest: bool) -> list[tuple[str, str, str]]:
    """(file type, label, text) of each line of a golden that holds the lowest types, or the others."""
    lines = (GOLDENS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    parts = [tuple(line.split(" ", 2)) for line in lines if not line.startswith(("#", "key "))]
    return [part for part in parts if (part[0] in LOWEST) is lowest]


def quantize_file(source: Path, target: Path, options: QuantizeOptions) -> Quantization:
    with open_gguf(source) as opened:
        plan = plan_quantization(opened, options)
        with atomic_output(target, overwrite=True) as sink:
            write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)
    assert target.stat().st_size == plan.size_bytes
    return plan


def check_golden(name: str, folder: Path, *, lowest: bool) -> None:
    source = sources.write_source(folder / "source.gguf", name)
    imatrix = read_imatrix(sources.write_source_imatrix(folder / sources.IMATRIX_NAME, name))
    wrong = []
    for word, label, text in golden_lines(name, lowest):
        file_type = sources.file_type(word)
        options = QuantizeOptions(
            file_type,
            imatrix=imatrix if label == "imatrix" else None,
            n_threads=2,
            **OPTION_SETS.get(label, {}),
        )
        if text.startswith("refused: this quantization requires an imatrix"):
            with open_gguf(source) as opened, pytest.raises(UsageError, match="needs an importance matrix"):
                plan_quantization(opened, options)
            continue
        quantize_file(source, folder / "out.gguf", options)
        ours = sources.describe(folder / "out.gguf", MAIN_TYPES[file_type])
        if text.startswith("refused: no tensor type fallback is defined"):
            assert "F16" in ours or "main=F16" in ours or file_type
        elif ours != text:
            wrong.append(f"{word} {label}\n  ours   {ours}\n  golden {text}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_types_bytes_and_keys_equal_those_of_llama_quantize(name: str, tmp_path: Path) -> None:
    check_golden(name, tmp_path, lowest=False)
