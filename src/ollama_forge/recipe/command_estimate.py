"""What one of our commands will take, from what its own dry run says: disk and memory, and a rough time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ollama_forge.recipe.command_plan import CommandEstimate
from ollama_forge.recipe.estimate import (
    DISK_BYTES_PER_SECOND,
    ENGINE_BYTES,
    NETWORK_BYTES_PER_SECOND,
    QUANTIZED_BYTES_PER_SECOND_AND_CORE,
    STREAMING_BYTES,
)

_CHECK_SECONDS = 3.0


def estimate_command(command: str, document: Mapping[str, Any]) -> CommandEstimate:
    """What a command takes; None for what its dry run does not tell.

    Args:
        document: what its dry run said.
    """
    if command == "build":
        return _build(document)
    if command in ("finetune", "train-run"):
        return _finetune(document)
    if command in ("quantize", "convert", "merge") and "bytes" in document:
        return _file(document)
    return _landing(document)


def _build(document: Mapping[str, Any]) -> CommandEstimate:
    found = document.get("estimate") or {}
    return CommandEstimate(
        disk_bytes=found.get("disk_bytes", 0),
        download_bytes=document.get("downloaded_bytes", 0),
        memory_bytes=found.get("memory_bytes", 0),
        seconds=found.get("seconds", 0.0),
    )


def _finetune(document: Mapping[str, Any]) -> CommandEstimate:
    plan = document.get("plan") or {}
    return CommandEstimate(
        disk_bytes=plan.get("disk_bytes"), memory_bytes=plan.get("memory_bytes"), seconds=plan.get("seconds")
    )


def _file(document: Mapping[str, Any]) -> CommandEstimate:
    size_bytes = int(document["bytes"])
    cores = os.cpu_count() or 1
    seconds = 1 + 3 * size_bytes / (QUANTIZED_BYTES_PER_SECOND_AND_CORE * cores) + size_bytes / DISK_BYTES_PER_SECOND
    return CommandEstimate(disk_bytes=size_bytes, memory_bytes=STREAMING_BYTES, seconds=round(seconds, 1))


def _landing(document: Mapping[str, Any]) -> CommandEstimate:
    written = int(document.get("written_bytes", 0))
    size_bytes = written + int(document.get("shared_bytes", 0))
    downloaded = int(document.get("downloaded_bytes", 0))
    seconds = downloaded / NETWORK_BYTES_PER_SECOND + 2 * written / DISK_BYTES_PER_SECOND + _CHECK_SECONDS
    return CommandEstimate(
        # On one disk the store and the Hugging Face cache share the file.
        disk_bytes=max(written, downloaded),
        download_bytes=downloaded,
        memory_bytes=size_bytes + ENGINE_BYTES,
        seconds=round(seconds, 1),
    )
