"""An ablation that is switched on in a loaded model is the ablation that is written into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_sources import VOCABULARY, WIDTH, dense_model, write_gguf_of

from ollama_forge.files import atomic_output
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.train.ablation_trials import TrialModel, generate_greedily, projected
from ollama_forge.train.load import PackedModel, load_packed
from ollama_forge.transform.ablation import AblationOptions, plan_ablation, plan_projections
from ollama_forge.transform.apply import plan_gguf_edit
from ollama_forge.transform.directions import Directions
from ollama_forge.weights.checkpoint import open_checkpoint

FAMILIES = ("llama", "llama3", "qwen2", "qwen3_moe", "gemma2", "gpt2")
OPTIONS = {
    "one layer's direction everywhere": AblationOptions(layer=1.0),
    "between layers, uneven": AblationOptions(
        layer=0.4, attention_strength=1.3, mlp_strength=0.6, kernel="gaussian", kernel_center=0.2
    ),
    "each its own, two of them, no embedding": AblationOptions(per_layer=True, n_directions=2, embedding=False),
}
IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 300, 2, 41, 18]])


def random_directions(n_layers: int = 2, count: int = 2) -> Directions:
    draw = np.random.default_rng(7)
    rows = draw.normal(size=(n_layers, count, WIDTH)).astype(np.float32)
    return Directions(rows / np.linalg.norm(rows, axis=2, keepdims=True), best_layer=1)


def write_ablated(source: Path, target: Path, options: AblationOptions) -> None:
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.gguf is not None
        plan = plan_gguf_edit(checkpoint.gguf, plan_ablation(checkpoint, random_directions(), options).edits)
        with atomic_output(target) as sink:
            write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)


def live_projections(source: Path, options: AblationOptions) -> Any:
    with open_checkpoint(source) as checkpoint:
        return plan_projections(checkpoint, random_directions(), options)


@torch.no_grad()
def logits_of(packed: PackedModel) -> torch.Tensor:
    return packed.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_edit_gives_the_logits_of_the_written_one(family: str, options: AblationOptions, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    source, target = tmp_path / "source.gguf", tmp_path / "edited.gguf"
    write_gguf_of(dense_model(family), family, source, GGMLType.F32)
    write_ablated(source, target, options)
    packed = load_packed(source)
    before = logits_of(packed)
    with projected(packed, live_projections(source, options)):
        live = logits_of(packed)
    written = logits_of(load_packed(target))
    change = (written - before).abs().max()
    assert change > 0.02
    assert (live - written).abs().max() < 1e-3 * change
    assert torch.equal(logits_of(packed), before), "switched off it is the model that it was"


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "qwen3_moe"])
def test_a_batch_is_answered_as_each_prompt_alone(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_gguf_of(dense_model(family), family, tmp_path / "m.gguf", GGMLType.F32)
    packed = load_packed(tmp_path / "m.gguf")
    prompts = [[5, 9], [17, 3, 200, 31, 7, 9, 44, 101, 12, 13, 60], [40], [8, 8, 8]]
    together = generate_greedily(packed, prompts, frozenset(), 6)
    assert [len(answer) for answer in together] == [6] * 4
    assert list(together) == [generate_greedily(packed, [prompt], frozenset(), 6)[0] for prompt in prompts]
    end = together[1][2]
    stopped = generate_greedily(packed, prompts, frozenset({end}), 6)
    assert stopped[1] == together[1][: together[1].index(end) + 1]


def test_a_trial_of_no_strength_is_the_untouched_model(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q8_0)
    trials = TrialModel(load_packed(tmp_path / "m.gguf"), [[5, 9]], [[17, 3, 200]], frozenset({2}), 4)
    nothing = trials.measure([])
    assert nothing.answers == trials.harmful_answers
    assert nothing.first_kl == nothing.answer_kl == 0
    something = trials.measure(live_projections(tmp_path / "m.gguf", AblationOptions(layer=1.0)))
    assert something.answer_kl > 0 and something.first_kl > 0
    assert max(max(answer) for answer in something.answers) < VOCABULARY
