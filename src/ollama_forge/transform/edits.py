"""An edit: new numbers for the rows of one stored tensor, and the measure of what storing them lost.

In: rows as float32. Out: rows as float32, and after they were stored a `TensorLoss`. Reading, encoding and writing is
`apply`'s (GGUF) and `folder`'s (safetensors); which numbers are new is `lora`'s and every other edit's business.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import GGUFError

Floats = NDArray[np.float32]

RowChange = Callable[[int, Floats], Floats]
"""`change(first, rows)`: the new numbers of rows `first`, `first + 1`, ... Rows are counted through all leading axes; a
vector is one row. It may not keep or change what it is given."""

ColumnChange = Callable[[int, int, Floats], Floats]
"""`change(matrix, first, columns)`: the new numbers of columns `first`, `first + 1`, ... with all their rows. Matrices
of a stack are counted from 0. It may not keep or change what it is given."""


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
        outputs: the directions [k, rows] of the output in which the change acts, where there are few of them; storing
            the tensor then keeps what it gives in these directions (see `columns`).
    """

    name: str
    open: Callable[[], ColumnChange] = field(repr=False)
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
        change = wanted - before
        error = stored - wanted
        changed = _dot(change, change)
        # stored - before is change + error
        kept = changed + _dot(error, change)
        sums = _dot(before, before), _dot(wanted, wanted), _dot(error, error)
        with self._adding:
            self._change += changed
            self._kept += kept
            self._before += sums[0]
            self._wanted += sums[1]
            self._error += sums[2]

    def result(self) -> TensorLoss:
        """The measure of all rows so far."""
        return TensorLoss(
            self._name,
            self._type_name,
            relative_error=math.sqrt(self._error / self._wanted) if self._wanted else 0.0,
            change=math.sqrt(self._change / self._before) if self._before else 0.0,
            survived=self._kept / self._change if self._change else 1.0,
        )


def require_finite(rows: Floats, name: str) -> None:
    """Refuse a result that is no number.

    Raises:
        GGUFError: with the tensor's name.
    """
    if not np.isfinite(rows).all():
        raise GGUFError(
            f"{name!r} would hold a number that is not finite (NaN or infinity) after the edit",
            why="The base or the change is damaged, or the change is far too strong.",
            next="Check the adapter, and the weight it is merged with.",
        )


def _dot(a: Floats, b: Floats) -> float:
    # float32 is enough for a row; the sum of all rows is kept in float64.
    return float(np.einsum("ij,ij->i", a, b).sum(dtype=np.float64))
