"""LoRA over packed layers in one operation, against peft's own layer over the same blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.utils.checkpoint import checkpoint

from ollama_forge.gguf.native import quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.blocks import PackedMatrix, Workspace
from ollama_forge.train.lora import PackedLoraLinear, use_packed_lora
from ollama_forge.train.packed import PackedLinear

ROWS, COLUMNS = 64, 512
CASES = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias of the adapter": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
}


def packed_layer(type: GGMLType = GGMLType.Q4_K, heads: int = 0, has_bias: bool = False) -> nn.ModuleDict:
    numbers = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    matrix = PackedMatrix(torch.from_numpy(quantize(numbers.numpy(), type)), type, COLUMNS, heads)
    bias = torch.linspace(-1, 1, ROWS) if has_bias else None
    return nn.ModuleDict({"norm": nn.LayerNorm(4), "proj": PackedLinear(matrix, bias, Workspace())})


def both_layers(layers: nn.ModuleDict, **options: Any) -> tuple[lora.Linear, PackedLoraLinear]:
    """peft's layer and ours, with the same matrices, over the same blocks."""
    wrapped = []
    for is_ours in (False, True):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], init_lora_weights=False, **options)
        torch.manual_seed(1)
        model = get_peft_model(copy.deepcopy(layers), use_packed_lora(config) if is_ours else config)
        wrapped.append(model.base_model.model["proj"])
    theirs, ours = wrapped
    assert type(theirs) is lora.Linear and type(ours) is PackedLoraLinear
    return theirs, ours


def results(layer: lora.Linear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every gradient; one seed for the dropout."""
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(2)
    out = layer(x)
    (out.float() * torch.linspace(-1, 1, ROWS)).square().sum().backward()
    found = {"output": out.detach(), "input": x.grad}
    found.update((name, parameter.grad) for name, parameter in layer.named_parameters() if parameter.requires_grad)
    layer.zero_grad()
    return {name: value for name, value in found.items() if value is not None}


def assert_agree(theirs: lora.Linear, ours: PackedLoraLinear, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    expected, found = results(theirs, x), results(ours, x)
    assert expected.keys() == found.keys() and len(expected) >= 4
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        error = (found[name].float() - value.float()).norm() / value.float().norm()
        assert error < tolerance, name


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [0, 4], ids=["rows as they are", "rope order"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_output_and_gradients_equal_pefts(case: str, heads: int, has_bias: bool) -> None:
    theirs, ours = both_layers(packed_layer(heads=heads, has_bias=has_bias), **CASES[case])
    assert_agree(theirs, ours, tokens(2, 7))


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.BF16, GGMLType.Q6_K, GGMLType.IQ4_XS])
def test_every_kind_of_block_gives_the_same(type: GGMLType) -> None:
    assert_agree(*both_layers(packed_layer(type)), tokens(5))


def test_a_layer_that_is_not_training_drops_nothing() -> None:
    theirs, ours = both_layers(packed_layer(), lora_dropout=0.5)
    assert_agree(theirs.eval(), ours.eval(), tokens(5))


def test_autocast_gives_the_dtype_and_the_numbers_of_peft() -> None:
    theirs, ours = both_layers(packed_layer(heads=4, has_bias=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agree(theirs, ours, tokens(5), tolerance=2e-2)


def test_an_input_of_another_dtype_gives_what_peft_gives() -> None:
    theirs, ours = both_layers(packed_layer())
    x = tokens(5).half()
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_in_backward_gives_the_same_gradients(use_reentrant: bool) -> None:
    _, ours = both_layers(packed_layer())
    expected = results(ours, tokens(5))
    x = tokens(5).requires_grad_()
    out = checkpoint(ours, x, use_reentrant=use_reentrant)
    (out * torch.linspace(-1, 1, ROWS)).square().sum().backward()
    assert torch.equal(x.grad, expected["input"])
    assert torch.equal(ours.lora_A["default"].weight.grad, expected["lora_A.default.weight"])


def test_an_input_without_gradient_still_trains_the_matrices() -> None:
    theirs, ours = both_layers(packed_layer())
    for layer in (theirs, ours):
        layer(tokens(5)).square().sum().backward()
    for name in ("lora_A", "lora_B"):
        pair = [getattr(layer, name)["default"].weight.grad for layer in (theirs, ours)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-3)


def test_hooks_on_the_base_layer_still_see_it_run() -> None:
    theirs, ours = both_layers(packed_layer())
    seen = []
    handle = ours.base_layer.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0].shape))
    assert_agree(theirs, ours, tokens(5))
    assert seen == [(5, COLUMNS)]
    handle.remove()


def test_an_adapter_that_is_switched_off_leaves_the_base() -> None:
    theirs, ours = both_layers(packed_layer())
    for layer in (theirs, ours):
        layer.enable_adapters(False)
    assert torch.equal(ours(tokens(5)), ours.base_layer(tokens(5)))
    assert torch.equal(ours(tokens(5)), theirs(tokens(5)))


def test_two_adapters_at_once_add_up_as_in_peft() -> None:
    pairs = both_layers(packed_layer())
    for layer in pairs:
        torch.manual_seed(4)
        config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False)
        layer.update_layer("second", 2, lora_alpha=4, config=config)
        layer.set_adapter(["default", "second"])
    assert_agree(*pairs, tokens(5))


def test_what_is_saved_loads_into_pefts_own_layer(tmp_path: Path) -> None:
    layers = packed_layer()
    config = LoraConfig(r=4, target_modules=["proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(layers), use_packed_lora(config))
    model.save_pretrained(str(tmp_path))
    plain = PeftModel.from_pretrained(layers, str(tmp_path))
    layer = plain.base_model.model["proj"]
    assert type(layer) is lora.Linear
    torch.testing.assert_close(layer(tokens(5)), model.base_model.model["proj"](tokens(5)))


def test_layers_that_are_not_packed_stay_pefts() -> None:
    config = use_packed_lora(LoraConfig(r=4, target_modules=["proj"]))
    model = get_peft_model(nn.ModuleDict({"proj": nn.Linear(8, 8)}), config)
    assert type(model.base_model.model["proj"]) is lora.Linear
