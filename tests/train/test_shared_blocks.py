"""Layers that are shared out over processes compute what whole ones do, and each process keeps its part only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_sources import dense_model, write_gguf_of

from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.shared_blocks import sharing_blocks

WORKER = Path(__file__).with_name("shared_worker.py")


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("type_", ["Q4_K", "BF16"])
def test_two_processes_with_rows_of_other_lengths_compute_the_same_bits(
    family: str, type_: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(family), family, path, GGMLType[type_])
    argv = [(str(rank), str(tmp_path / "meeting"), str(path), str(tmp_path / f"{rank}.pt")) for rank in range(2)]
    workers = [
        subprocess.Popen([sys.executable, str(WORKER), *words], stderr=subprocess.PIPE, text=True) for words in argv
    ]
    try:
        said = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], said
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["kept"] <= found["whole"] / 2 + 64
        for kind in ("together", "again"):
            for one, other in zip(found["own"], found[kind], strict=True):
                assert one.keys() == other.keys()
                assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_models_nothing_is_shared() -> None:
    with sharing_blocks([], torch.device("cpu")) as shared:
        assert shared == []
