"""What is known of a tensor before a byte of it is read."""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.gguf.types import GGMLType


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at rest.

    Attributes:
        name: as its file spells it.
        shape: row-major.
        encoding: the GGML type in a GGUF file, the dtype's word (`BF16`, `F8_E4M3`) in safetensors.
        nbytes: bytes on disk.
    """

    name: str
    shape: tuple[int, ...]
    encoding: GGMLType | str
    nbytes: int
