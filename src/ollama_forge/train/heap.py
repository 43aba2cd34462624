"""Keeps the C library's heap small while a model trains on the processor.

Each layer allocates and frees tens of megabytes between small pieces that stay (the inputs that checkpointing keeps),
so glibc's heap fills with holes: 0.3 GB of them for a 1 B model. Giving the holes back now and then costs nothing that
can be measured. Elsewhere (macOS, Windows, musl) nothing happens here.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

_EVERY_N_LAYERS = 4


def keep_heap_small(model: nn.Module) -> None:
    """Give freed memory back every few decoder layers, in forward and in the recomputation of checkpointing."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[::_EVERY_N_LAYERS]:
        layer.register_forward_pre_hook(_before_layer)


def _before_layer(_: nn.Module, inputs: tuple[Any, ...]) -> None:
    trim = _trim_function()
    if trim is not None and (not inputs or not isinstance(inputs[0], torch.Tensor) or inputs[0].device.type == "cpu"):
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
