"""Importance matrices against what `llama-imatrix` made of the same models and text, kept as goldens."""

from __future__ import annotations

from pathlib import Path

import imatrix_sources as sources
import numpy as np
import packed_sources
import pytest
import torch

from ollama_forge.errors import TrainingError
from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.jobs.imatrix import ImatrixOptions, make_imatrix
from ollama_forge.train.importance import measure_importance
from ollama_forge.train.scored_model import ScoreOptions, scored_model

CLOSE = {"demo-f32": 2e-4, "experts": 2e-4, "demo-bf16": 2e-2}
"""Relative: float rounding; with 16-bit weights llama.cpp rounds what it multiplies and keeps, at places of its own."""


def parse_lines(lines: list[str]) -> dict[tuple[str, str], tuple[int, np.ndarray]]:
    """(tensor, row) -> count and numbers."""
    rows = {}
    for line in lines:
        if line.startswith(("#", "chunks ")):
            continue
        name, row, count, *numbers = line.split()
        rows[name, row] = int(count), np.array([float(number) for number in numbers])
    return rows


@pytest.mark.parametrize("name", sources.SOURCES)
def test_the_matrix_is_the_one_of_llama_imatrix(tmp_path: Path, name: str) -> None:
    model = sources.write_source(tmp_path / "model.gguf", name)
    made = make_imatrix(str(model), sources.TEXT, tmp_path / "i.gguf", ImatrixOptions(sources.CONTEXTS[name]))
    golden = (sources.GOLDENS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    ours = sources.describe(read_imatrix(tmp_path / "i.gguf"))
    assert ours[0] == next(line for line in golden if line.startswith("chunks "))
    expected, found = parse_lines(golden), parse_lines(ours)
    assert found.keys() == expected.keys()
    assert made.entries == len({tensor for tensor, _ in expected})
    for key, (count, numbers) in expected.items():
        assert found[key][0] == count, key
        np.testing.assert_allclose(found[key][1], numbers, rtol=CLOSE[name], err_msg=str(key))


def test_experts_without_a_token_are_counted_and_told(tmp_path: Path) -> None:
    model = sources.write_source(tmp_path / "model.gguf", "experts")
    text = tmp_path / "few.txt"
    text.write_text("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
    made = make_imatrix(str(model), text, tmp_path / "i.gguf", ImatrixOptions(32, 1))
    imatrix = read_imatrix(tmp_path / "i.gguf")
    entry = imatrix.entries["blk.0.ffn_down_exps.weight"]
    assert entry.sums.shape == (4, 48)
    assert entry.counts.sum() == 32 * 2
    assert dict(made.unseen).get("blk.0.ffn_down_exps.weight", 0) == int((entry.counts == 0).sum())
    assert (imatrix.weights("blk.0.ffn_down_exps.weight").reshape(4, 48)[entry.counts == 0] == 1).all()


def test_activations_that_are_not_finite_name_their_tensor(tmp_path: Path) -> None:
    model = packed_sources.dense_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(float("inf"))
    path = tmp_path / "broken.gguf"
    packed_sources.write_gguf_of(model, "llama", path, GGMLType.F32)
    with (
        open_gguf(path) as file,
        scored_model(file, options=ScoreOptions(is_exact=True)) as packed,
        pytest.raises(TrainingError, match=r"blk\.1\.ffn_down"),
    ):
        measure_importance(packed, [list(range(3, 40))], dataset="text")
