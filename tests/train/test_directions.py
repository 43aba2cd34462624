"""Directions are those of transformers' own hidden states, whatever the batches; and evidence is what it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ablation_models import to_gguf
from tiny_models import build_model
from transformers import AutoModelForCausalLM

from ollama_forge.errors import TrainingError, UsageError
from ollama_forge.train import hidden_states
from ollama_forge.train.direction_options import DirectionOptions
from ollama_forge.train.directions import compute_directions, geometric_median, silhouette
from ollama_forge.train.hidden_states import gather_states
from ollama_forge.train.load import PackedModel, load_packed

HARMFUL = [[5, 9, 30, 4], [7, 7, 12], [40, 3, 21, 33, 8, 4], [11, 2, 4]]
HARMLESS = [[6, 10, 31, 4], [8, 17, 4], [41, 13, 22, 3, 9, 4], [12, 14, 4]]
POSITIONS = (-1, -2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, PackedModel]]:
    """(transformers' float32 model, packed model) of a kind, made once."""
    home = tmp_path_factory.mktemp("models")
    made: dict[str, tuple[Any, PackedModel]] = {}

    def make(kind: str) -> tuple[Any, PackedModel]:
        if kind not in made:
            build_model(kind, home / kind, dtype="float32")
            dense = AutoModelForCausalLM.from_pretrained(home / kind, dtype=torch.float32).eval()
            made[kind] = (dense, load_packed(to_gguf(home / kind, home / f"{kind}.gguf")))
        return made[kind]

    return make


@torch.no_grad()
def dense_states(dense: Any, rows: list[list[int]]) -> np.ndarray:
    """What each block hands on, one prompt at a time: [prompts, positions, layers, width]."""
    layers = dense.transformer.h if hasattr(dense, "transformer") else dense.model.layers
    seen: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    found = []
    for row in rows:
        seen.clear()
        dense(input_ids=torch.tensor([row]))
        found.append(np.stack([[state[0, p].numpy() for state in seen] for p in POSITIONS]))
    for hook in hooks:
        hook.remove()
    return np.stack(found)


@pytest.mark.parametrize("kind", ["llama2", "qwen2", "qwen3_moe", "gemma2", "gemma3", "phi3", "gpt2"])
def test_states_are_those_of_transformers_in_batches_and_alone(
    kind: str, models: Callable[[str], tuple[Any, PackedModel]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, packed = models(kind)
    wanted = dense_states(dense, HARMFUL)
    together = gather_states(packed, HARMFUL, POSITIONS)
    monkeypatch.setattr(hidden_states, "BATCH_TOKENS", 1)
    monkeypatch.setattr(hidden_states, "KEPT_PROMPTS", 2)
    alone = gather_states(packed, HARMFUL, POSITIONS)

    scale = np.abs(wanted).max()
    np.testing.assert_allclose(together.kept.numpy(), wanted, rtol=0, atol=2e-4 * scale)
    np.testing.assert_allclose(together.means, wanted.mean(axis=0), rtol=0, atol=2e-4 * scale)
    np.testing.assert_allclose(alone.means, together.means, rtol=0, atol=1e-5 * scale)
    assert len(alone.kept) == 2 and len(gather_states(packed, HARMFUL, (-1,), keep_all=True).kept) == 4


def test_the_direction_is_the_difference_of_means(models: Callable[[str], tuple[Any, PackedModel]]) -> None:
    dense, packed = models("llama2")
    harmful, harmless = (dense_states(dense, rows)[:, 0] for rows in (HARMFUL, HARMLESS))
    advanced: list[int] = []
    report = compute_directions(packed, HARMFUL, HARMLESS, advance=advanced.append)

    gap = harmful.mean(axis=0) - harmless.mean(axis=0)
    unit = gap / np.linalg.norm(gap, axis=1, keepdims=True)
    np.testing.assert_allclose(report.directions.vectors[:, 0], unit, atol=1e-3)
    np.testing.assert_allclose(report.directions.harmless_means, harmless.mean(axis=0), atol=1e-3)
    assert sum(advanced) == report.n_tokens == sum(map(len, HARMFUL + HARMLESS))
    for item in report.layers:
        a, b = harmful[:, item.layer].mean(axis=0), harmless[:, item.layer].mean(axis=0)
        assert item.gap == pytest.approx(np.linalg.norm(a - b), rel=1e-3)
        assert item.means_cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)
        assert item.harmful_norm == pytest.approx(np.linalg.norm(a), rel=1e-3)
    assert report.best.best_cosine == pytest.approx(1)


def test_more_directions_stand_at_right_angles_to_the_first(models: Callable[[str], tuple[Any, PackedModel]]) -> None:
    _, packed = models("llama2")
    one = compute_directions(packed, HARMFUL, HARMLESS).directions
    three = compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(n_directions=3)).directions
    for layer in range(2):
        rows = three.vectors[layer]
        np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=1e-5)
        np.testing.assert_allclose(rows[0], one.vectors[layer, 0], atol=1e-5)
    with pytest.raises(UsageError, match="do not give"):
        compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(n_directions=9))


