"""Projections become edits of stored tensors, whichever way the file holds them.

In: an open checkpoint and what is to happen to each tensor that writes the residual stream. Out: one edit for each
stored tensor: an `OutputEdit` where the stream runs along the rows, a `TensorEdit` where it runs along the columns
(embeddings, biases, matrices that a family stores [inputs, outputs]).

Keeping the norm of rows and taking a direction out disagree: each undoes a little of the other. So the rows are scaled
back after the projection, and then the direction is taken out once more: it is gone exactly, and what is left of the
difference in norm is of second order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.types import GGMLType, row_bytes
from ollama_forge.transform.directions import Floats
from ollama_forge.transform.edits import OutputEdit, OutputShift, TensorEdit
from ollama_forge.transform.outputs import StoredRows, count_matrices
from ollama_forge.transform.projection import Part, Projection
from ollama_forge.transform.steering import squares
from ollama_forge.transform.thin import along_rows, spread_columns, spread_rows
from ollama_forge.weights.checkpoint import Checkpoint
from ollama_forge.weights.decode import SAME_BYTES

PIECE_ELEMENTS = 1 << 20
LARGEST_SCALE = 2.0
"""A row that lies mostly along the direction is not blown up beyond this."""


def plan_edits(
    checkpoint: Checkpoint, projections: Sequence[Projection], *, norm_preserving: bool = False
) -> Iterator[TensorEdit | OutputEdit]:
    """One edit for each stored tensor; the experts of a stack share one.

    Raises:
        UnsupportedError: numbers of a kind that is not edited.
    """
    seen = set()
    for item in projections:
        name = item.tensor.spec.name
        if name in seen:
            continue
        seen.add(name)
        yield _edit_of(StoredMatrix.of(checkpoint, name), item, norm_preserving)


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A tensor as its file holds it: shape of the whole stack, encoding, and how to read its bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    read: Callable[[], memoryview]
    release: Callable[[], None]

    @staticmethod
    def of(checkpoint: Checkpoint, name: str) -> StoredMatrix:
        """The tensor of that name.

        Raises:
            UnsupportedError: a dtype of safetensors that is not edited.
        """
        if checkpoint.gguf is not None:
            file = checkpoint.gguf
            tensor = file.find_tensor(name)
            return StoredMatrix(
                name, tensor.shape, tensor.type, lambda: file.read(name), functools.partial(file.release, name)
            )
        folder = checkpoint.folder
        assert folder is not None
        entry = folder.find_tensor(name)
        encoding = SAME_BYTES.get(entry.dtype)
        if encoding is None:
            raise UnsupportedError(
                f"{name!r} holds {entry.dtype} numbers, which cannot be edited",
                why="Edited tensors go back into their own type, and F32, F16 and BF16 are written.",
                next="Convert the folder to GGUF first: ollama-forge convert FOLDER -o model.gguf",
            )
        return StoredMatrix(
            name, entry.shape, encoding, lambda: folder.read(name), functools.partial(folder.release, name)
        )

    def iter_rows(self, n_threads: int | None = None) -> Iterator[tuple[int, Floats]]:
        """(first row, rows), a piece at a time; rows are counted through all leading axes, a vector is one row."""
        n_columns = self.shape[-1] if self.shape else 1
        stride = row_bytes(self.type, n_columns)
        total = math.prod(self.shape[:-1])
        at_once = max(1, PIECE_ELEMENTS // max(1, n_columns))
        view = self.read()
        for first in range(0, total, at_once):
            n = min(at_once, total - first)
            raw = view[first * stride : (first + n) * stride]
            yield first, dequantize(raw, self.type, (n, n_columns), n_threads=n_threads)
        self.release()


def _edit_of(stored: StoredMatrix, item: Projection, norm_preserving: bool) -> TensorEdit | OutputEdit:
    basis, strength = item.basis, np.float32(item.strength)

    def directions() -> Floats:
        return basis

    if item.axis == -2:

        def open_outputs() -> _OutputProjection:
            scales = _row_scales(stored, basis, strength) if norm_preserving else None
            return _OutputProjection(basis, strength, scales)

        return OutputEdit(stored.name, open_outputs, directions)

    def open_rows() -> _RowProjection:
        is_matrix = len(stored.shape) > 1
        if norm_preserving and is_matrix and item.part is not Part.EMBEDDING:
            return _RowProjection(basis, strength, _column_scales(stored, basis, strength))
        return _RowProjection(basis, strength, keeps_length=norm_preserving and is_matrix)

    return TensorEdit(stored.name, open_rows, directions, is_precise=True)


class _OutputProjection:
    """S (W - s B^T (B W)), and B once more taken out of that; S = diag(scales) keeps the norm of rows, or is left out.

    Args:
        scales: [matrices, rows].
    """

    def __init__(self, basis: Floats, strength: np.float32, scales: Floats | None) -> None:
        self._basis = basis
        self._strength = strength
        self._scales = scales

    def probes(self, matrix: int) -> Floats:
        """B, and with scales B S."""
        if self._scales is None:
            return self._basis
        return np.concatenate([self._basis, self._basis * self._scales[matrix]])

    def settle(self, matrix: int, sums: Floats) -> OutputShift:
        """What to add along B, and with scales along B S, too."""
        basis, count = self._basis, len(self._basis)
        along = self._strength * sums[:count]
        if self._scales is None:
            return OutputShift(basis, -along, seen=sums)
        scales = self._scales[matrix]
        scaled = basis * scales
        excess = sums[count:] - np.einsum("kr,lr->kl", scaled, basis) @ along - (1 - self._strength) * sums[:count]
        return OutputShift(np.concatenate([scaled, basis]), -np.concatenate([along, excess]), scales)


class _RowProjection:
    """x - s (x B^T) B, for rows x. With `scales` [columns] columns keep their norm, with `keeps_length` each row."""

    def __init__(
        self, basis: Floats, strength: np.float32, scales: Floats | None = None, *, keeps_length: bool = False
    ) -> None:
        self._basis = basis
        self._strength = strength
        self._scales = scales
        self._keeps_length = keeps_length

    def __call__(self, first: int, rows: Floats) -> Floats:
        along = along_rows(rows, self._basis)
        result: NDArray[Any] = rows - spread_rows(self._strength * along, self._basis)
        if self._keeps_length:
            result *= _ratio(squares(rows), squares(result))[:, None]
        if self._scales is not None:
            result *= self._scales  # [columns]
            excess = along_rows(result, self._basis) - (1 - self._strength) * along
            result -= spread_rows(excess, self._basis)
        return result


def _row_scales(stored: StoredMatrix, basis: Floats, strength: np.float32) -> Floats:
    """What each row must be multiplied with after the projection to have its norm again: [matrices, rows]."""
    change = _OutputProjection(basis, strength, None)
    n_matrices, n_rows = count_matrices(stored.shape), stored.shape[-2]
    before, after = np.zeros((n_matrices, n_rows)), np.zeros((n_matrices, n_rows))
    view = stored.read()
    for matrix in range(n_matrices):
        rows = StoredRows.of(view, stored.type, stored.shape, matrix)
        along = change.settle(matrix, rows.sum_along(basis)).along
        for tile in rows.tiles(range(n_rows)):
            values = rows.decode(tile)
            before[matrix, tile] = squares(values)
            after[matrix, tile] = squares(values + spread_columns(basis[:, tile], along))
    return _ratio(before, after)


def _column_scales(stored: StoredMatrix, basis: Floats, strength: np.float32) -> Floats:
    """The same for a matrix that is stored [inputs, outputs]: [columns]."""
    change = _RowProjection(basis, strength)
    before, after = np.zeros(stored.shape[-1]), np.zeros(stored.shape[-1])
    for first, rows in stored.iter_rows():
        before += squares(rows.T)
        after += squares(change(first, rows).T)
    return _ratio(before, after)


def _ratio(before: NDArray[np.float64], after: NDArray[np.float64]) -> Floats:
    ratio = np.sqrt(before / np.where(after > 0, after, 1))
    result: Floats = np.where(after > 0, np.clip(ratio, 1 / LARGEST_SCALE, LARGEST_SCALE), 1).astype(np.float32)
    return result
