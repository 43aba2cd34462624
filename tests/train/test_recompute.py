"""The last blocks keep their activations where a batch is short; what is learnt does not change by a bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packed_sources import VOCABULARY, dense_model, write_gguf_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer

from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.load import load_packed
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.recompute import spare_last_blocks

FAMILIES = ["llama3", "gemma2", "gpt2", "qwen3_moe"]
ENOUGH, TOO_LITTLE = 1 << 40, 0


def packed_file(family: str, folder: Path) -> Path:
    path = folder / f"{family}.gguf"
    write_gguf_of(dense_model(family), family, path, GGMLType.Q4_K)
    return path


def adapted_model(path: Path, room_bytes: int | None) -> PeftModel:
    torch.manual_seed(0)
    model = load_packed(path).model
    install_chunked_loss(model)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    if room_bytes is not None:
        assert spare_last_blocks(model, room_bytes) is not None
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return adapted.train()


def blocks_of(adapted: PeftModel) -> list[GradientCheckpointingLayer]:
    return [module for module in adapted.modules() if isinstance(module, GradientCheckpointingLayer)]


def run_step(adapted: PeftModel, n_tokens: int) -> dict[str, torch.Tensor]:
    """A pass forward and back; the loss and all gradients."""
    ids = torch.arange(n_tokens).reshape(1, -1) % (VOCABULARY - 3) + 3
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room_bytes", [ENOUGH, TOO_LITTLE], ids=["all blocks keep", "none keeps"])
def test_gradients_are_the_same_to_the_bit(family: str, room_bytes: int, tmp_path: Path) -> None:
    path = packed_file(family, tmp_path)
    expected = run_step(adapted_model(path, None), 12)
    adapted = adapted_model(path, room_bytes)
    found = run_step(adapted, 12)
    assert {block.gradient_checkpointing for block in blocks_of(adapted)} == {room_bytes == TOO_LITTLE}
    assert expected.keys() == found.keys() and len(expected) > 4
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_short_batch_spares_more_blocks_than_a_long_one(tmp_path: Path) -> None:
    path = packed_file("llama3", tmp_path)
    n_blocks = len(blocks_of(adapted_model(path, None)))
    assert n_blocks >= 2
    # room for all blocks at 8 tokens, found by trying
    room = next(room for room in (1 << power for power in range(40)) if _spared(path, room, 8) == n_blocks)
    adapted = adapted_model(path, room)
    counts = []
    for n_tokens in (8, 8 * n_blocks * 2, 16, 8):
        run_step(adapted, n_tokens)
        flags = [block.gradient_checkpointing for block in blocks_of(adapted)]
        assert flags == sorted(flags, reverse=True), "the first blocks recompute, the last ones keep"
        counts.append(flags.count(False))
    assert counts[0] == counts[-1] == n_blocks
    assert counts[1] <= counts[2] <= n_blocks and counts[1] < n_blocks


def _spared(path: Path, room: int, n_tokens: int) -> int:
    adapted = adapted_model(path, room)
    run_step(adapted, n_tokens)
    return [block.gradient_checkpointing for block in blocks_of(adapted)].count(False)


def test_spared_blocks_keep_no_cache_of_keys(tmp_path: Path) -> None:
    adapted = adapted_model(packed_file("llama3", tmp_path), ENOUGH)
    output = adapted.get_base_model().base_model(input_ids=torch.arange(3, 9).reshape(1, -1))
    assert getattr(output, "past_key_values", None) is None


def test_where_nothing_recomputes_nothing_is_switched_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_packed(packed_file("llama3", tmp_path)).model.train()
    handle = spare_last_blocks(model, TOO_LITTLE)
    model.base_model(input_ids=torch.arange(3, 9).reshape(1, -1))
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert blocks and not any(block.gradient_checkpointing for block in blocks)
    assert handle is not None
    handle.remove()


def test_a_model_that_is_asked_and_not_trained_stays_as_it_is(tmp_path: Path) -> None:
    adapted = adapted_model(packed_file("llama3", tmp_path), ENOUGH).eval()
    before = [block.gradient_checkpointing for block in blocks_of(adapted)]
    with torch.no_grad():
        adapted(input_ids=torch.arange(3, 9).reshape(1, -1))
    assert [block.gradient_checkpointing for block in blocks_of(adapted)] == before
