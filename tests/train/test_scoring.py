"""Perplexity and divergence agree with transformers' logits and the analytic values, in bounded memory."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sources import dense_model, dequantized_reference, write_gguf_of
from torch import nn

from ollama_forge.dataset.windows import NOT_SCORED, Window, make_window
from ollama_forge.errors import TrainingError
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train import scoring
from ollama_forge.train.load import load_packed
from ollama_forge.train.scoring import capture_reference, compare, perplexity, score

N_TOKENS = 24


def some_windows(count: int = 5, length: int = N_TOKENS, seed: int = 1) -> list[Window]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 300, (count, length), generator=draw).tolist()
    return [make_window(row, first_scored=length // 2) for row in rows]


def plain_log_probs(model: Any, windows: list[Window]) -> torch.Tensor:
    """log-probabilities over the vocabulary at every scored place, float64, straight from transformers' logits."""
    rows = []
    for window in windows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(window.input_ids)])).logits[0].double()
        places = [index - 1 for index, label in enumerate(window.labels) if label != NOT_SCORED]
        rows.append(logits[places].log_softmax(-1))
    return torch.cat(rows)


def labels_of(windows: list[Window]) -> torch.Tensor:
    return torch.tensor([label for window in windows for label in window.labels if label != NOT_SCORED])


@pytest.fixture(scope="module")
def llama() -> Any:
    return dense_model("llama")


@pytest.fixture(scope="module")
def other() -> Any:
    return dense_model("llama", seed=3)


def test_a_model_beside_itself_differs_nowhere(llama: Any) -> None:
    result = compare(llama, llama, some_windows())
    assert result.kl.max < 1e-6
    assert result.same_top.value == 1.0
    assert result.log_ratio.value == 0.0
    assert result.perplexity_this == result.perplexity_against


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_numbers_equal_those_of_whole_logits(name: str) -> None:
    this, against = dense_model(name), dense_model(name, seed=3)
    windows = some_windows()
    q, p = plain_log_probs(this, windows), plain_log_probs(against, windows)
    labels = labels_of(windows)
    kl = (p.exp() * (p - q)).sum(-1)
    result = compare(this, against, windows)
    assert result.tokens == len(labels)
    assert torch.allclose(torch.from_numpy(result.kl_values), kl, rtol=1e-4, atol=1e-7)
    assert result.kl.mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl.median == pytest.approx(float(kl.quantile(0.5)), rel=1e-4)
    assert result.kl.p99 == pytest.approx(float(kl.quantile(0.99)), rel=1e-4)
    assert result.same_top.value == pytest.approx(float((q.argmax(-1) == p.argmax(-1)).double().mean()))
    loss = -q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert result.perplexity_this.value == pytest.approx(math.exp(float(loss.mean())), rel=1e-5)
    error = float(loss.std(correction=0)) / math.sqrt(len(loss) - 1)
    assert result.perplexity_this.error == pytest.approx(math.exp(float(loss.mean())) * error, rel=1e-4)
    assert perplexity(this, windows) == pytest.approx(result.perplexity_this.value, rel=1e-9)


@pytest.mark.parametrize("shift", [0.01, 1.0, -3.0, 20.0])
def test_a_shift_of_one_logit_costs_what_the_formula_says(shift: float, llama: Any) -> None:
    """KL(p || p with one logit moved by c) = ln(1 - p + p e^c) - p c for the token's probability p."""
    token = 17
    shifted = dense_model("llama")
    head = nn.Linear(shifted.lm_head.in_features, shifted.lm_head.out_features)
    head.weight = shifted.lm_head.weight
    head.bias = nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[token] = shift
    shifted.lm_head = head
    windows = some_windows()
    p = plain_log_probs(llama, windows)[:, token].exp()
    expected = torch.log1p(p * math.expm1(shift)) - p * shift
    result = compare(shifted, llama, windows)
    assert torch.allclose(torch.from_numpy(result.kl_values), expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_packed_blocks_score_as_the_numbers_that_they_hold(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(name), name, path, GGMLType.Q4_0)
    packed = load_packed(path)
    result = compare(packed, dequantized_reference(name, path), some_windows())
    assert result.kl.max < 1e-6
    assert result.same_top.value == 1.0


def test_a_captured_reference_gives_the_same_numbers_for_every_candidate(llama: Any, other: Any) -> None:
    windows = some_windows()
    reference = capture_reference(llama, windows)
    assert reference.hidden.shape == (sum(window.n_scored for window in windows), llama.config.hidden_size)
    for candidate in (other, llama):
        direct, reused = compare(candidate, llama, windows), compare(candidate, reference, windows)
        assert np.array_equal(direct.kl_values, reused.kl_values)
        assert direct.worst == reused.worst
    with pytest.raises(TrainingError, match="other windows"):
        compare(other, reference, some_windows(seed=9))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Room for the logits of seven tokens."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 7 * 4 * 320)
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 2 * N_TOKENS)
    yield 7


