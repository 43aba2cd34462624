"""llama.cpp's own logits: those of its server and of transformers, in any number of batches, and errors in words."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_gguf import write_tiny_gguf, write_tiny_lora

from ollama_forge.engine import Sampling, open_engine
from ollama_forge.engine_logits import LogitsEngine, has_logits_engine, open_logits_engine
from ollama_forge.errors import EngineError

IDS = (1, 5, 9, 200, 17, 42, 3, 88)


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def all_logits(engine: LogitsEngine, ids: tuple[int, ...] = IDS) -> NDArray[np.float32]:
    return np.concatenate(list(engine.logits(ids, [True] * len(ids))))


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_library_that_is_installed_can_do_it() -> None:
    assert has_logits_engine()


def test_they_are_what_the_server_answers_with(model_path: Path) -> None:
    with open_logits_engine(model_path, context_length=len(IDS)) as engine:
        ours = log_probs(all_logits(engine))
    one = Sampling(max_tokens=1, temperature=0.0)
    with open_engine(model_path, n_threads=1) as server:
        for n in (1, 4, len(IDS)):
            said = server.generate(IDS[:n], one, n_logprobs=5).logprobs[0]
            for token_id, logprob in said.top.items():
                assert ours[n - 1, token_id] == pytest.approx(logprob, abs=1e-3)


def test_only_the_places_that_are_asked_about_come_in_order(model_path: Path) -> None:
    with open_logits_engine(model_path, context_length=len(IDS)) as engine:
        whole = all_logits(engine)
        wanted = [index in (2, 5, 6) for index in range(len(IDS))]
        assert np.array_equal(np.concatenate(list(engine.logits(IDS, wanted))), whole[[2, 5, 6]])
        assert list(engine.logits(IDS, [False] * len(IDS))) == []
        assert np.array_equal(all_logits(engine), whole)


def test_a_row_longer_than_a_batch_is_one_row(model_path: Path) -> None:
    """The first tokens of a long row are what they are alone (keys and values have 16 bits, and are read in other
    portions), and what stands behind depends on them."""
    ids = tuple(3 + 7 * index % 250 for index in range(1100))
    with open_logits_engine(model_path, context_length=len(ids)) as engine:
        whole = all_logits(engine, ids)
        assert whole.shape == (len(ids), engine.n_vocab)
        assert np.allclose(whole[:40], all_logits(engine, ids[:40]), atol=0.05)
        assert not np.allclose(whole[-1], all_logits(engine, ids[1024:])[-1], atol=0.5)


def test_adapters_count_by_their_scale(model_path: Path, tmp_path: Path) -> None:
    adapter = write_tiny_lora(tmp_path / "lora.gguf")

    def run(*adapters: tuple[Path, float]) -> NDArray[np.float32]:
        with open_logits_engine(model_path, adapters=adapters, context_length=len(IDS)) as engine:
            return all_logits(engine)

    plain = run()
    assert np.array_equal(run((adapter, 0.0)), plain)
    assert not np.allclose(run((adapter, 1.0)), plain, atol=1e-3)
    assert np.allclose(run((adapter, 0.5), (adapter, 0.5)), run((adapter, 1.0)), atol=1e-4)


def test_an_adapter_that_does_not_fit_is_an_error(model_path: Path, tmp_path: Path) -> None:
    content = write_tiny_lora(tmp_path / "fits.gguf").read_bytes()
    other = tmp_path / "other.gguf"
    other.write_bytes(content.replace(b"blk.0.attn_q", b"blk.9.attn_q"))
    with pytest.raises(EngineError, match="could not load") as caught:
        open_logits_engine(model_path, adapters=[(other, 1.0)], context_length=8)
    assert "blk.9.attn_q" in caught.value.why


def test_a_file_that_does_not_load_is_an_error_with_llama_cpps_words(tmp_path: Path) -> None:
    path = tmp_path / "half.gguf"
    path.write_bytes(write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()[:100_000])
    with pytest.raises(EngineError, match="could not load") as caught:
        open_logits_engine(path, context_length=8)
    assert "is not within the file bounds" in caught.value.why


@pytest.mark.parametrize("ids", [(1, 10**6), tuple(3 + index % 200 for index in range(600))])
def test_what_llama_cpp_refuses_is_an_error_and_the_engine_goes_on(model_path: Path, ids: tuple[int, ...]) -> None:
    with open_logits_engine(model_path, context_length=len(IDS)) as engine:
        before = all_logits(engine)
        with pytest.raises(EngineError) as caught:
            all_logits(engine, ids)
        assert caught.value.next
        assert np.array_equal(all_logits(engine), before)


def test_a_child_that_is_killed_is_an_error_at_once(model_path: Path) -> None:
    with open_logits_engine(model_path, context_length=len(IDS)) as engine:
        os.kill(engine._process.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="SIGKILL"):
            all_logits(engine)


def test_every_row_is_a_distribution(model_path: Path) -> None:
    with open_logits_engine(model_path, context_length=len(IDS)) as engine:
        sums = np.exp(log_probs(all_logits(engine))).sum(-1)
    assert all(math.isclose(total, 1.0, rel_tol=1e-9) for total in sums)
