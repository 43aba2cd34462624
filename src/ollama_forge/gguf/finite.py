"""Whether stored weights are finite numbers: exact, and several times faster than all else that reads them.

In: the bytes of F32, F16 or BF16 weights. Out: nothing, or the error that every command gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry

_INFINITY = {GGMLType.F32: 0x7F800000, GGMLType.F16: 0x7C00, GGMLType.BF16: 0x7F80}
_PIECE_BYTES = 1 << 19  # stays in a core's cache while it is read twice


def is_finite(stored: Any, type: GGMLType) -> bool:
    """Whether a buffer holds no NaN and no infinity; True for other types than F32, F16 and BF16, which have neither.

    Of patterns with the sign bit those that are not finite are the largest, and of those without it, too, where the
    same bits are read as signed: two maxima find them all, and nothing is copied.
    """
    infinity = _INFINITY.get(type)
    if infinity is None:
        return True
    width = 4 if type is GGMLType.F32 else 2
    bits = np.frombuffer(stored, f"<u{width}")
    signed = bits.view(f"<i{width}")
    negative_infinity = infinity | 1 << 8 * width - 1
    step = _PIECE_BYTES // width
    return all(
        int(signed[start : start + step].max()) < infinity and int(bits[start : start + step].max()) < negative_infinity
        for start in range(0, bits.size, step)
    )


def require_finite(stored: Any, type: GGMLType, name: str) -> None:
    """Refuse NaN and infinity.

    Raises:
        GGUFError: there is one; `name` is the tensor's.
    """
    if not is_finite(stored, type):
        raise GGUFError(
            f"{name!r} holds a weight that is not a finite number",
            why="NaN and infinity spread through the whole model: the source is damaged, or its training diverged.",
            next="Get the model again, and check it where it came from.",
        )


def finite_entry(entry: TensorEntry) -> TensorEntry:
    """The same tensor, every weight of it looked at while it is written.

    Raises:
        GGUFError: while it is written, when one is not a finite number.
    """

    def chunks() -> Iterator[Any]:
        for chunk in entry.chunks():
            require_finite(chunk, entry.type, entry.name)
            yield chunk

    return replace(entry, chunks=chunks, pieces=None, span=None)
