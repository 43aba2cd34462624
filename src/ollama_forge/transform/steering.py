"""Rounding that keeps what a few directions see of a matrix, for changes that plain rounding would take back.

In: rows as they should be, and orthonormal directions of their input. Out: the rows in their type, each weight one of
its neighbours there or so, chosen such that the rows' sums along the directions come out right. `outputs` does the same
for directions of the output. Both search the smallest push along the directions that gets there: a weight moves not at
all until it moves a whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.gguf.native import dequantize, quantize, usable_cores
from ollama_forge.gguf.types import GGMLType, bits_per_weight, block_bytes, block_elements, is_quantized, row_bytes
from ollama_forge.transform.edits import Floats
from ollama_forge.transform.thin import along_rows, spread_rows

# Rounds at most, and the error along the directions at which it is done, as a share of the change there.
PACKED_ROUNDS, PACKED_GOAL = 8, 0.03
FLOAT_ROUNDS, FLOAT_GOAL = 6, 3e-4
TILE_ELEMENTS = 1 << 19
"""Numbers that one thread works on together: so many that Python's own share of the time is small."""
_ROOM_BYTES, _BYTES_PER_ELEMENT = 200 << 20, 40  # all threads together; the arrays that one of them makes on its way
# How much error the steering may add: so many times that of plain rounding, and so much of one rounding of its own.
_LIMIT, _ROOM = 2.0, 0.5
_LEAST, _MOST = 0.2, 2.0


