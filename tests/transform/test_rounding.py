"""A change that is small beside the quantization's steps is not rounded away when the merged weights are stored."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ollama_forge.files import atomic_output
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, string, write_gguf
from ollama_forge.transform.apply import plan_gguf_edit
from ollama_forge.transform.edits import TensorEdit

NAME = "blk.0.ffn_up.weight"
LOW_BIT = (GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.IQ4_NL)


def merged(path: Path, stored: NDArray[np.float32], type: GGMLType, change: NDArray[np.float32], edit: TensorEdit):
    packed = quantize(stored, type)
    source = path / "source.gguf"
    with atomic_output(source) as sink:
        entry = TensorEntry(NAME, stored.shape, type, lambda: [packed])
        write_gguf(sink, [string("general.architecture", "llama")], [entry])
    with open_gguf(source) as file, atomic_output(path / "merged.gguf") as sink:
        plan = plan_gguf_edit(file, [edit])
        write_gguf(sink, plan.fields, plan.entries)
    with open_gguf(path / "merged.gguf") as file:
        return dequantize(packed, type, stored.shape), dequantize(file.read(NAME), type, stored.shape)


@pytest.mark.parametrize("type", LOW_BIT)
def test_what_the_adapter_does_is_kept_and_the_rest_is_rounded_about_as_well(type: GGMLType, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = random.standard_normal((64, 512), dtype=np.float32)
    left = random.standard_normal((64, 8), dtype=np.float32)
    right = random.standard_normal((8, 512), dtype=np.float32)
    change = np.float32(0.03) * left @ right
    steered = TensorEdit(NAME, lambda: lambda first, rows: rows + change[first : first + len(rows)], lambda: right)
    before, after = merged(tmp_path, weights, type, change, steered)
    plain = dequantize(quantize(before + change, type), type, weights.shape)
    inverse = np.linalg.pinv(right)
    wanted = change @ inverse
    kept, lost = (after - before) @ inverse - wanted, (plain - before) @ inverse - wanted
    assert np.linalg.norm(kept) < 0.25 * np.linalg.norm(lost)
    assert np.linalg.norm(after - before - change) < 2 * np.linalg.norm(plain - before - change)
