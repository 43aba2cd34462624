"""What is kept for backward depends on the room and the batch; what is learnt does not change by a bit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_sources import VOCABULARY, dense_model, write_gguf_of
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.modeling_layers import GradientCheckpointingLayer

from ollama_forge.gguf.types import GGMLType
from ollama_forge.train import packed
from ollama_forge.train.blocks import PackedMatrix
from ollama_forge.train.load import load_packed
from ollama_forge.train.lora import use_packed_lora
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.recompute import recompute_activations

FAMILIES = ["llama3", "gemma2", "gpt2", "qwen3_moe"]
ENOUGH, TOO_LITTLE = 1 << 40, 0
N_TOKENS = 12


def packed_file(family: str, folder: Path) -> Path:
    path = folder / f"{family}.gguf"
    write_gguf_of(dense_model(family), family, path, GGMLType.Q4_K)
    return path


def adapted_model(path: Path, room_bytes: int | None, is_ours: bool = False) -> PeftModel:
    """With recomputation as transformers has it (None), or as we do; with peft's own LoRA layers or ours."""
    torch.manual_seed(0)
    model = load_packed(path).model
    install_chunked_loss(model)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, use_packed_lora(config) if is_ours else config)
    if room_bytes is None:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        assert recompute_activations(model, room_bytes) is not None
    return adapted.train()


def blocks_of(adapted: PeftModel) -> list[GradientCheckpointingLayer]:
    return [module for module in adapted.modules() if isinstance(module, GradientCheckpointingLayer)]


def run_step(adapted: PeftModel, n_tokens: int) -> dict[str, torch.Tensor]:
    """A pass forward and back; the loss and all gradients."""
    torch.manual_seed(1)  # gpt2 drops some activations
    ids = torch.arange(n_tokens).reshape(1, -1) % (VOCABULARY - 3) + 3
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[PackedMatrix]:
    """The matrices that were multiplied by forward, one after the other."""
    found: list[PackedMatrix] = []
    products = packed.products

    def note(x: torch.Tensor, matrix: PackedMatrix, *args: Any) -> torch.Tensor:
        found.append(matrix)
        return products(x, matrix, *args)

    monkeypatch.setattr(packed, "products", note)
    return found


@pytest.mark.parametrize("is_ours", [False, True], ids=["peft's layers", "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit(family: str, is_ours: bool, tmp_path: Path) -> None:
    path = packed_file(family, tmp_path)
    expected = run_step(adapted_model(path, None, is_ours), N_TOKENS)
    assert len(expected) > 4
    for power in (0, 12, 14, 16, 18, 40):
        adapted = adapted_model(path, 1 << power, is_ours)
        for _step in range(3):  # from the second one on it is known which products are worth keeping
            found = run_step(adapted, N_TOKENS)
            assert expected.keys() == found.keys()
            assert all(torch.equal(value, found[name]) for name, value in expected.items()), power


def test_the_last_product_of_a_block_is_not_computed_again(computed: list[PackedMatrix], tmp_path: Path) -> None:
    adapted = adapted_model(packed_file("llama3", tmp_path), None, is_ours=True)
    run_step(adapted, N_TOKENS)
    once = {matrix for matrix, number in Counter(computed).items() if number == 1}
    last = {block.mlp.down_proj.get_base_layer().matrix for block in blocks_of(adapted)}
    assert once == last and len(computed) == 13 * len(last), "7 products of a block, and 6 of them again"


def test_more_room_leaves_fewer_products_to_compute_again(computed: list[PackedMatrix], tmp_path: Path) -> None:
    path = packed_file("llama3", tmp_path)
    counts, spared = [], []
    for power in range(10, 24):
        adapted = adapted_model(path, 1 << power, is_ours=True)
        run_step(adapted, N_TOKENS)  # it is not known yet what recomputation asks for
        computed.clear()
        run_step(adapted, N_TOKENS)
        counts.append(len(computed))
        spared.append(sum(not block.gradient_checkpointing for block in blocks_of(adapted)))
    n_blocks = len(blocks_of(adapted))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 13 * n_blocks and counts[-1] == 7 * n_blocks
    only_products = [count for count, n_spared in zip(counts, spared, strict=True) if not n_spared]
    assert only_products[-1] < only_products[0], "products are kept before whole blocks are"
    assert spared[-1] == n_blocks


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
    handle = recompute_activations(model, TOO_LITTLE)
    model.activation_checkpointing_disable()
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
