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
    SLAB_ELEMENTS,
    Push,
    half_step,
    most_error,
    run_slabs,
)
from ollama_forge.transform.thin import along_columns, spread_columns

Bytes = NDArray[np.uint8]

_LEAST_COLUMNS = 256  # a multiple of every block; with fewer, numpy spends its time between the rows
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

    Besides one encoded matrix each thread has a few arrays of `SLAB_ELEMENTS` numbers.

    Args:
        view: the stored bytes.
        shape: [rows, columns] or [matrices, rows, columns].
        importance: of the columns, float32 [columns] or one after the other for each matrix.

    Raises:
        GGUFError: a result that its type cannot hold.
    """
    n_rows, n_columns = shape[-2], shape[-1]
    rounding = _Rounding(type, _Lever.of(edit.outputs(), type) if edit.outputs is not None else None)
    change = edit.open()
    for matrix in range(count_matrices(shape)):
        raw = _matrix_bytes(view, type, shape, matrix)
        out = np.empty((n_rows, row_bytes(type, n_columns)), np.uint8)
        start = 0 if importance is None else matrix % (importance.size // n_columns) * n_columns

        def work(columns: range, matrix: int = matrix, raw: Bytes = raw, out: Bytes = out, start: int = start) -> None:
            before = _decode(raw, type, columns)
            wanted = np.ascontiguousarray(change(matrix, columns.start, before), dtype=np.float32)
            _require_storable(wanted, type, edit.name)
            weights = None if importance is None else importance[start + columns.start : start + columns.stop]
            encoded, stored = rounding.store(wanted, before, weights)
            out[:, _place(type, columns)] = encoded
            meter.add(before, wanted, stored)

        slabs = slabs_of(shape, type)
        run_slabs(work, slabs, n_rows * len(slabs[0]), n_threads)
        yield out.reshape(-1)


def count_matrices(shape: Sequence[int]) -> int:
    """How many matrices a tensor of that shape holds."""
    return int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1


def slabs_of(shape: Sequence[int], type: GGMLType) -> list[range]:
    """The columns of a matrix, some at a time; no slab cuts a block."""
    n_rows, n_columns = shape[-2], shape[-1]
    step = block_elements(type)
    width = max(step, _LEAST_COLUMNS, SLAB_ELEMENTS // max(1, n_rows) // step * step)
    return [range(first, min(first + width, n_columns)) for first in range(0, n_columns, width)]


def iter_columns(view: memoryview, type: GGMLType, shape: Sequence[int], matrix: int) -> Iterator[tuple[int, Floats]]:
    """(first column, columns) of one matrix of a stack, with all rows, a slab at a time."""
    raw = _matrix_bytes(view, type, shape, matrix)
    for columns in slabs_of(shape, type):
        yield columns.start, _decode(raw, type, columns)


def _matrix_bytes(view: memoryview, type: GGMLType, shape: Sequence[int], matrix: int) -> Bytes:
    n_rows = shape[-2]
    stride = row_bytes(type, shape[-1])
    return np.frombuffer(view[matrix * n_rows * stride : (matrix + 1) * n_rows * stride], np.uint8).reshape(
        n_rows, stride
    )


def _place(type: GGMLType, columns: range) -> slice:
    step, step_bytes = block_elements(type), block_bytes(type)
    return slice(columns.start // step * step_bytes, columns.stop // step * step_bytes)


def _decode(raw: Bytes, type: GGMLType, columns: range) -> Floats:
    return dequantize(np.ascontiguousarray(raw[:, _place(type, columns)]), type, (len(raw), len(columns)), n_threads=1)


def _require_storable(wanted: Floats, type: GGMLType, name: str) -> None:
    require_finite(wanted, name)
    if type is GGMLType.F16 and float(np.abs(wanted).max(initial=0.0)) > _LARGEST_F16:
        raise GGUFError(
            f"{name!r} would hold a weight beyond {_LARGEST_F16:g}, the largest that F16 has",
            why="The change is far too strong.",
            next="Use a smaller strength.",
        )


@dataclass(frozen=True, eq=False)
class _Lever:
    """Directions of the output, and the rows that move it most: moving only those leaves the others, and most of the
    work, as they are.

    Attributes:
        basis: orthonormal [k, rows].
        rows: numbers of the strongest rows, in order.
        part: the columns of `basis` at those rows.
        inverse: of part times its transpose.
    """

    basis: Floats
    rows: NDArray[np.intp]
    part: Floats
    inverse: Floats

    @staticmethod
    def of(basis: Floats, type: GGMLType) -> _Lever:
        """All rows of a small matrix, a quarter of a packed one; 64 of 16-bit ones, which move as little as needed."""
        n_rows = basis.shape[1]
        n_chosen = max(n_rows // 4, min(n_rows, 256)) if is_quantized(type) else min(n_rows, max(64, 16 * len(basis)))
        leverage = np.einsum("ij,ij->j", basis, basis)
        rows = np.sort(np.argsort(-leverage, kind="stable")[:n_chosen])
        part = np.ascontiguousarray(basis[:, rows])
        return _Lever(basis, rows, part, np.linalg.pinv(part @ part.T))


@dataclass(frozen=True, eq=False)
class _Rounding:
    """How columns of a matrix are put into their type, steered along the directions of `lever` where there are any."""

    type: GGMLType
    lever: _Lever | None

    def store(self, wanted: Floats, before: Floats, weights: Floats | None) -> tuple[Bytes, Floats]:
        """(encoded, what it decodes to), both with the rows of `wanted`."""
        encoded, stored = self._encode(wanted, weights)
        lever = self.lever
        if lever is None or self.type is GGMLType.F32:
            return encoded, stored
        push = self._find_push(lever, wanted, before, stored, weights)
        if push is not None:
            pushed = wanted[lever.rows] + spread_columns(lever.part, push)
            encoded[lever.rows], stored[lever.rows] = self._encode(pushed, weights)
        return encoded, stored

    def _encode(self, rows: Floats, weights: Floats | None) -> tuple[Bytes, Floats]:
        contiguous = np.ascontiguousarray(rows, dtype=np.float32)
        encoded = quantize(contiguous, self.type, weights, n_threads=1)
        return encoded, dequantize(encoded, self.type, contiguous.shape, n_threads=1)

    def _find_push(
        self, lever: _Lever, wanted: Floats, before: Floats, stored: Floats, weights: Floats | None
    ) -> Floats | None:
        """What to add along the directions [k, columns] before rounding, so that they come out right after it."""
        packed = is_quantized(self.type)
        group = block_elements(self.type)
        aim = along_columns(lever.basis, wanted)
        error = aim - along_columns(lever.basis, stored)
        goal = (PACKED_GOAL if packed else FLOAT_GOAL) ** 2 * _by_group(aim - along_columns(lever.basis, before), group)
        smallest = _by_group(error, group)
        if not (smallest > goal).any():
            return None
        target = wanted[lever.rows]
        difference = target - stored[lever.rows]
        # What the other rows add to the error, and what all rows may cost together.
        others = error - along_columns(lever.part, difference)
        spent = most = np.zeros_like(smallest)
        if packed:
            plain = _by_group(wanted - stored, group)
            spent = plain - _by_group(difference, group)
            most = most_error(_by_group(wanted, group), plain, self.type)
        best = np.zeros_like(error)
        tried = np.zeros_like(error)
        jump = half_step(_by_group(target, 1), len(target), self.type)[:, None] / np.abs(lever.part).max(axis=1)
        push = Push((lever.inverse @ error).T, jump)
        for _ in range(PACKED_ROUNDS if packed else FLOAT_ROUNDS):
            groups = np.flatnonzero(smallest > goal)
            if not groups.size:
                break
            columns = (groups[:, None] * group + np.arange(group)).reshape(-1)
            missing = error[:, columns]
            tried[:, columns] += push.next(columns, missing.T).T if packed else lever.inverse @ missing
            at = target[:, columns]
            _, decoded = self._encode(
                at + spread_columns(lever.part, tried[:, columns]),
                None if weights is None else np.ascontiguousarray(weights[columns]),
            )
            missed = at - decoded
            error[:, columns] = others[:, columns] + along_columns(lever.part, missed)
            size = _by_group(error[:, columns], group)
            better = size < smallest[groups]
            if packed:
                better &= spent[groups] + _by_group(missed, group) <= most[groups]
            smallest[groups[better]] = size[better]
            kept = columns[np.repeat(better, group)]
            best[:, kept] = tried[:, kept]
        return best


def _by_group(values: Any, group: int) -> NDArray[np.float64]:
    """Sums of squares over all rows and the columns of each group: [rows, columns] -> [columns / group]."""
    by_column = np.einsum("ij,ij->j", values, values).astype(np.float64)
    result: NDArray[np.float64] = by_column.reshape(-1, group).sum(axis=1)
    return result
