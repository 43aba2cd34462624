"""Products with a few directions, in the thread that asks for them.

`@` would start BLAS's own threads inside each of ours, which then wait for each other: more than twice the time. With
one direction or a few there is nothing to gain from BLAS. basis is [k, width], columns [width, n], rows [n, width].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def along_columns(basis: Array, columns: Array) -> Array:
    """basis @ columns: [k, n]."""
    return np.einsum("kw,wn->kn", basis, columns)


def along_rows(rows: Array, basis: Array) -> Array:
    """rows @ basis.T: [n, k]."""
    return np.einsum("nw,kw->nk", rows, basis)


def spread_columns(basis: Array, along: Array, out: Array | None = None) -> Array:
    """basis.T @ along: [width, n]; written into `out` where there is one."""
    if len(basis) == 1:
        return np.multiply(basis.T, along, out=out)
    result: Array = np.einsum("kw,kn->wn", basis, along, out=out)
    return result


def spread_rows(along: Array, basis: Array) -> Array:
    """along @ basis: [n, width]."""
    if len(basis) == 1:
        return along * basis
    return np.einsum("nk,kw->nw", along, basis)
