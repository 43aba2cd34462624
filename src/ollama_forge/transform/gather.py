"""Pick rows, and cells of rows, out of a stored tensor without looking into them.

In: the bytes of a matrix [rows, cells, bytes of a cell], where a cell is a number or a whole block of numbers. Out: the
kept ones, in order, a few megabytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 1 << 22
# Shorter runs of rows are collected in one array; longer ones are handed on where they lie.
_RUN_BYTES = 1 << 16

Indices = NDArray[np.int64]


def gather(view: memoryview, cell_bytes: int, n_cells: int, rows: Indices, cells: Indices | None) -> Iterator[Any]:
    """Yield the kept bytes.

    Args:
        view: [n rows, n_cells, cell_bytes], flat.
        rows: those that stay, ascending.
        cells: those that stay of each row; None: all.
    """
    stride = cell_bytes * n_cells
    if cells is None:
        yield from _gather_rows(view, stride, rows)
        return
    table = np.frombuffer(view, np.uint8).reshape(-1, n_cells, cell_bytes)
    at_once = max(1, CHUNK_BYTES // max(1, stride))
    for start in range(0, len(rows), at_once):
        yield np.ascontiguousarray(table[rows[start : start + at_once]][:, cells]).reshape(-1)


def _gather_rows(view: memoryview, stride: int, rows: Indices) -> Iterator[Any]:
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *breaks.tolist()]
    if len(rows) * stride // len(starts) < _RUN_BYTES:
        table = np.frombuffer(view, np.uint8).reshape(-1, stride)
        at_once = max(1, CHUNK_BYTES // max(1, stride))
        for start in range(0, len(rows), at_once):
            yield table[rows[start : start + at_once]].reshape(-1)
        return
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        first, last = int(rows[start]) * stride, (int(rows[stop - 1]) + 1) * stride
        for offset in range(first, last, CHUNK_BYTES):
            yield view[offset : min(offset + CHUNK_BYTES, last)]


def whole_blocks(columns: Indices, block: int) -> Indices | None:
    """The blocks that these columns are, in order, when they are whole blocks of a row; else None."""
    if len(columns) % block:
        return None
    groups = columns.reshape(-1, block)
    firsts = groups[:, 0]
    if (firsts % block).any() or not np.array_equal(groups, firsts[:, None] + np.arange(block)):
        return None
    result: Indices = firsts // block
    return result


def row_numbers(shape: tuple[int, ...], axes: dict[int, Indices]) -> Indices:
    """Rows of a tensor [..., rows, columns], counted through all leading axes, that a choice on those axes keeps."""
    leading = shape[:-1]
    numbers = np.arange(int(np.prod(leading, dtype=np.int64)), dtype=np.int64).reshape(leading or (1,))
    for axis, kept in axes.items():
        if axis != -1:
            numbers = np.take(numbers, kept, axis=axis + 1 if leading else 0)
    result: Indices = numbers.reshape(-1)
    return result
