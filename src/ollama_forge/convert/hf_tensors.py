"""The tensors of a Hugging Face folder, made from a GGUF file a few rows at a time.

In: an open checkpoint over GGUF. Out: entries for `weights.safetensors_writer`, under transformers' names and in its
layout. Bytes that need no arithmetic are never turned into numbers. `convert.to_hf` decides which dtype each gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.arch import layout
from ollama_forge.arch.rows import Transform
from ollama_forge.errors import GGUFError
from ollama_forge.gguf import native
from ollama_forge.gguf.types import GGMLType, row_bytes
from ollama_forge.weights.checkpoint import Checkpoint, StoredTensor
from ollama_forge.weights.decode import SAME_BYTES
from ollama_forge.weights.safetensors_writer import SafetensorsEntry

Array = NDArray[Any]
Floats = NDArray[np.float32]

PIECE_ELEMENTS = 1 << 21
_PERMUTED = (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY)
_INFINITE_HALF = 0x7C00
_LARGEST_HALF = 65504.0
_LOW_BITS = np.uint32(0xFFFF)


@dataclass(frozen=True, eq=False)
class HFTensor:
    """One tensor of the folder.

    Attributes:
        stored: the GGUF tensor that it comes from, or one expert's part of it.
        dtype: `F32`, `F16` or `BF16`.
    """

    checkpoint: Checkpoint
    stored: StoredTensor
    dtype: str
    n_threads: int | None = None

    @property
    def type(self) -> GGMLType:
        """The encoding in the GGUF file."""
        encoding = self.stored.spec.encoding
        assert isinstance(encoding, GGMLType)
        return encoding

    def entry(self) -> SafetensorsEntry:
        """The tensor as it will be written."""
        shape = layout.hf_shape(self.stored.spec.shape, self.stored.row.transform)
        return SafetensorsEntry(self.stored.hf_name, shape, self.dtype, self.chunks)

    def chunks(self) -> Iterator[Any]:
        """All bytes in order; memory goes back to the system on the way.

        Raises:
            GGUFError: a number that the dtype cannot hold, with the tensor's name.
            UnsupportedError: an encoding that cannot be decoded here.
        """
        if self._transform is Transform.TRANSPOSE:
            yield from self._transposed()
            return
        is_verbatim = self._keeps_bytes and self._transform is Transform.NONE
        for first, n_rows in self._pieces():
            yield self._raw(first, n_rows) if is_verbatim else self._encode(self._moved(first, n_rows))
            self.checkpoint.release(self.stored)

    def fits(self, dtype: str) -> bool:
        """Whether every number is one that the dtype holds exactly."""
        for first, n_rows in self._pieces():
            values = self._floats(first, n_rows)
            is_exact = _is_exact(values - 1 if self._transform is Transform.ADD_ONE else values, dtype)
            self.checkpoint.release(self.stored)
            if not is_exact:
                return False
        return True

    @property
    def _transform(self) -> Transform:
        return self.stored.row.transform

    @property
    def _keeps_bytes(self) -> bool:
        """Whether numbers stay as they are stored."""
        return SAME_BYTES[self.dtype] is self.type and self._transform is not Transform.ADD_ONE

    @property
    def _n_columns(self) -> int:
        """Length of a row of the GGUF tensor; a permuted vector is a column."""
        shape = self.stored.spec.shape
        if len(shape) < 2:
            return 1 if self._transform in _PERMUTED else math.prod(shape)
        return shape[-1]

    @property
    def _n_rows(self) -> int:
        return math.prod(self.stored.spec.shape) // max(1, self._n_columns)

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(first row, number of rows) of each piece; those of permuted tensors hold whole heads."""
        unit = 1
        if self._transform in _PERMUTED:
            unit = self._n_rows // layout.head_count(self._n_rows, self._transform, self.checkpoint.config)
        step = max(1, PIECE_ELEMENTS // max(1, self._n_columns * unit)) * unit
        for first in range(0, self._n_rows, step):
            yield first, min(step, self._n_rows - first)

    def _raw(self, first: int, n_rows: int) -> memoryview:
        stride = row_bytes(self.type, self._n_columns)
        return self.checkpoint.read_raw(self.stored)[first * stride : (first + n_rows) * stride]

    def _floats(self, first: int, n_rows: int) -> Floats:
        shape = (n_rows, self._n_columns)
        return native.dequantize(self._raw(first, n_rows), self.type, shape, n_threads=self.n_threads)

    def _stored_rows(self, first: int, n_rows: int) -> Array:
        """Rows in GGUF's order: float32, or unsigned integers where bytes are kept."""
        if not self._keeps_bytes:
            return self._floats(first, n_rows)
        width = 4 if self.type is GGMLType.F32 else 2
        return np.frombuffer(self._raw(first, n_rows), f"<u{width}").reshape(n_rows, self._n_columns)

    def _moved(self, first: int, n_rows: int) -> Array:
        """Rows in transformers' order and meaning."""
        rows = self._stored_rows(first, n_rows)
        if self._transform is Transform.ADD_ONE:
            return rows - np.float32(1)
        if self._transform not in _PERMUTED:
            return rows
        size = self._n_rows // layout.head_count(self._n_rows, self._transform, self.checkpoint.config)
        pairs = rows.reshape(n_rows // size, size // 2, 2, self._n_columns).swapaxes(1, 2)
        return pairs.reshape(n_rows, self._n_columns)

    def _transposed(self) -> Iterator[Any]:
        """Columns as rows. The whole matrix is decoded at once: each of its rows has a part of every row to come."""
        columns = self._stored_rows(0, self._n_rows).T
        step = max(1, PIECE_ELEMENTS // max(1, self._n_rows))
        for first in range(0, self._n_columns, step):
            yield self._encode(columns[first : first + step])
        self.checkpoint.release(self.stored)

    def _encode(self, rows: Array) -> Array:
        rows = np.ascontiguousarray(rows)
        if self._keeps_bytes or self.dtype == "F32":
            return rows.reshape(-1).view(np.uint8)
        encoded = native.quantize(rows, SAME_BYTES[self.dtype], n_threads=self.n_threads).reshape(-1)
        if self.dtype == "F16" and (encoded.view("<u2") & 0x7FFF == _INFINITE_HALF).any():
            largest = float(np.abs(rows).max())
            if math.isfinite(largest):
                raise GGUFError(
                    f"{self.stored.gguf_name!r} holds a weight beyond {_LARGEST_HALF:g} ({largest:g})",
                    why="F16 has no larger numbers; the weight would become infinite.",
                    next="Choose --dtype bf16, which has the range of f32.",
                )
        return encoded


def _is_exact(values: Floats, dtype: str) -> bool:
    if dtype == "BF16":
        return not (values.view(np.uint32) & _LOW_BITS).any()
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16).astype(np.float32) == values).all())
