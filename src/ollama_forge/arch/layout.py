"""How the numbers of a tensor are moved between the Hugging Face and the GGUF layout, in both directions.

In: an array (numpy, or anything with numpy's methods) or a row number. Out: the same numbers in the other order. Blocks
of a quantized GGUF tensor never cross rows, so rows can be moved while they are packed: see `source_rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.rows import Transform
from ollama_forge.errors import FormatError

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray


def to_gguf(array: Array, transform: Transform, config: ModelConfig) -> Array:
    """Hugging Face numbers to GGUF numbers; shape [outputs, inputs] or [n]. The dtype stays.

    Raises:
        FormatError: the rows cannot be shared out among the heads.
    """
    if transform is Transform.TRANSPOSE:
        return array.T
    if transform is Transform.ADD_ONE:
        return array + array.dtype.type(1)
    if transform in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
        heads = head_count(array.shape[0], transform, config)
        split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)
    return array


def to_hf(array: Array, transform: Transform, config: ModelConfig) -> Array:
    """GGUF numbers to Hugging Face numbers: the inverse of `to_gguf`.

    Raises:
        FormatError: the rows cannot be shared out among the heads.
    """
    if transform is Transform.TRANSPOSE:
        return array.T
    if transform is Transform.ADD_ONE:
        return array - array.dtype.type(1)
    if transform in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
        heads = head_count(array.shape[0], transform, config)
        split = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
        return split.swapaxes(1, 2).reshape(array.shape)
    return array


def source_rows(n_rows: int, transform: Transform, config: ModelConfig) -> list[int]:
    """For each row of the GGUF tensor, the row of the Hugging Face tensor that it is.

    llama.cpp turns neighbouring pairs, transformers turns the two halves of a head:
    https://github.com/ggml-org/llama.cpp/blob/b6840/convert_hf_to_gguf.py (`permute`).

    Raises:
        FormatError: the rows cannot be shared out among the heads.
    """
    if transform not in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
        return list(range(n_rows))
    heads = head_count(n_rows, transform, config)
    size = n_rows // heads
    return [
        head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
    ]


def hf_shape(shape: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    """The Hugging Face shape of a tensor with this GGUF shape (and the other way round)."""
    return tuple(reversed(shape)) if transform is Transform.TRANSPOSE else shape


def head_count(n_rows: int, transform: Transform, config: ModelConfig) -> int:
    """Number of heads among which the rows of a permuted tensor are shared out.

    Raises:
        FormatError: they cannot be.
    """
    heads = config.n_heads if transform is Transform.PERMUTE_QUERY else config.n_kv_heads
    if n_rows % (2 * heads):
        raise FormatError(
            f"A projection of {n_rows:,} rows cannot be shared out among {heads} heads",
            why="config.json and the weights do not belong together.",
            next="Compare config.json with the one in the model's original repository.",
        )
    return heads
