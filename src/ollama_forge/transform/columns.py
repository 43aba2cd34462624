"""Edit what a matrix gives, along its output: all rows of some columns at a time, and the rounding steered there.

In: a stored matrix [rows, columns] (or a stack) and an `OutputEdit`. Out: its encoded bytes. A change along one output
direction is spread over all rows, a little on each, and plain rounding would take every little back to where it was. So
the error that the stored weights make along the direction is fed back: some of them go to their other neighbour, those
where that moves the output most, until column by column the stored matrix gives along the direction what was wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.types import GGMLType, block_bytes, block_elements, is_quantized, row_bytes
from ollama_forge.transform.edits import Floats, LossMeter, OutputEdit, require_finite
from ollama_forge.transform.steering import (
    FLOAT_GOAL,
    FLOAT_ROUNDS,
    PACKED_GOAL,
    PACKED_ROUNDS,
    Push,
    half_step,
    most_error,
)

Bytes = NDArray[np.uint8]

SLAB_ELEMENTS = 1 << 20
_LARGEST_F16 = 65504.0


def edit_outputs(
    view: memoryview,
    type: GGMLType,
    shape: Sequence[int],
    edit: OutputEdit,
    meter: LossMeter,
    *,
    importance: Floats | None = None,
    n_threads: int | None = None,
) -> Iterator[Bytes]:
    """The new bytes of each matrix of a stack; a plain matrix is a stack of one.

    Besides one encoded matrix a few arrays of `SLAB_ELEMENTS` numbers exist at a time.

    Args:
        view: the stored bytes.
        shape: [rows, columns] or [matrices, rows, columns].
        importance: of the columns, float32 [columns] or one after the other for each matrix.

    Raises:
        GGUFError: a result that its type cannot hold.
    """
    n_rows, n_columns = shape[-2], shape[-1]
    basis = edit.outputs() if edit.outputs is not None else None
    change = edit.open()
    for matrix in range(count_matrices(shape)):
        out = np.empty((n_rows, row_bytes(type, n_columns)), np.uint8)
        for slab in iter_slabs(view, type, shape, matrix, n_threads):
            n = slab.values.shape[1]
            wanted = np.ascontiguousarray(change(matrix, slab.first, slab.values), dtype=np.float32)
            _require_storable(wanted, type, edit.name)
            weights = None
            if importance is not None:
                start = matrix % (importance.size // n_columns) * n_columns + slab.first
                weights = importance[start : start + n]
            encoded, stored = _Rounding(type, basis, weights, n_threads).store(wanted, slab.values)
            out[:, slab.place] = encoded
            meter.add(slab.values, wanted, stored)
        yield out.reshape(-1)


@dataclass(frozen=True, eq=False)
class Slab:
    """Some columns of a matrix: the first one's number, where their bytes lie in each row, and their numbers."""

    first: int
    place: slice
    values: Floats


def count_matrices(shape: Sequence[int]) -> int:
    """How many matrices a tensor of that shape holds."""
    return int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1


