"""Numbers are rounded as ggml rounds them before a product with blocks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from packed_sources import dense_model, write_gguf_of

from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.engine_rounding import engine_rounding, round_to_8_bits, round_to_8_bits_in_256, rounding_of
from ollama_forge.train.load import load_packed
from ollama_forge.train.packed import PackedLinear


def some_numbers(columns: int = 512, rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 3, rows)[:, None]


def test_eight_bits_are_ggmls_q8_0() -> None:
    x = some_numbers()
    blocks = quantize(np.ascontiguousarray(x.numpy()), GGMLType.Q8_0)
    theirs = dequantize(blocks, GGMLType.Q8_0, tuple(x.shape))
    assert torch.equal(round_to_8_bits(x), torch.from_numpy(theirs))


def test_eight_bits_in_256_put_the_farthest_number_at_minus_127_steps() -> None:
    x = some_numbers()
    rounded = round_to_8_bits_in_256(x)
    blocks, before = rounded.unflatten(-1, (-1, 256)), x.unflatten(-1, (-1, 256))
    step = before.abs().amax(-1, keepdim=True) / 127
    assert bool(((blocks - before).abs() <= 0.5001 * step).all())
    assert torch.allclose(blocks / step, (blocks / step).round(), atol=1e-3)


@pytest.mark.parametrize("rounding", [round_to_8_bits, round_to_8_bits_in_256])
def test_zeros_stay_zeros(rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert not bool(rounding(torch.zeros(2, 256)).any())


def test_float32_matrices_take_numbers_as_they_are() -> None:
    assert rounding_of(GGMLType.F32) is None
    assert rounding_of(GGMLType.Q6_K) is round_to_8_bits_in_256
    assert rounding_of(GGMLType.Q4_0) is round_to_8_bits


def test_layers_round_inside_the_block_only(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.Q8_0)
    packed = load_packed(path)
    layer = next(module for module in packed.model.modules() if isinstance(module, PackedLinear))
    x = some_numbers(layer.in_features)
    plain = layer(x)
    with engine_rounding(packed):
        assert torch.equal(layer(x), layer(round_to_8_bits(x)))
        assert not torch.equal(layer(x), plain)
    assert torch.equal(layer(x), plain)


def test_a_tensor_that_was_written_to_is_rounded_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model("llama"), "llama", path, GGMLType.Q8_0)
    packed = load_packed(path)
    layer = next(module for module in packed.model.modules() if isinstance(module, PackedLinear))
    x = some_numbers(layer.in_features)
    with engine_rounding(packed):
        before = layer(x)
        x.mul_(3)
        assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), layer(x.clone()))
    with engine_rounding(packed), torch.inference_mode():
        x = some_numbers(layer.in_features)
        before = layer(x)
        assert torch.equal(layer(x.mul_(1)), before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral", "phi3"])
def test_norms_are_ggmls_to_the_bit_inside_the_block_only(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_of(dense_model(family), family, path, GGMLType.Q8_0)
    packed = load_packed(path)
    norm = packed.model.base_model.norm
    x = some_numbers(norm.weight.numel(), rows=64)
    plain = norm(x)
    numbers, weight = x.numpy(), norm.weight.detach().numpy()
    squares = (numbers * numbers).astype(np.float64).sum(-1, keepdims=True)
    mean = (squares / np.float64(numbers.shape[-1])).astype(np.float32)
    scale = np.float32(1) / np.sqrt(mean + np.float32(norm.variance_epsilon))
    with engine_rounding(packed):
        assert np.array_equal(norm(x).detach().numpy(), numbers * scale * weight)
    assert torch.equal(norm(x), plain)
    assert torch.allclose(norm(x), plain, rtol=1e-5)
