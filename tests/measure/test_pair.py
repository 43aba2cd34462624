"""Numbers made of logits: those of a plain float64 reference, of analytic values, and of llama.cpp's own models."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_gguf import write_tiny_gguf, write_tiny_lora

from ollama_forge.dataset.windows import Window, make_window
from ollama_forge.engine_logits import open_logits_engine
from ollama_forge.errors import TrainingError
from ollama_forge.measure.answer_shift import compare_answers, first_places
from ollama_forge.measure.logits import Logits, likeliest, log_probs, token_scores
from ollama_forge.measure.pair import EnginePair

N_VOCAB = 50
LABELS = [3, 49, 0, 7]


def some_logits(seed: int, rows: int = 4) -> Logits:
    return np.random.default_rng(seed).normal(0, 4, (rows, N_VOCAB)).astype(np.float32)


def test_numbers_are_those_of_float64() -> None:
    this, against = some_logits(1), some_logits(2)
    q, p = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (this, against))
    scores = token_scores(this, against, LABELS)
    rows = torch.arange(len(LABELS))
    assert np.allclose(scores.kl, (p.exp() * (p - q)).sum(-1).numpy(), rtol=1e-12)
    assert np.allclose(scores.this, q[rows, LABELS].numpy(), rtol=1e-12)
    assert np.allclose(scores.against, p[rows, LABELS].numpy(), rtol=1e-12)
    assert scores.is_same_top.tolist() == (q.argmax(-1) == p.argmax(-1)).tolist()
    assert np.array_equal(log_probs(this, LABELS), scores.this)


def test_equal_logits_lie_nowhere_apart() -> None:
    assert token_scores(some_logits(1), some_logits(1), LABELS).kl.tolist() == [0.0] * len(LABELS)


def test_a_known_shift_has_its_analytic_value() -> None:
    """Raising one token's logit by d makes KL = ln(1 + p (e^d - 1)) - p d, where p was its probability."""
    against = some_logits(3, rows=1)
    this = against.copy()
    this[0, 5] += np.float32(0.5)
    shift = float(this[0, 5]) - float(against[0, 5])
    p = math.exp(log_probs(against, [5])[0])
    expected = math.log1p(p * math.expm1(shift)) - p * shift
    assert token_scores(this, against, [0]).kl[0] == pytest.approx(expected, rel=1e-9)


def test_an_impossible_token_adds_nothing() -> None:
    this, against = some_logits(1), some_logits(2)
    against[:, 9] = -np.inf
    plain = token_scores(np.delete(this, 9, 1), np.delete(against, 9, 1), [3, 48, 0, 7])
    ours = token_scores(this, against, LABELS)
    lost = -np.log1p(-np.exp(torch.from_numpy(this).double().log_softmax(-1)[:, 9].numpy()))
    assert np.allclose(ours.kl, plain.kl + lost, rtol=1e-9)
    this[:, 9] = -np.inf
    assert np.isfinite(token_scores(this, against, LABELS).kl).all()


def test_the_likeliest_come_first_with_their_probabilities() -> None:
    row = some_logits(4)[0]
    values, ids = torch.from_numpy(row).double().softmax(-1).topk(3)
    found = likeliest(row)
    assert [token_id for token_id, _ in found] == ids.tolist()
    assert [share for _, share in found] == pytest.approx(values.tolist(), rel=1e-12)


def windows() -> tuple[Window, ...]:
    return make_window(range(3, 40), first_scored=20), make_window([5, 6, 7]), make_window([8])


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def test_a_pair_scores_every_place_once_and_in_order(model_path: Path, tmp_path: Path) -> None:
    adapter = write_tiny_lora(tmp_path / "lora.gguf")
    read: list[int] = []
    with (
        open_logits_engine(model_path, adapters=[(adapter, 1.0)], context_length=40) as this,
        open_logits_engine(model_path, context_length=40) as against,
    ):
        pair = EnginePair(this, against)
        result = pair.compare(windows(), n_worst=100, advance=read.append)
        score = pair.score_against(windows())
        alone = [pair.compare([window]).kl_values for window in windows()[:2]]
    assert read == [37, 3]
    assert result.tokens == score.tokens == 19
    assert np.array_equal(result.kl_values, np.concatenate(alone))
    assert score.perplexity == result.perplexity_against
    assert result.kl.mean > 0
    assert sorted((place.window, place.position) for place in result.worst) == [
        *((0, position) for position in range(20, 37)),
        (1, 1),
        (1, 2),
    ]


def test_answers_are_compared_from_their_first_token_on(model_path: Path) -> None:
    pairs = [([3, 4, 5], [6, 7]), ([8, 9], [10, 11, 12])]
    assert first_places(pairs).tolist() == [0, 2]
    with open_logits_engine(model_path, context_length=8) as engine:
        scores = compare_answers(EnginePair(engine, engine), pairs, own=pairs)
    assert scores.answers.tokens == 5
    assert scores.first_kl.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("window", "words"), [(make_window([8]), "token to score"), (make_window([3, 10**6]), "outside the vocabulary")]
)
def test_what_cannot_be_scored_is_refused(model_path: Path, window: Window, words: str) -> None:
    with open_logits_engine(model_path, context_length=8) as engine:
        pair = EnginePair(engine, engine)
        for score in (pair.compare, pair.score_against):
            with pytest.raises(TrainingError, match=words):
                score([window])


def test_numbers_that_are_not_finite_are_told(model_path: Path, tmp_path: Path) -> None:
    broken = tmp_path / "nan.gguf"
    content = bytearray(model_path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    broken.write_bytes(content)
    with (
        open_logits_engine(broken, context_length=8) as this,
        open_logits_engine(model_path, context_length=8) as sound,
        pytest.raises(TrainingError, match="not finite"),
    ):
        EnginePair(this, sound).compare([make_window([3, 4, 5])])
