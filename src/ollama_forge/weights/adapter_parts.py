"""What an adapter consists of: tensors that are read when asked for, pairs of them, and what replaces whole tensors.

In: where bytes lie and how they are encoded. Out: float32 arrays, checked. Which file they come from is known to
`adapter_peft`, `adapter_gguf` and `adapter_ggla`; to which model they belong, to `adapter_fit`.

LoRA (https://arxiv.org/abs/2106.09685): W' = W + scale * B A, with A [rank, inputs] and B [outputs, rank]. Every pair
here is in that form; an embedding is a matrix of [tokens, dimensions], so its "outputs" are tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import AdapterError
from ollama_forge.gguf.native import can_dequantize, dequantize
from ollama_forge.gguf.types import GGMLType, tensor_bytes
from ollama_forge.weights.decode import FLOATS, decode

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class AdapterTensor:
    """One tensor of an adapter.

    Attributes:
        name: as its file spells it.
        stored_shape: row-major, as its file has it.
        encoding: the GGML type, or the dtype's word in safetensors.
        raw: gives its bytes.
        is_transposed: `read` swaps the last two axes.
        index: which matrix of a stack; None when it is no stack.
    """

    name: str
    stored_shape: tuple[int, ...]
    encoding: GGMLType | str
    raw: Callable[[], Any]
    is_transposed: bool = False
    index: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """What `read` gives."""
        shape = self.stored_shape if self.index is None else self.stored_shape[1:]
        return (*shape[:-2], shape[-1], shape[-2]) if self.is_transposed and len(shape) > 1 else shape

    @property
    def encoding_name(self) -> str:
        return self.encoding.name if isinstance(self.encoding, GGMLType) else self.encoding

    def at(self, index: int) -> AdapterTensor:
        """One matrix of a stack."""
        return replace(self, index=index)

    def transposed(self) -> AdapterTensor:
        """The same numbers with the last two axes swapped."""
        return replace(self, is_transposed=not self.is_transposed)

    def read(self) -> Floats:
        """Its numbers, float32, C-contiguous, of `shape`.

        Raises:
            AdapterError: a number that is not finite.
            UnsupportedError: an encoding that cannot be decoded.
        """
        shape = self.stored_shape
        view = memoryview(self.raw()).cast("B")
        if self.index is not None:
            each = len(view) // max(1, shape[0])
            view, shape = view[self.index * each : (self.index + 1) * each], shape[1:]
        if isinstance(self.encoding, GGMLType):
            values = dequantize(view, self.encoding, shape)
        else:
            values = decode(view, self.encoding).astype(np.float32).reshape(shape)
        if not np.isfinite(values).all():
            raise AdapterError(
                f"The adapter's tensor {self.name!r} holds a number that is not finite (NaN or infinity)",
                why="Its training diverged, or the file is damaged; the model would answer with nonsense.",
                next="Take an earlier checkpoint of the training, or train again with a lower learning rate.",
            )
        return np.ascontiguousarray(values.swapaxes(-1, -2) if self.is_transposed else values)


@dataclass(frozen=True, eq=False)
class LoraPair:
    """Two thin matrices whose product changes one weight matrix.

    Attributes:
        target: the matrix, in the vocabulary of the adapter (`model.layers.0.self_attn.q_proj.weight`,
            `blk.0.attn_q.weight`).
        a: [rank, inputs], or [experts, rank, inputs].
        b: [outputs, rank], or [experts, outputs, rank].
        scale: what the product is multiplied with.
        strength: the alpha for which llama.cpp's `alpha / rank` is `scale`.
        magnitude: DoRA's length of each row, [outputs].
        bias: added to the bias of the target, [outputs]; to be multiplied with `scale`.
    """

    target: str
    a: AdapterTensor
    b: AdapterTensor
    scale: float
    strength: float
    magnitude: AdapterTensor | None = None
    bias: AdapterTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it changes."""
        return (*self.b.shape[:-1], self.a.shape[-1])


class ReplacementKind(Enum):
    """Why an adapter carries a whole tensor."""

    TRAINED = "trained"
    BASE_COPY = "base_copy"


@dataclass(frozen=True, eq=False)
class Replacement:
    """A whole tensor that takes the place of the base's own (`modules_to_save`, a trained bias or norm).

    Attributes:
        target: as in `LoraPair`.
        kind: BASE_COPY for what PEFT stores beside a LoRA on an embedding: the base's own matrix.
    """

    target: str
    tensor: AdapterTensor
    kind: ReplacementKind = ReplacementKind.TRAINED


def make_pair(
    target: str,
    a: AdapterTensor,
    b: AdapterTensor,
    alpha: float,
    *,
    divisor: float | None = None,
    is_rank_stabilized: bool = False,
) -> LoraPair:
    """A pair whose shapes are checked and whose scale is known.

    Args:
        alpha: as trained.
        divisor: what alpha is divided by; None: the rank, or its root when rank-stabilized (https://arxiv.org/abs/2312.03732).

    Raises:
        AdapterError: with the tensor that does not fit its partner.
    """
    for tensor in (a, b):
        validate_encoding(tensor)
        if len(tensor.shape) not in (2, 3):
            raise shape_error(tensor, "a matrix is expected")
    rank = a.shape[-2]
    if rank == 0 or b.shape[-1] == 0:
        raise shape_error(a if rank == 0 else b, "its rank is 0: it was saved before its pieces were gathered")
    if b.shape[-1] != rank or a.shape[:-2] != b.shape[:-2]:
        raise AdapterError(
            f"The adapter's tensors {a.name!r} and {b.name!r} do not fit each other",
            why=f"One has rank {rank} (shape {a.shape}), the other rank {b.shape[-1]} (shape {b.shape}).",
            next="Save the adapter again, or get it again from where it was made.",
        )
    if 0 in a.shape or 0 in b.shape:
        raise shape_error(a if 0 in a.shape else b, "it is empty")
    if divisor is None:
        divisor = math.sqrt(rank) if is_rank_stabilized else rank
    scale = alpha / divisor
    if not math.isfinite(scale) or scale == 0:
        raise AdapterError(
            f"The adapter's alpha for {target!r} is {alpha:g}",
            why="The adapter would change nothing, or everything.",
            next="Correct lora_alpha in adapter_config.json; it is usually the rank, or twice the rank.",
        )
    strength = alpha * rank / divisor if divisor != rank else alpha
    return LoraPair(target, a, b, scale, strength)


def validate_encoding(tensor: AdapterTensor) -> None:
    """Refuse numbers that cannot be read, or bytes that are not those of the shape.

    Raises:
        AdapterError: with the tensor's name.
    """
    encoding = tensor.encoding
    readable = can_dequantize(encoding) if isinstance(encoding, GGMLType) else encoding in FLOATS
    if not readable:
        raise AdapterError(
            f"The adapter's tensor {tensor.name!r} holds {tensor.encoding_name} numbers",
            why="Weights are read as floating-point numbers or ggml's blocks.",
            next="Save the adapter in float32, float16 or bfloat16.",
        )
    if isinstance(encoding, GGMLType):
        tensor_bytes(encoding, tensor.stored_shape)


def shape_error(tensor: AdapterTensor, why: str) -> AdapterError:
    """What is said about a tensor of an impossible shape."""
    return AdapterError(
        f"The adapter's tensor {tensor.name!r} has the shape {tensor.shape}: {why}",
        why="Such a file comes from training on several devices whose parts were not joined, or it is damaged.",
        next="Save the adapter again with all its parts gathered.",
    )
