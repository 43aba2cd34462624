"""The chunked loss against cross-entropy over whole logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from packed_sources import VOCABULARY, dense_model, dequantized_reference, write_gguf_of
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

import ollama_forge.train.loss as loss_module
from ollama_forge.errors import TrainingError
from ollama_forge.gguf.native import quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.blocks import PackedMatrix, Workspace
from ollama_forge.train.load import load_packed
from ollama_forge.train.loss import Head, find_head, install_chunked_loss, score_labels
from ollama_forge.train.packed import PackedLinear

WIDTH, WORDS = 256, 1000


def packed_head(capacity_bytes: int = 1 << 20) -> PackedLinear:
    weight = torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.2
    blocks = torch.from_numpy(quantize(weight.numpy(), GGMLType.Q6_K))
    return PackedLinear(PackedMatrix(blocks, GGMLType.Q6_K, WIDTH), None, Workspace(capacity_bytes))


def dense_loss(hidden: torch.Tensor, labels: torch.Tensor, layer: nn.Linear, softcap: float) -> torch.Tensor:
    logits = nn.functional.linear(hidden, layer.weight + 0, layer.bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits, labels)


@pytest.fixture(params=[1 << 30, 4 * WORDS * 5, 1], ids=["one chunk", "5 tokens", "1 token"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", request.param)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("capacity_bytes", [1, 1 << 19, 1 << 24])
def test_loss_and_gradient_equal_dense_cross_entropy(chunk: None, softcap: float, capacity_bytes: int) -> None:
    head = packed_head(capacity_bytes)
    hidden = torch.randn(23, WIDTH, requires_grad=True)
    labels = torch.randint(WORDS, (23,))
    expected = dense_loss(hidden, labels, head, softcap)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    found = -score_labels(hidden, labels, Head(head, softcap)).log_probs.mean()
    (gradient,) = torch.autograd.grad(found, hidden)
    assert abs(found.item() - expected.item()) < 1e-6 * max(1.0, expected.item())
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_each_label_may_weigh_differently_in_the_gradient() -> None:
    head = packed_head()
    hidden = torch.randn(9, WIDTH, requires_grad=True)
    labels, weights = torch.randint(WORDS, (9,)), torch.randn(9)
    logits = nn.functional.linear(hidden, head.weight + 0)
    expected = (logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1).exp() * weights).sum()
    found = (score_labels(hidden, labels, Head(head)).log_probs.exp() * weights).sum()
    torch.testing.assert_close(
        torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden), rtol=1e-4, atol=1e-6
    )


def test_an_ordinary_linear_head_works_too() -> None:
    head = nn.Linear(WIDTH, WORDS).requires_grad_(False)
    hidden = torch.randn(6, WIDTH, requires_grad=True)
    labels = torch.randint(WORDS, (6,))
    found = -score_labels(hidden, labels, Head(head)).log_probs.mean()
    expected = nn.functional.cross_entropy(head(hidden), labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, hidden), torch.autograd.grad(expected, hidden))


def test_bfloat16_hidden_states_are_scored_in_float32() -> None:
    head = packed_head()
    hidden = torch.randn(6, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(WORDS, (6,))
    found = -score_labels(hidden, labels, Head(head)).log_probs.mean()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense_loss(hidden.float(), labels, head, 0.0), rtol=2e-2, atol=2e-2)
    found.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16 and hidden.grad.isfinite().all()


def test_entropy_and_hits_describe_the_prediction() -> None:
    head = packed_head()
    hidden = torch.randn(12, WIDTH)
    logits = nn.functional.linear(hidden, head.weight + 0)
    labels = logits.argmax(-1)
    labels[::2] = 3
    scores = score_labels(hidden, labels, Head(head))
    probabilities = logits.softmax(-1)
    torch.testing.assert_close(scores.entropy, -(probabilities * probabilities.log()).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.is_top1, logits.argmax(-1) == labels)
    assert not scores.log_probs.requires_grad


def test_certain_predictions_give_no_nan() -> None:
    head = nn.Linear(4, 8, bias=False).requires_grad_(False)
    head.weight.data = torch.eye(8, 4) * 1e4
    hidden = torch.eye(4, requires_grad=True)
    scores = score_labels(hidden, torch.arange(4), Head(head))
    assert torch.equal(scores.log_probs, torch.zeros(4))
    assert torch.equal(scores.entropy, torch.zeros(4))
    scores.log_probs.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


@pytest.mark.parametrize("label", [-1, WORDS])
def test_a_label_outside_the_vocabulary_is_refused(label: int) -> None:
    with pytest.raises(TrainingError, match=str(label)):
        score_labels(torch.randn(1, WIDTH), torch.tensor([label]), Head(packed_head()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3", "qwen3_moe"])
def test_an_installed_loss_equals_that_of_transformers(name: str) -> None:
    model = dense_model(name).requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, (3, 17))
    labels = ids.clone()
    labels[0, :5] = labels[2] = -100
    for options in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected = model(ids, labels=labels, **options).loss
        install_chunked_loss(model)
        install_chunked_loss(model)
        found = model(input_ids=ids, labels=labels, **options).loss
        assert abs(found.item() - expected.item()) < 1e-6 * expected.item()
        del model.forward


def test_a_batch_without_labels_to_learn_gives_zero_and_no_nan() -> None:
    model = get_peft_model(dense_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    install_chunked_loss(model.get_base_model())
    ids = torch.randint(3, VOCABULARY, (1, 8))
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(
        parameter.grad is None or parameter.grad.isfinite().all()
        for parameter in model.parameters()
        if parameter.requires_grad
    )


def test_without_labels_the_model_gives_logits_as_before() -> None:
    model = dense_model("llama").requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, (1, 8))
    expected = model(ids).logits
    install_chunked_loss(model)
    assert torch.equal(model(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 10)


def test_labels_that_are_already_shifted_are_scored_in_place() -> None:
    model = dense_model("llama").requires_grad_(False)
    install_chunked_loss(model)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    shifted = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_fields_that_trl_reads_equal_those_of_its_own_head(name: str) -> None:
    model = dense_model(name).requires_grad_(False)
    ids = torch.randint(3, VOCABULARY, (2, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    expected = model(input_ids=ids, labels=labels, fused_lm_head=True)
    install_chunked_loss(model)
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    for key in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def test_a_head_that_learns_keeps_the_loss_of_transformers() -> None:
    model = dense_model("llama")
    assert find_head(model) is None
    install_chunked_loss(model)
    ids = torch.randint(3, VOCABULARY, (1, 8))
    output = model(input_ids=ids, labels=ids)
    assert output.logits.shape == (1, 8, VOCABULARY)
    output.loss.backward()
    assert model.lm_head.weight.grad is not None
    model.requires_grad_(False)
    assert find_head(model) is not None
    model.config.logit_scale = 0.5
    assert find_head(model) is None


def test_an_adapter_on_the_head_is_trained(tmp_path: Path) -> None:
    write_gguf_of(dense_model("llama"), "llama", tmp_path / "m.gguf", GGMLType.Q8_0)
    reference = get_peft_model(
        dequantized_reference("llama", tmp_path / "m.gguf"), LoraConfig(r=2, target_modules=["lm_head"])
    )
    packed = get_peft_model(load_packed(tmp_path / "m.gguf").model, LoraConfig(r=2, target_modules=["lm_head"]))
    packed.load_state_dict(
        {key: value for key, value in reference.state_dict().items() if "lora_" in key}, strict=False
    )
    ids = torch.randint(3, VOCABULARY, (1, 8))
    for model in (reference, packed):
        model(input_ids=ids, labels=ids).loss.backward()
    expected, found = (model.base_model.model.lm_head.lora_B["default"].weight.grad for model in (reference, packed))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert math.isfinite(found.norm()) and found.norm() > 0


def test_the_balance_loss_of_experts_is_added_as_transformers_adds_it() -> None:
    model = dense_model("qwen3_moe").requires_grad_(False)
    model.config.output_router_logits = True
    ids = torch.randint(3, VOCABULARY, (2, 9))
    expected = model(ids, labels=ids)
    install_chunked_loss(model)
    found = model(ids, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