def iter_slabs(
    view: memoryview, type: GGMLType, shape: Sequence[int], matrix: int, n_threads: int | None = None
) -> Iterator[Slab]:
    """One matrix of a stack, decoded some columns at a time; no slab cuts a block."""
    n_rows, n_columns = shape[-2], shape[-1]
    stride = row_bytes(type, n_columns)
    step, step_bytes = block_elements(type), block_bytes(type)
    width = max(step, SLAB_ELEMENTS // max(1, n_rows) // step * step)
    raw = np.frombuffer(view[matrix * n_rows * stride : (matrix + 1) * n_rows * stride], np.uint8)
    raw = raw.reshape(n_rows, stride)
    for first in range(0, n_columns, width):
        n = min(width, n_columns - first)
        place = slice(first // step * step_bytes, (first + n) // step * step_bytes)
        yield Slab(
            first, place, dequantize(np.ascontiguousarray(raw[:, place]), type, (n_rows, n), n_threads=n_threads)
        )


def _require_storable(wanted: Floats, type: GGMLType, name: str) -> None:
    require_finite(wanted, name)
    if type is GGMLType.F16 and float(np.abs(wanted).max(initial=0.0)) > _LARGEST_F16:
        raise GGUFError(
            f"{name!r} would hold a weight beyond {_LARGEST_F16:g}, the largest that F16 has",
            why="The change is far too strong.",
            next="Use a smaller strength.",
        )


@dataclass(frozen=True, eq=False)
class _Rounding:
    """How some columns of a matrix are put into their type. `basis` [k, rows] is orthonormal."""

    type: GGMLType
    basis: Floats | None
    weights: Floats | None
    n_threads: int | None

    def store(self, wanted: Floats, before: Floats) -> tuple[Bytes, Floats]:
        """(encoded, what it decodes to), both with the rows of `wanted`."""
        encoded, stored = self._encode(wanted, self.weights)
        if self.basis is not None and self.type is not GGMLType.F32:
            self._steer(self.basis, wanted, before, encoded, stored)
        return encoded, stored

    def _encode(self, rows: Floats, weights: Floats | None) -> tuple[Bytes, Floats]:
        encoded = quantize(rows, self.type, weights, n_threads=self.n_threads)
        return encoded, dequantize(encoded, self.type, rows.shape, n_threads=self.n_threads)

    def _steer(self, basis: Floats, wanted: Floats, before: Floats, encoded: Bytes, stored: Floats) -> None:
        """Change `encoded` and `stored` where that brings the output nearer to what was wanted."""
        packed = is_quantized(self.type)
        group = block_elements(self.type)
        difference = wanted - stored
        error = basis @ difference
        goal = (PACKED_GOAL if packed else FLOAT_GOAL) ** 2 * _by_group(basis @ (wanted - before), group)
        smallest = _by_group(error, group)
        chosen = _strongest_rows(basis, packed)
        lever, target = basis[:, chosen], wanted[chosen]
        # What the other rows add to the error, and what all rows may cost together.
        others = error - lever @ difference[chosen]
        spent = most = np.zeros_like(smallest)
        if packed:
            plain = _by_group(difference, group)
            spent = plain - _by_group(difference[chosen], group)
            most = most_error(_by_group(wanted, group), plain, self.type)
        inverse = np.linalg.pinv(lever @ lever.T)
        correction = np.zeros_like(error)
        jump = half_step(_by_group(target, 1), len(chosen), self.type)[:, None] / np.abs(lever).max(axis=1)
        push = Push((inverse @ error).T, jump)
        for _ in range(PACKED_ROUNDS if packed else FLOAT_ROUNDS):
            groups = np.flatnonzero(smallest > goal)
            if not groups.size:
                break
            columns = (groups[:, None] * group + np.arange(group)).reshape(-1)
            missing = error[:, columns]
            correction[:, columns] += push.next(columns, missing.T).T if packed else inverse @ missing
            pushed = np.ascontiguousarray(target[:, columns] + lever.T @ correction[:, columns], dtype=np.float32)
            weights = None if self.weights is None else np.ascontiguousarray(self.weights[columns])
            tried, decoded = self._encode(pushed, weights)
            missed = target[:, columns] - decoded
            error[:, columns] = others[:, columns] + lever @ missed
            size = _by_group(error[:, columns], group)
            better = size < smallest[groups]
            if packed:
                better &= spent[groups] + _by_group(missed, group) <= most[groups]
            smallest[groups[better]] = size[better]
            self._keep(chosen, columns, np.repeat(better, group), tried, decoded, encoded, stored)

    def _keep(
        self,
        rows: NDArray[np.intp],
        columns: NDArray[np.intp],
        better: NDArray[np.bool_],
        tried: Bytes,
        decoded: Floats,
        encoded: Bytes,
        stored: Floats,
    ) -> None:
        """Take over the columns in `better` of what was tried."""
        stored[rows[:, None], columns[better]] = decoded[:, better]
        step, step_bytes = block_elements(self.type), block_bytes(self.type)
        blocks = encoded.reshape(len(encoded), -1, step_bytes)
        new = tried.reshape(len(tried), -1, step_bytes)
        kept = better[::step]
        blocks[rows[:, None], columns[::step][kept] // step] = new[:, kept]


def _strongest_rows(basis: Floats, packed: bool) -> NDArray[np.intp]:
    """The rows that move the output most; moving only those keeps the others, and most of the work, as they are."""
    n_rows = basis.shape[1]
    n_chosen = max(n_rows // 4, min(n_rows, 256)) if packed else min(n_rows, max(64, 16 * len(basis)))
    leverage = np.einsum("ij,ij->j", basis, basis)
    return np.sort(np.argsort(-leverage, kind="stable")[:n_chosen])


def _by_group(values: Any, group: int) -> NDArray[np.float64]:
    """Sums of squares over all rows and the columns of each group: [rows, columns] -> [columns / group]."""
    by_column = np.einsum("ij,ij->j", values, values).astype(np.float64)
    result: NDArray[np.float64] = by_column.reshape(-1, group).sum(axis=1)
    return result
