"""The bytes of one GGUF tensor, made a few rows at a time from the safetensors that hold it.

In: where the numbers lie and what has to happen to them. Out: encoded rows, in bounded memory. Bytes that need no
arithmetic are never turned into numbers. Which tensor becomes what is decided in `convert.tensors`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.arch import layout
from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.rows import Transform
from ollama_forge.errors import GGUFError
from ollama_forge.gguf import native
from ollama_forge.gguf.finite import require_finite
from ollama_forge.gguf.types import GGMLType, row_bytes
from ollama_forge.weights.decode import SAME_BYTES, Scale, decode, scale_rows
from ollama_forge.weights.safetensors import SafetensorsFolder, SafetensorsTensor

Array = NDArray[Any]

CHUNK_BYTES = 1 << 23
_INFINITE_HALF = 0x7C00


@dataclass(frozen=True)
class Piece:
    """Some rows of one matrix (or vector) of a checkpoint, in the Hugging Face layout.

    Attributes:
        tensor: where it lies.
        first_row, n_rows: which rows, when the tensor is seen as a matrix of its last axis.
        n_columns: length of its last axis.
        scale: what FP8 is multiplied with.
    """

    tensor: SafetensorsTensor
    first_row: int
    n_rows: int
    n_columns: int
    scale: Scale | None = None


@dataclass(frozen=True)
class Recipe:
    """How the rows of a GGUF tensor are made: those of the first piece, of the second, ..., transformed and encoded.

    Attributes:
        name: of the GGUF tensor.
        type: of the rows.
        pieces: all of one shape; experts are several, everything else is one.
        transform: applied to each piece.
        config: says how rows are shared out among heads.
    """

    folder: SafetensorsFolder
    name: str
    type: GGMLType
    pieces: tuple[Piece, ...]
    transform: Transform
    config: ModelConfig
    n_threads: int | None = None

    @property
    def rows_per_piece(self) -> int:
        """Rows of the GGUF tensor that one piece gives."""
        piece = self.pieces[0]
        return piece.n_columns if self.transform is Transform.TRANSPOSE else piece.n_rows

    @property
    def n_columns(self) -> int:
        """Length of a row of the GGUF tensor."""
        piece = self.pieces[0]
        return piece.n_rows if self.transform is Transform.TRANSPOSE else piece.n_columns

    def chunks(self) -> Iterator[Any]:
        """All bytes of the tensor in order; memory goes back to the system on the way.

        Raises:
            GGUFError: a weight that is not a finite number, or that the type cannot hold, with the tensor's name.
        """
        step = max(1, CHUNK_BYTES // max(1, row_bytes(self.type, self.n_columns)))
        for number, piece in enumerate(self.pieces):
            for first in range(0, self.rows_per_piece, step):
                n_rows = min(step, self.rows_per_piece - first)
                encoded = self.read_rows(number * self.rows_per_piece + first, n_rows, self.n_threads)
                require_finite(encoded, self.type, self.name)
                yield encoded
                self._release_rows(piece, first, n_rows)
            self.folder.release(piece.tensor.name)

    def read_rows(self, first: int, n_rows: int, n_threads: int | None = 1) -> Any:
        """Encoded rows as a buffer, counted through all pieces; a call must not cross from one piece to the next.

        Raises:
            GGUFError: a number that the type cannot hold.
        """
        number, first = divmod(first, self.rows_per_piece)
        piece = self.pieces[number]
        if self._is_verbatim:
            return self._raw(piece, first, n_rows)
        rows = self._moved_rows(piece, first, n_rows, n_threads)
        if self._keeps_bytes:
            return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if self.type is GGMLType.F32:
            return rows.reshape(-1).view(np.uint8)
        return self._encode(rows, n_threads).reshape(-1)

    def release(self) -> None:
        """Give back the memory of all pieces."""
        for piece in self.pieces:
            self.folder.release(piece.tensor.name)

    @cached_property
    def _keeps_bytes(self) -> bool:
        """Whether numbers stay as they are stored."""
        return self.transform is not Transform.ADD_ONE and all(
            piece.scale is None and SAME_BYTES.get(piece.tensor.dtype) is self.type for piece in self.pieces
        )

    @cached_property
    def _is_verbatim(self) -> bool:
        """Whether rows stay where they are, too."""
        return self._keeps_bytes and self.transform is Transform.NONE

    @cached_property
    def _head_rows(self) -> int:
        n_rows = self.pieces[0].n_rows
        return n_rows // layout.head_count(n_rows, self.transform, self.config)

    def _encode(self, rows: NDArray[np.float32], n_threads: int | None) -> NDArray[np.uint8]:
        try:
            encoded = native.quantize(rows, self.type, n_threads=n_threads)
        except GGUFError as exc:
            raise GGUFError(
                f"{self.name!r} cannot become {self.type.name}: {exc.what}", why=exc.why, next=exc.next
            ) from exc
        if self.type is GGMLType.F16:
            largest = np.abs(rows).max(initial=0.0)
            if largest > native.MAX_WEIGHT and (encoded.view("<u2") & 0x7FFF == _INFINITE_HALF).any():
                raise GGUFError(
                    f"{self.name!r} cannot become F16: it holds a weight beyond 65504 ({largest:g})",
                    why="F16 has no larger numbers; the weight would become infinite.",
                    next="Choose --outtype bf16, which has the range of f32.",
                )
        return encoded

    def _moved_rows(self, piece: Piece, first: int, n_rows: int, n_threads: int | None) -> Array:
        """Rows of the GGUF tensor as float16 or float32, or as unsigned integers where bytes are kept."""
        if self.transform is Transform.TRANSPOSE:
            return self._decoded(piece, 0, piece.n_rows, slice(first, first + n_rows), n_threads).T
        if self.transform in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
            size = self._head_rows
            start, stop = first // size * size, -(-(first + n_rows) // size) * size
            heads = self._decoded(piece, start, stop - start, slice(None), n_threads)
            pairs = heads.reshape((stop - start) // size, 2, size // 2, piece.n_columns).swapaxes(1, 2)
            return pairs.reshape(stop - start, piece.n_columns)[first - start : first - start + n_rows]
        return layout.to_gguf(self._decoded(piece, first, n_rows, slice(None), n_threads), self.transform, self.config)

    def _decoded(self, piece: Piece, first: int, n_rows: int, columns: slice, n_threads: int | None) -> Array:
        """Rows of a piece in the Hugging Face layout, [n_rows, columns]."""
        raw = self._raw(piece, first, n_rows)
        shape = (n_rows, piece.n_columns)
        if self._keeps_bytes:
            return np.frombuffer(raw, f"<u{_width(piece.tensor)}").reshape(shape)[:, columns]
        rows = decode(raw, piece.tensor.dtype, n_threads).reshape(shape)
        if piece.scale is not None:
            matrix_shape = (piece.tensor.shape[-2], piece.tensor.shape[-1])
            start = piece.first_row + first
            rows = rows * scale_rows(self.folder, piece.scale, matrix_shape, start, start + n_rows)
        return rows[:, columns]

    def _raw(self, piece: Piece, first: int, n_rows: int) -> memoryview:
        stride = piece.n_columns * _width(piece.tensor)
        start = (piece.first_row + first) * stride
        return self.folder.read(piece.tensor.name)[start : start + n_rows * stride]

    def _release_rows(self, piece: Piece, first: int, n_rows: int) -> None:
        if self.transform is not Transform.TRANSPOSE:
            stride = piece.n_columns * _width(piece.tensor)
            start = (piece.first_row + first) * stride
            self.folder.release(piece.tensor.name, start, start + n_rows * stride)


def _width(tensor: SafetensorsTensor) -> int:
    """Bytes of one element."""
    return tensor.nbytes // max(1, math.prod(tensor.shape))
