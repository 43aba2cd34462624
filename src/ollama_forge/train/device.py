"""The device that was asked for."""

from __future__ import annotations

import torch

from ollama_forge.errors import UsageError


def require_device(device: str) -> None:
    """Refuse `cuda` where there is none; `auto` and `cpu` are always there.

    Raises:
        UsageError: there is no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here", next="Leave --device out, or use --device cpu.")