def test_logits_exist_for_a_few_tokens_at_a_time(small_chunks: int, llama: Any) -> None:
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.shape))
    compare(llama, llama, some_windows())
    score(llama, some_windows())
    hook.remove()
    assert max(rows for rows, _ in seen) <= small_chunks
    assert {vocabulary for _, vocabulary in seen} == {320}


def test_chunks_and_batches_change_no_number(llama: Any, other: Any, request: pytest.FixtureRequest) -> None:
    windows = some_windows()
    whole = compare(other, llama, windows)
    request.getfixturevalue("small_chunks")
    parts = compare(other, llama, windows)
    assert np.allclose(whole.kl_values, parts.kl_values, rtol=1e-5, atol=1e-9)
    assert [(place.window, place.position) for place in whole.worst] == [
        (place.window, place.position) for place in parts.worst
    ]


def test_windows_of_different_lengths_score_as_they_do_alone(llama: Any, other: Any) -> None:
    windows = [make_window(some_windows(1, length, seed=length)[0].input_ids) for length in (5, 19, 2, 11)]
    together = compare(other, llama, windows).kl_values
    alone = np.concatenate([compare(other, llama, [window]).kl_values for window in windows])
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-9)


def test_the_worst_places_are_the_largest_divergences_in_their_text(llama: Any, other: Any) -> None:
    windows = some_windows()
    result = compare(other, llama, windows, n_worst=4)
    assert [place.kl for place in result.worst] == sorted(result.kl_values.tolist(), reverse=True)[:4]
    for place in result.worst:
        ids = list(windows[place.window].input_ids)
        assert place.token_id == ids[place.position]
        assert list(place.before) == ids[: place.position]
        p = plain_log_probs(llama, [make_window(ids[: place.position + 1], first_scored=place.position)])[0]
        top_id, top_share = place.top_against[0]
        assert top_id == int(p.argmax())
        assert top_share == pytest.approx(float(p.max().exp()), rel=1e-4)
        assert place.log_prob_against == pytest.approx(float(p[place.token_id]), rel=1e-4)


def test_buckets_share_out_every_token_by_its_place(llama: Any, other: Any) -> None:
    result = compare(other, llama, some_windows())
    assert sum(bucket.tokens for bucket in result.buckets) == result.tokens
    assert result.buckets[0].first == N_TOKENS // 2
    assert result.buckets[-1].last == N_TOKENS - 1
    mean = sum(bucket.kl_mean * bucket.tokens for bucket in result.buckets) / result.tokens
    assert mean == pytest.approx(result.kl.mean, rel=1e-9)


def test_vocabularies_of_different_sizes_are_refused(llama: Any) -> None:
    with pytest.raises(TrainingError, match="vocabularies of"):
        compare(dense_model("llama", vocab_size=328), llama, some_windows())


def test_tokens_outside_the_vocabulary_and_empty_windows_are_refused(llama: Any) -> None:
    with pytest.raises(TrainingError, match="outside the vocabulary"):
        score(llama, [make_window([1, 2, 400])])
    with pytest.raises(TrainingError, match="to score"):
        score(llama, [make_window([1])])
    with pytest.raises(TrainingError, match="to score"):
        compare(llama, llama, [])


def test_weights_that_are_not_finite_are_told(llama: Any) -> None:
    broken = dense_model("llama")
    with torch.no_grad():
        broken.lm_head.weight[5, 0] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        compare(broken, llama, some_windows())
