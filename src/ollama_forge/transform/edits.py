"""An edit: new numbers for the rows of one stored tensor, and the measure of what storing them lost.

In: rows as float32. Out: rows as float32, and after they were stored a `TensorLoss`. Reading, encoding and writing is
`apply`'s (GGUF) and `folder`'s (safetensors); which numbers are new is `lora`'s and every other edit's business.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.types import GGMLType

Floats = NDArray[np.float32]

_LARGEST_F16 = 65504.0
_DOT_ELEMENTS = 4096

RowChange = Callable[[int, Floats], Floats]
"""`change(first, rows)`: the new numbers of rows `first`, `first + 1`, ... Rows are counted through all leading axes; a
vector is one row. It may not keep or change what it is given."""


@dataclass(frozen=True, eq=False)
class OutputShift:
    """What becomes of a matrix W: S W + B^T Y.

    Attributes:
        basis: B, [m, rows].
        along: Y, [m, columns].
        scales: the diagonal of S, [rows]; None: one.
        seen: B W, [m, columns], where it is known, S is one, and B is the edit's `outputs`; it spares summing again.
    """

    basis: Floats
    along: Floats
    scales: Floats | None = None
    seen: Floats | None = None


class OutputChange(Protocol):
    """A change that mixes the rows of a matrix: it has to know sums over all of them before it can say what it is."""

    def probes(self, matrix: int) -> Floats:
        """What the rows are multiplied with for these sums, [p, rows]; matrices of a stack are counted from 0."""
        ...

    def settle(self, matrix: int, sums: Floats) -> OutputShift:
        """The change, now that the probes times the matrix are known: [p, columns]."""
        ...


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """What happens to one stored tensor.

    Attributes:
        name: as its file spells it.
        open: called when the tensor's turn comes; what it loads is given back when the tensor is done.
        inputs: the directions [k, columns] of the input in which the change acts, where there are few of them; storing
            the tensor then keeps what it does to these directions (see `apply`).
        is_precise: it keeps that as exactly as its type can, in 16-bit types too (see `steering`; the directions are
            orthonormal then). Without, 16-bit weights are the nearest ones, and packed ones are steered a little.
    """

    name: str
    open: Callable[[], RowChange] = field(repr=False)
    inputs: Callable[[], Floats] | None = field(default=None, repr=False)
    is_precise: bool = False


@dataclass(frozen=True, eq=False)
class OutputEdit:
    """What happens to one stored matrix (or each of a stack) where the change mixes its rows.

    Attributes:
        name: as its file spells it.
        open: called when the tensor's turn comes; what it loads is given back when the tensor is done.
        outputs: orthonormal directions [k, rows] of the output in which the change acts, where there are few of them;
            storing the tensor then keeps what it gives in these directions (see `outputs`).
    """

    name: str
    open: Callable[[], OutputChange] = field(repr=False)
    outputs: Callable[[], Floats] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class TensorLoss:
    """What became of an edit when it was stored. W is what the base decodes to, D the wanted change, S what is stored.

    Attributes:
        type: of the stored tensor.
        relative_error: |S - (W + D)| / |W + D|.
        change: |D| / |W|.
        survived: the part of D that is in S - W: their inner product over |D| squared. 1 when nothing was lost.
    """

    name: str
    type: str
    relative_error: float
    change: float
    survived: float

    def document(self) -> dict[str, object]:
        """The JSON form."""
        return {
            "name": self.name,
            "type": self.type,
            "relative_error": self.relative_error,
            "change": self.change,
            "survived": self.survived,
        }


class LossMeter:
    """Adds up, piece by piece, what one tensor loses; several threads may add at once."""

    def __init__(self, name: str, type_name: str) -> None:
        self._name = name
        self._type_name = type_name
        self._before = self._wanted = self._change = self._error = self._kept = 0.0
        self._adding = threading.Lock()

    def add(self, before: Floats, wanted: Floats, stored: Floats) -> None:
        """Take rows into account."""
        self.add_parts(before, wanted - before, wanted - stored)

    def add_parts(self, before: Floats, change: Floats, missing: Floats) -> None:
        """The same: of rows the change that was wanted, and what is missing of it (wanted - stored)."""
        self.add_products(
            before=dot(before, before),
            change=dot(change, change),
            missing=dot(missing, missing),
            before_change=dot(before, change),
            missing_change=dot(missing, change),
        )

    def add_products(
        self,
        *,
        before: float = 0.0,
        change: float = 0.0,
        missing: float = 0.0,
        before_change: float = 0.0,
        missing_change: float = 0.0,
    ) -> None:
        """The same from the inner products: each with itself, and of two."""
        with self._adding:
            self._before += before
            self._change += change
            self._error += missing
            self._wanted += before + 2 * before_change + change
            self._kept += change - missing_change  # stored - before is change - missing

    def result(self) -> TensorLoss:
        """The measure of all rows so far."""
        return TensorLoss(
            self._name,
            self._type_name,
            relative_error=math.sqrt(self._error / self._wanted) if self._wanted else 0.0,
            change=math.sqrt(self._change / self._before) if self._before else 0.0,
            survived=self._kept / self._change if self._change else 1.0,
        )


def require_storable(rows: Floats, type: GGMLType, name: str) -> None:
    """Refuse a result that is no number, or beyond what its type has.

    Raises:
        GGUFError: with the tensor's name.
    """
    # a sum is finite unless a term is not, or it overflows: only then each of them is looked at
    with np.errstate(all="ignore"):
        is_finite = math.isfinite(float(rows.sum(dtype=np.float32)))
    if not (is_finite or np.isfinite(rows).all()):
        raise GGUFError(
            f"{name!r} would hold a number that is not finite (NaN or infinity) after the edit",
            why="The base or the change is damaged, or the change is far too strong.",
            next="Check the adapter or the directions, and use a smaller weight or strength.",
        )
    if type is GGMLType.F16 and float(np.abs(rows).max(initial=0.0)) > _LARGEST_F16:
        raise GGUFError(
            f"{name!r} would hold a weight beyond {_LARGEST_F16:g}, the largest that F16 has",
            why="The change is far too strong, or the adapter belongs to another base.",
            next="Use a smaller strength, or check the adapter: ollama-forge adapters check ADAPTER --base REF",
        )


def dot(a: Floats, b: Floats) -> float:
    """The inner product of all numbers: of pieces by BLAS, too short for its own threads, and their sum in float64."""
    one, other = a.reshape(-1), b.reshape(-1)
    end = one.size - one.size % _DOT_ELEMENTS
    pieces = one[:end].reshape(-1, 1, _DOT_ELEMENTS) @ other[:end].reshape(-1, _DOT_ELEMENTS, 1)
    return float(pieces.sum(dtype=np.float64)) + float(one[end:] @ other[end:])
