"""Edit what a matrix gives, along its output, and steer the rounding there.

In: a stored matrix [rows, columns] (or a stack) and an `OutputEdit`. Out: its encoded bytes. A change along one output
direction is spread over all rows, a little on each, and plain rounding would take every little back to where it was. So
the error that the stored weights make along the direction is fed back: some of them go to their other neighbour, those
where that moves the output most, until column by column the stored matrix gives along the direction what was wanted.

A matrix is gone through three times: what the change has to know of all rows is summed, some rows at a time; the
changed rows are stored; and where their error along the directions is too large, the rows that move it most are stored
again, some columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.types import GGMLType, block_bytes, block_elements, is_quantized, row_bytes
from ollama_forge.transform.edits import Floats, LossMeter, OutputEdit, OutputShift, dot, require_storable
from ollama_forge.transform.steering import (
    FLOAT_GOAL,
    FLOAT_ROUNDS,
    PACKED_GOAL,
    PACKED_ROUNDS,
    TILE_ELEMENTS,
    Push,
    half_step,
    most_error,
    run_slabs,
)
from ollama_forge.transform.thin import along_columns, spread_columns

Bytes = NDArray[np.uint8]
Sums = NDArray[np.float64]

_MOST_STRIPS = 32  # of one matrix: each has its own sums, which are added in order, whatever thread made them
_LEAST_COLUMNS = 256  # a multiple of every block; with fewer, numpy spends its time between the rows


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

    Besides one encoded matrix each thread has a few arrays of `TILE_ELEMENTS` numbers.

    Args:
        view: the stored bytes.
        shape: [rows, columns] or [matrices, rows, columns].
        importance: of the columns, float32 [columns] or one after the other for each matrix.

    Raises:
        GGUFError: a result that its type cannot hold.
    """
    n_columns = shape[-1]
    change = edit.open()
    lever = None
    if edit.outputs is not None and type is not GGMLType.F32:
        lever = _Lever.of(edit.outputs(), type)
    for matrix in range(count_matrices(shape)):
        stored = StoredRows.of(view, type, shape, matrix)
        shift = change.settle(matrix, stored.sum_along(change.probes(matrix), n_threads))
        start = 0 if importance is None else matrix % (importance.size // n_columns) * n_columns
        weights = None if importance is None else importance[start : start + n_columns]
        yield _Rewrite(edit.name, stored, shift, weights, lever, meter, n_threads).encode().reshape(-1)


def count_matrices(shape: Sequence[int]) -> int:
    """How many matrices a tensor of that shape holds."""
    return int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1


@dataclass(frozen=True, eq=False)
class StoredRows:
    """One matrix as its file holds it: uint8 [rows, bytes of a row]."""

    raw: Bytes
    type: GGMLType
    n_columns: int

    @staticmethod
    def of(view: memoryview, type: GGMLType, shape: Sequence[int], matrix: int) -> StoredRows:
        """A matrix of a stack."""
        n_rows, n_columns = shape[-2], shape[-1]
        stride = row_bytes(type, n_columns)
        part = view[matrix * n_rows * stride : (matrix + 1) * n_rows * stride]
        return StoredRows(np.frombuffer(part, np.uint8).reshape(n_rows, stride), type, n_columns)

    def tiles(self, strip: range) -> Iterator[slice]:
        """The rows of a strip, a few at a time."""
        for first in range(strip.start, strip.stop, self.rows_at_once):
            yield slice(first, min(first + self.rows_at_once, strip.stop))

    def scratch(self, count: int) -> Iterator[Floats]:
        """Room for so many tiles, float32 [rows, columns] each."""
        return iter(np.empty((count, self.rows_at_once, self.n_columns), np.float32))

    @property
    def rows_at_once(self) -> int:
        """Rows of a tile."""
        return max(1, min(len(self.raw), TILE_ELEMENTS // max(1, self.n_columns)))

    def decode(self, rows: slice, room: Floats | None = None) -> Floats:
        """float32 [rows, columns], in `room` where there is some."""
        raw = self.raw[rows]
        out = None if room is None else room[: len(raw)]
        return dequantize(raw, self.type, (len(raw), self.n_columns), n_threads=1, out=out)

    def each_strip(self, work: Callable[[int, range], None], n_threads: int | None) -> int:
        """Call `work(number, rows)` for each strip of rows, on several threads; how many strips there are."""
        n_rows = len(self.raw)
        at_once = max(self.rows_at_once, -(-n_rows // _MOST_STRIPS))
        strips = [range(first, min(first + at_once, n_rows)) for first in range(0, n_rows, at_once)]
        run_slabs(lambda strip: work(strip.start // at_once, strip), strips, TILE_ELEMENTS, n_threads)
        return len(strips)

    def sum_along(self, probes: Floats, n_threads: int | None = None) -> Floats:
        """probes [p, rows] times the matrix: float32 [p, columns], the same for any number of threads."""
        sums = np.zeros((_MOST_STRIPS, len(probes), self.n_columns))

        def work(number: int, strip: range) -> None:
            (room,) = self.scratch(1)
            for tile in self.tiles(strip):
                sums[number] += along_columns(probes[:, tile], self.decode(tile, room))

        n_strips = self.each_strip(work, n_threads)
        result: Floats = sums[:n_strips].sum(axis=0).astype(np.float32)
        return result


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


class _Totals:
    """What plain rounding of all rows did, for each column (or block of columns).

    Attributes:
        error: what is missing along the directions, [k, columns].
        change: what the edit changes there, [k, columns].
        plain, size: squared norms of the error and of the weights, [blocks]; of packed types only.
    """

    def __init__(self, n_strips: int, n_directions: int, n_columns: int, group: int) -> None:
        self.error: Sums = np.zeros((n_strips, n_directions, n_columns))
        self.change: Sums = np.zeros_like(self.error)
        self.group = group
        self.plain: Sums = np.zeros((n_strips, n_columns // group if group > 1 else 0))
        self.size: Sums = np.zeros_like(self.plain)

    def add(self, strip: int, basis: Floats, change: Floats | None, wanted: Floats, error: Floats) -> None:
        """Take a tile into account; `basis` are the columns at its rows. The change may be known for all rows."""
        self.error[strip] += along_columns(basis, error)
        if change is not None:
            self.change[strip] += along_columns(basis, change)
        if self.group > 1:
            self.plain[strip] += _by_group(error, self.group)
            self.size[strip] += _by_group(wanted, self.group)

    def close(self) -> None:
        """Add the strips up."""
        self.error, self.change = self.error.sum(axis=0), self.change.sum(axis=0)
        self.plain, self.size = self.plain.sum(axis=0), self.size.sum(axis=0)


@dataclass(frozen=True, eq=False)
class _Rewrite:
    """One matrix on its way into its own type again, steered along the directions of `lever` where there are any."""

    name: str
    stored: StoredRows
    shift: OutputShift
    weights: Floats | None
    lever: _Lever | None
    meter: LossMeter
    n_threads: int | None

    def encode(self) -> Bytes:
        """The new bytes: uint8 [rows, bytes of a row]."""
        stored, lever = self.stored, self.lever
        out = np.empty_like(stored.raw)
        totals = None
        if lever is not None:
            totals = _Totals(_MOST_STRIPS, len(lever.basis), stored.n_columns, block_elements(stored.type))
        stored.each_strip(lambda number, strip: self._store(number, strip, out, totals), self.n_threads)
        if lever is not None and totals is not None:
            totals.close()
            self._note_known(totals)
            self._steer(out, lever, totals)
        return out

    def _store(self, number: int, strip: range, out: Bytes, totals: _Totals | None) -> None:
        """Change the rows of a strip and store each as the nearest there is."""
        stored, type = self.stored, self.stored.type
        rooms = list(stored.scratch(4))
        for tile in stored.tiles(strip):
            before = stored.decode(tile, rooms[0])
            change, wanted, error = (room[: len(before)] for room in rooms[1:])
            self._write_change(tile, slice(None), before, change)
            np.add(before, change, out=wanted)
            require_storable(wanted, type, self.name)
            out[tile] = encoded = quantize(wanted, type, self.weights, n_threads=1)
            np.subtract(wanted, dequantize(encoded, type, wanted.shape, n_threads=1, out=error), out=error)
            is_known = self.shift.seen is not None
            if is_known:
                self.meter.add_products(before=dot(before, before), missing=dot(error, error))
            else:
                self.meter.add_parts(before, change, error)
            if self.lever is not None and totals is not None:
                totals.add(number, self.lever.basis[:, tile], None if is_known else change, wanted, error)

    def _write_change(self, rows: slice | NDArray[np.intp], columns: slice, before: Floats, out: Floats) -> None:
        """What is to be added to these rows."""
        shift = self.shift
        spread_columns(shift.basis[:, rows], shift.along[:, columns], out)
        if shift.scales is not None:
            out += before * (shift.scales[rows, None] - 1)

    def _note_known(self, totals: _Totals) -> None:
        """What of the change follows from its sums along the directions, all of which it lies along."""
        if self.shift.seen is None:
            return
        totals.change = self.shift.along.astype(np.float64)
        self.meter.add_products(
            change=float(np.vdot(totals.change, totals.change)),
            before_change=float(np.vdot(totals.change, self.shift.seen)),
            missing_change=float(np.vdot(totals.change, totals.error)),
        )

    def _steer(self, out: Bytes, lever: _Lever, totals: _Totals) -> None:
        """Store the lever's rows again, so that the error along the directions goes."""
        type, n_columns = self.stored.type, self.stored.n_columns
        step = block_elements(type)
        width = max(step, _LEAST_COLUMNS, TILE_ELEMENTS // len(lever.rows) // step * step)

        def work(columns: range) -> None:
            part = slice(columns.start, columns.stop)
            place = slice(part.start // step * block_bytes(type), part.stop // step * block_bytes(type))
            shape = (len(lever.rows), len(columns))
            before, kept = (
                dequantize(np.ascontiguousarray(raw[lever.rows, place]), type, shape, n_threads=1)
                for raw in (self.stored.raw, out)
            )
            change = np.empty_like(before)
            self._write_change(lever.rows, part, before, change)
            wanted = before + change
            push = self._find_push(lever, totals, part, wanted, kept)
            if push is not None:
                encoded, stored = self._encode(wanted + spread_columns(lever.part, push), part)
                out[lever.rows, place] = encoded
                old, new = wanted - kept, wanted - stored
                self.meter.add_products(missing=dot(new, new) - dot(old, old), missing_change=dot(new - old, change))

        slabs = [range(first, min(first + width, n_columns)) for first in range(0, n_columns, width)]
        run_slabs(work, slabs, width * len(lever.rows), self.n_threads)

    def _encode(self, rows: Floats, columns: slice | NDArray[np.intp]) -> tuple[Bytes, Floats]:
        """(encoded, what it decodes to)."""
        type = self.stored.type
        contiguous = np.ascontiguousarray(rows, dtype=np.float32)
        weights = None if self.weights is None else np.ascontiguousarray(self.weights[columns])
        encoded = quantize(contiguous, type, weights, n_threads=1)
        return encoded, dequantize(encoded, type, contiguous.shape, n_threads=1)

    def _find_push(
        self, lever: _Lever, totals: _Totals, part: slice, target: Floats, stored: Floats
    ) -> NDArray[Any] | None:
        """What to add to the lever's rows along the directions [k, columns], so that they come out right when rounded.

        Args:
            target, stored: these rows as they should be, and as plain rounding has them.
        """
        type = self.stored.type
        packed, group = is_quantized(type), block_elements(type)
        error = totals.error[:, part].astype(np.float32)
        goal = (PACKED_GOAL if packed else FLOAT_GOAL) ** 2 * _by_group(totals.change[:, part], group)
        smallest = _by_group(error, group)
        if not (smallest > goal).any():
            return None
        difference = target - stored
        # What the other rows add to the error, and what all rows may cost together.
        others = error - along_columns(lever.part, difference)
        spent = most = np.zeros_like(smallest)
        if packed:
            blocks = slice(part.start // group, part.stop // group)
            plain = totals.plain[blocks]
            spent = plain - _by_group(difference, group)
            most = most_error(totals.size[blocks], plain, type)
        best = np.zeros_like(error)
        tried = np.zeros_like(error)
        jump = half_step(_by_group(target, 1), len(target), type)[:, None] / np.abs(lever.part).max(axis=1)
        push = Push((lever.inverse @ error).T, jump)
        for _ in range(PACKED_ROUNDS if packed else FLOAT_ROUNDS):
            groups = np.flatnonzero(smallest > goal)
            if not groups.size:
                break
            columns = (groups[:, None] * group + np.arange(group)).reshape(-1)
            missing = error[:, columns]
            tried[:, columns] += push.next(columns, missing.T).T if packed else lever.inverse @ missing
            at = target[:, columns]
            _, decoded = self._encode(at + spread_columns(lever.part, tried[:, columns]), part.start + columns)
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


def _by_group(values: Any, group: int) -> Sums:
    """Sums of squares over all rows and the columns of each group: [rows, columns] -> [columns / group]."""
    by_column = np.einsum("ij,ij->j", values, values).astype(np.float64)
    result: Sums = by_column.reshape(-1, group).sum(axis=1)
    return result
