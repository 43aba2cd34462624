"""The rounding of llama.cpp's matrix products, in packed layers: what numbers are rounded to before they meet blocks.

llama.cpp does not multiply a quantized matrix by float32: on the processor it first rounds each row of numbers to the
type that the matrix's product wants (ggml's `vec_dot_type`): 8-bit integers with a scale for 32 or 256 numbers, or 16
bits. For matrices of 8 bits this rounding costs about as much as the quantization itself, so a measurement without it
is not what a person gets who runs the model.

In: a packed model. Out: the same model whose layers round what they are given, as long as a block runs. Facts: ggml,
src/ggml-cpu/ggml-cpu.c (type_traits_cpu), src/ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q8_K_ref) and
src/ggml-cpu/ops.cpp (ggml_compute_forward_rms_norm_f32), b11549.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedLinear

Rounding = Callable[[torch.Tensor], torch.Tensor]

_SMALL_BLOCK = 32
_PLAIN_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Qwen3MoeRMSNorm", "Phi3RMSNorm")
_LARGE_BLOCK = 256


def round_to_8_bits(x: torch.Tensor) -> torch.Tensor:
    """ggml's Q8_0: blocks of 32 numbers, each a multiple of the largest over 127, that step kept in 16 bits.

    Args:
        x: float [..., columns], columns a multiple of 32.
    """
    blocks = x.float().unflatten(-1, (-1, _SMALL_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (torch.round(blocks * inverse) * (largest / 127.0).half().float()).flatten(-2)


def round_to_8_bits_in_256(x: torch.Tensor) -> torch.Tensor:
    """ggml's Q8_K: blocks of 256 numbers, steps such that the number that lies farthest from 0 becomes -127.

    Args:
        x: float [..., columns], columns a multiple of 256.
    """
    blocks = x.float().unflatten(-1, (-1, _LARGE_BLOCK))
    farthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    inverse = torch.where(farthest != 0, -127.0 / farthest, 0.0)
    step = torch.where(farthest != 0, 1.0 / inverse, 0.0)
    return (torch.round(blocks * inverse).clamp_(max=127) * step).flatten(-2)


def _round_to_half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


def _round_to_bfloat(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


_SMALL = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4", "Q1_0")


def rounding_of(type: GGMLType) -> Rounding | None:
    """What is done to the numbers before they meet a matrix of this type; None for float32."""
    if type is GGMLType.F32:
        return None
    if type is GGMLType.F16:
        return _round_to_half
    if type is GGMLType.BF16:
        return _round_to_bfloat
    return round_to_8_bits if type.name in _SMALL else round_to_8_bits_in_256


@contextlib.contextmanager
def engine_rounding(packed: PackedModel) -> Iterator[None]:
    """Inside the block every packed linear layer rounds its input as llama.cpp does on the processor."""
    with contextlib.ExitStack() as undo:
        last = _LastRounded()
        for module in packed.model.modules():
            if isinstance(module, PackedLinear):
                rounding = rounding_of(module.matrix.type)
                if rounding is not None:
                    undo.callback(module.register_forward_pre_hook(_hook(rounding, last)).remove)
            elif type(module).__name__ in _PLAIN_NORMS:
                undo.callback(module.register_forward_hook(_normed).remove)
        yield


def _normed(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """The norm with ggml's own roundings, to the bit: what follows is rounded to 8 bits, and numbers half-way between
    two steps go where the last bit of the norm sends them, a whole row at once."""
    x, norm = inputs[0].float(), cast(Any, module)
    mean = ((x * x).double().sum(-1, keepdim=True) / x.shape[-1]).float()
    root = (mean + norm.variance_epsilon).double().sqrt().float()  # torch's float32 root is not the nearest number
    scaled: torch.Tensor = x * (1.0 / root) * norm.weight
    return scaled.to(output.dtype)


class _LastRounded:
    """What was rounded last: query, key and value, gate and up are given the very same tensor."""

    def __init__(self) -> None:
        self._key: tuple[torch.Tensor, int, Rounding] | None = None
        self._rounded = torch.empty(0)

    def round(self, x: torch.Tensor, rounding: Rounding) -> torch.Tensor:
        if x.is_inference():
            return rounding(x).to(x.dtype)
        # a tensor that was written to since has another version (those of inference mode have none)
        key = self._key
        if key is None or key[0] is not x or key[1:] != (x._version, rounding):
            self._key = x, x._version, rounding
            self._rounded = rounding(x).to(x.dtype)
        return self._rounded


def _hook(rounding: Rounding, last: _LastRounded) -> Callable[..., Any]:
    def rounded(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (last.round(inputs[0], rounding), *inputs[1:])

    return rounded