def store_rows(
    before: Floats,
    change: Callable[[slice, Floats], Floats],
    type: GGMLType,
    basis: Floats,
    weights: Floats | None = None,
    *,
    report: Callable[[Floats, Floats, Floats], None] | None = None,
    n_threads: int | None = None,
) -> NDArray[np.uint8]:
    """The changed rows, encoded, with their sums along `basis` kept as far as the type can.

    Args:
        before: float32 [rows, columns].
        change: what some of the rows, which it is given, shall become; several threads call it.
        basis: orthonormal [k, columns].
        weights: the importance of the columns.
        report: told of some rows what they were, how they change, and what is missing of that when they are stored; by
            several threads.

    Raises:
        GGUFError: what `change` raises, or a weight that the type cannot hold.
    """
    n_rows, n_columns = before.shape
    encoded = np.empty((n_rows, row_bytes(type, n_columns)), np.uint8)
    rounding = _RowRounding.of(type, basis, weights)

    def work(rows: range) -> None:
        part = slice(rows.start, rows.stop)
        wanted = change(part, before[part])
        difference = wanted - before[part]
        encoded[part], missing = rounding.store(wanted, difference)
        if report is not None:
            report(before[part], difference, missing)

    at_once = max(1, TILE_ELEMENTS // max(1, n_columns))
    slabs = [range(i, min(i + at_once, n_rows)) for i in range(0, n_rows, at_once)]
    run_slabs(work, slabs, at_once * n_columns, n_threads)
    return encoded


def run_slabs(work: Callable[[range], None], slabs: Sequence[range], slab_elements: int, n_threads: int | None) -> None:
    """Call `work` for each, on as many threads as there are slabs and room for their arrays."""
    most = max(1, _ROOM_BYTES // (_BYTES_PER_ELEMENT * slab_elements))
    n_threads = min(len(slabs), most, usable_cores() if n_threads is None else n_threads)
    if n_threads <= 1:
        for slab in slabs:
            work(slab)
        return
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in pool.map(work, slabs):
            pass


def _strongest_columns(basis: Floats, type: GGMLType) -> tuple[slice | NDArray[np.intp], slice | NDArray[np.intp]]:
    """(blocks, columns) that move the sums most; the others keep their first rounding. A quarter of the blocks of a
    packed row; 64 neighbours of a 16-bit one, which move as little as needed."""
    step = block_elements(type)
    leverage = np.einsum("ij,ij->j", basis, basis).reshape(-1, step).sum(axis=1)
    if step == 1:
        count = min(len(leverage), 64)
        first = int(np.argmax(np.convolve(leverage, np.ones(count), "valid")))
        window = slice(first, first + count)
        return window, window
    n_chosen = max(-(-len(leverage) // 4), min(len(leverage), 2))
    blocks = np.sort(np.argsort(-leverage, kind="stable")[:n_chosen])
    return blocks, (blocks[:, None] * step + np.arange(step)).reshape(-1)


@dataclass(frozen=True, eq=False)
class _RowRounding:
    """How some rows are put into their type; `columns` are those of `blocks`, the only ones that are steered."""

    type: GGMLType
    blocks: slice | NDArray[np.intp]
    columns: slice | NDArray[np.intp]
    basis: Floats
    lever: Floats
    inverse: Floats
    weights: Floats | None

    @staticmethod
    def of(type: GGMLType, basis: Floats, weights: Floats | None) -> _RowRounding:
        """The columns that move the sums along the basis most, and their part of it."""
        blocks, columns = _strongest_columns(basis, type)
        lever = np.ascontiguousarray(basis[:, columns])
        return _RowRounding(type, blocks, columns, basis, lever, np.linalg.pinv(lever @ lever.T), weights)

    def store(self, wanted: Floats, change: Floats) -> tuple[NDArray[np.uint8], Floats]:
        """(encoded, what is missing of `wanted` then)."""
        encoded, missing = self._encode(wanted, self.weights)
        np.subtract(wanted, missing, out=missing)
        push = None if self.type is GGMLType.F32 else self._find_push(wanted, change, missing)
        if push is not None:
            weights = None if self.weights is None else np.ascontiguousarray(self.weights[self.columns])
            target = wanted[:, self.columns]
            part, decoded = self._encode(target + spread_rows(push, self.lever), weights)
            size = block_bytes(self.type)
            encoded.reshape(len(encoded), -1, size)[:, self.blocks] = part.reshape(len(part), -1, size)
            missing[:, self.columns] = target - decoded
        return encoded, missing

    def _find_push(self, wanted: Floats, change: Floats, missing: Floats) -> Floats | None:
        """What to add along the directions [rows, k] before rounding, so that they come out right after it."""
        packed = is_quantized(self.type)
        error = along_rows(missing, self.basis)
        goal = (PACKED_GOAL if packed else FLOAT_GOAL) ** 2 * squares(along_rows(change, self.basis))
        smallest = squares(error)
        if not (smallest > goal).any():
            return None
        lever, inverse = self.lever, self.inverse
        target = np.ascontiguousarray(wanted[:, self.columns])
        difference = missing[:, self.columns]
        others = error - along_rows(difference, lever)
        spent = most = np.zeros_like(smallest)
        if packed:
            plain = squares(missing)
            spent = plain - squares(difference)
            most = most_error(squares(wanted), plain, self.type)
        weights = None if self.weights is None else np.ascontiguousarray(self.weights[self.columns])
        tried, best = np.zeros_like(error), np.zeros_like(error)
        jump = half_step(squares(target), target.shape[1], self.type)[:, None] / np.abs(lever).max(axis=1)
        push = Push(error @ inverse, jump)
        for _ in range(PACKED_ROUNDS if packed else FLOAT_ROUNDS):
            rows = np.flatnonzero(smallest > goal)
            if not rows.size:
                break
            tried[rows] += push.next(rows, error[rows]) if packed else error[rows] @ inverse
            at = target[rows]
            _, decoded = self._encode(at + spread_rows(tried[rows], lever), weights)
            missed = at - decoded
            error[rows] = others[rows] + along_rows(missed, lever)
            size = squares(error[rows])
            better = size < smallest[rows]
            if packed:
                better &= spent[rows] + squares(missed) <= most[rows]
            kept = rows[better]
            smallest[kept], best[kept] = size[better], tried[kept]
        return best

    def _encode(self, rows: NDArray[Any], weights: Floats | None) -> tuple[Any, Floats]:
        contiguous = np.ascontiguousarray(rows, dtype=np.float32)
        encoded = quantize(contiguous, self.type, weights, n_threads=1)
        return encoded, dequantize(encoded, self.type, contiguous.shape, n_threads=1)


class Push:
    """How far to push along each direction next: the secant's step, at most twice and at least a fifth of the last one.

    Blocks share scales, so what a push does depends on the others around it: a bracket would close on nothing.

    Args:
        error: [n, k]; what is missing along each direction without any push.
        jump: [n, k]; a push that moves the first weight.
    """

    def __init__(self, error: NDArray[Any], jump: NDArray[Any]) -> None:
        self._stride = (np.abs(error) + jump).astype(np.float32)
        self._last = np.full(error.shape, np.nan, np.float32)

    def next(self, rows: NDArray[np.intp], error: NDArray[Any]) -> Floats:
        """The push [rows, k] to add, now that the last one (none at first) left this error."""
        gain = np.abs(self._last[rows] - error)
        ratio = np.clip(np.abs(error) / np.where(gain > 0, gain, 1e-30), _LEAST, _MOST)
        self._stride[rows] *= np.where(np.isnan(gain), 1, ratio)
        self._last[rows] = error
        result: Floats = np.sign(error) * self._stride[rows]
        return result


def most_error(wanted: NDArray[Any], plain: NDArray[Any], type: GGMLType) -> NDArray[np.float64]:
    """The squared error that may remain, from the squared sizes of the weights and of plain rounding's error."""
    if not is_quantized(type):
        return np.full(wanted.shape, np.inf)
    result: NDArray[np.float64] = _LIMIT**2 * plain + (_ROOM * noise_of(type)) ** 2 * wanted
    return result


def half_step(wanted: NDArray[Any], count: int, type: GGMLType) -> Floats:
    """About half a step of the type, from the squared size of `count` weights: what moves one to its neighbour."""
    result: Floats = (np.sqrt(3) * noise_of(type) * np.sqrt(wanted / max(1, count))).astype(np.float32)
    return result


def noise_of(type: GGMLType) -> float:
    """About what one rounding into a block type costs, |error| / |weights|: 0.077 for Q4_K, 0.018 for Q6_K."""
    return float(2.0 ** -(bits_per_weight(type) - 0.8))


def squares(rows: Floats) -> NDArray[np.float64]:
    """The squared norm of each row."""
    result: NDArray[np.float64] = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
    return result