def test_projected_directions_have_nothing_of_the_harmless_mean(
    models: Callable[[str], tuple[Any, PackedModel]],
) -> None:
    _, packed = models("gemma2")
    found = compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(projected=True)).directions
    for layer in range(2):
        mean = found.harmless_means[layer] / np.linalg.norm(found.harmless_means[layer])
        assert abs(found.vectors[layer, 0] @ mean) < 1e-4


def test_the_layer_is_chosen_among_the_candidates_by_separation(
    models: Callable[[str], tuple[Any, PackedModel]],
) -> None:
    _, packed = models("llama2")
    for layer in (0, 1):
        report = compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(layers=(layer,)))
        assert report.directions.best_layer == layer
        assert [item.is_candidate for item in report.layers] == [layer == 0, layer == 1]
    with pytest.raises(UsageError, match="no layer 2"):
        compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(layers=(2,)))


def test_two_equal_sets_and_short_prompts_are_refused(models: Callable[[str], tuple[Any, PackedModel]]) -> None:
    _, packed = models("llama2")
    with pytest.raises(UsageError, match="leave the same state"):
        compute_directions(packed, HARMFUL, HARMFUL)
    with pytest.raises(TrainingError, match="3 tokens"):
        compute_directions(packed, HARMFUL, HARMLESS, DirectionOptions(positions=(-4,)))
    for wrong in (DirectionOptions(method="mode"), DirectionOptions(n_directions=0), DirectionOptions(positions=(0,))):
        with pytest.raises(UsageError):
            compute_directions(packed, HARMFUL, HARMLESS, wrong)


def test_a_silhouette_is_near_one_apart_and_near_zero_mixed() -> None:
    torch.manual_seed(0)
    noise = torch.randn(200, 16)
    shift = torch.zeros(16)
    shift[3] = 40.0
    assert silhouette(noise[:100] + shift, noise[100:]) > 0.9
    assert abs(silhouette(noise[:100], noise[100:])) < 0.05
    assert silhouette(noise[:1], noise[100:]) == 0.0
    # One large coordinate that all states share says nothing.
    assert silhouette(noise[:100] + 1e4 * shift, noise[100:] + 1e4 * shift) < 0.1


def test_a_geometric_median_is_not_moved_by_outliers() -> None:
    torch.manual_seed(0)
    states = torch.randn(50, 8)
    states[:5] += 1e4
    found = geometric_median(states)
    assert np.linalg.norm(found) < 1.0
    steps = (states.double() - torch.from_numpy(found)) / torch.linalg.vector_norm(
        states.double() - torch.from_numpy(found), dim=1, keepdim=True
    )
    assert float(torch.linalg.vector_norm(steps.sum(dim=0))) < 1e-2


def test_the_picture_is_a_picture(models: Callable[[str], tuple[Any, PackedModel]], tmp_path: Path) -> None:
    from ollama_forge.train.direction_plot import draw_evidence

    _, packed = models("llama2")
    report = compute_directions(packed, HARMFUL, HARMLESS)
    assert draw_evidence(report).startswith(b"\x89PNG")
    assert draw_evidence(report) == draw_evidence(report)
