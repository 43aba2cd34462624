"""Rounding that keeps what a few directions see of a matrix, for changes that plain rounding would take back.

In: rows as they should be, and orthonormal directions of their input. Out: the rows in their type, each weight one of
its neighbours there or so, chosen such that the rows' sums along the directions come out right. `columns` does the same
for directions of the output. Both search the smallest push along the directions that gets there: a weight moves not at
all until it moves a whole step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.types import GGMLType, bits_per_weight, is_quantized
from ollama_forge.transform.edits import Floats

# Rounds at most, and the error along the directions at which it is done, as a share of the change there.
PACKED_ROUNDS, PACKED_GOAL = 8, 0.02
FLOAT_ROUNDS, FLOAT_GOAL = 6, 2e-4
ROW_ROUNDS = 8
# How much error the steering may add: so many times that of plain rounding, and so much of one rounding of its own.
_LIMIT, _ROOM = 2.0, 0.5
_LEAST, _MOST = 0.2, 2.0


def store_rows(
    wanted: Floats,
    before: Floats,
    type: GGMLType,
    basis: Floats,
    weights: Floats | None = None,
    n_threads: int | None = None,
) -> tuple[Any, Floats]:
    """(encoded, what it decodes to), with `wanted @ basis.T` kept as far as the type can.

    Args:
        wanted, before: float32 [rows, columns].
        basis: orthonormal [k, columns].
        weights: the importance of the columns.
    """
    encoded, stored = _encode(wanted, type, weights, n_threads)
    if type is GGMLType.F32:
        return encoded, stored
    packed = is_quantized(type)
    difference = wanted - stored
    error: NDArray[Any] = difference @ basis.T
    goal = (PACKED_GOAL if packed else FLOAT_GOAL) * np.linalg.norm((wanted - before) @ basis.T, axis=1)
    smallest = np.linalg.norm(error, axis=1)
    most = most_error(squares(wanted), squares(difference), type)
    correction = np.zeros_like(error)
    push = Push(error, half_step(squares(wanted), wanted.shape[1], type)[:, None] / np.abs(basis).max(axis=1))
    for _ in range(ROW_ROUNDS if packed else FLOAT_ROUNDS):
        rows = np.flatnonzero(smallest > goal)
        if not rows.size:
            break
        correction[rows] += push.next(rows, error[rows]) if packed else error[rows]
        target = wanted[rows]
        tried, decoded = _encode((target + correction[rows] @ basis).astype(np.float32), type, weights, n_threads)
        missed = target - decoded
        error[rows] = missed @ basis.T
        size = np.linalg.norm(error[rows], axis=1)
        better = (size < smallest[rows]) & (squares(missed) <= most[rows])
        kept = rows[better]
        encoded[kept], stored[kept], smallest[kept] = tried[better], decoded[better], size[better]
    return encoded, stored


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


def _encode(rows: Floats, type: GGMLType, weights: Floats | None, n_threads: int | None) -> tuple[Any, Floats]:
    encoded = quantize(np.ascontiguousarray(rows, dtype=np.float32), type, weights, n_threads=n_threads)
    return encoded, dequantize(encoded, type, rows.shape, n_threads=n_threads)
