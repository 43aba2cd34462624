"""Keeps the C library's heap small while a model trains on the processor.

Each layer allocates and frees tens of megabytes between small pieces that stay (the inputs that checkpointing keeps),
so glibc's heap fills with holes: 0.8 GB of them in one training step of a 1 B model. They are given back now and then.
Memory that comes again must be cleared, a twentieth of a step's processor time. Elsewhere (macOS, Windows, musl)
nothing happens here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

_EVERY_BYTES = 128 << 20


class HeapKeeper:
    """Counts what layers allocate, and gives freed memory back after every 128 MiB of it."""

    def __init__(self) -> None:
        self._allocated_bytes = 0

    def note(self, result: torch.Tensor) -> None:
        """Tell of a new result; those on other devices do not count."""
        if result.device.type != "cpu":
            return
        self._allocated_bytes += result.numel() * result.element_size()
        if self._allocated_bytes >= _EVERY_BYTES:
            self._allocated_bytes = 0
            trim = _trim_function()
            if trim is not None:
                trim(0)


@functools.cache
def _trim_function() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`, where the program runs on glibc."""
    try:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # TypeError: Windows has no library of the program itself
        return None
    if trim is not None:
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
