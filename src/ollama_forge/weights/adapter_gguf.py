"""A LoRA in a GGUF file, as llama.cpp's converter writes it and as llama.cpp and Ollama apply it.

In: a path. Out: `LoraFile`, pairs by GGUF tensor name. Facts: src/llama-adapter.cpp of llama.cpp b11549 (names, shapes,
scale = alpha / rank, alpha 0 or absent means scale 1; the pair of `token_embd.weight` stands the other way round).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from ollama_forge.errors import AdapterError
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.weights.adapter_parts import AdapterTensor, LoraPair, Replacement, make_pair

EMBEDDING = "token_embd.weight"
_HALVES = {".lora_a": "a", ".lora_b": "b"}


class LoraFile:
    """An open LoRA GGUF: `pairs`, `replacements` (norms, which llama.cpp ignores), and what its metadata says."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = file.architecture
        self.alpha = _alpha(file)
        self.pairs, self.replacements = _collect(file, self.alpha)
        tokens = file.metadata.get("adapter.alora.invocation_tokens")
        self.invocation_tokens = tuple(int(token) for token in tokens) if tokens is not None else ()

    @property
    def base_names(self) -> tuple[str, ...]:
        """The base models that the file names, as `organization/name` where it says so."""
        return base_names_of(self.file)

    def close(self) -> None:
        self.file.close()


def open_lora_gguf(path: Path) -> LoraFile:
    """Open it.

    Raises:
        GGUFError: not GGUF.
        AdapterError: a GGUF that is no LoRA, or whose tensors do not pair.
    """
    file = open_gguf(path)
    try:
        kinds = (file.metadata.get("general.type"), file.metadata.get("adapter.type"))
        if kinds != ("adapter", "lora"):
            raise AdapterError(
                f"{str(path)!r} is not a LoRA adapter",
                why=f"Its general.type and adapter.type are {kinds[0]!r} and {kinds[1]!r}.",
                next="If it is a model, land it: ollama-forge convert --gguf FILE --name NAME",
            )
        return LoraFile(file)
    except BaseException:
        file.close()
        raise


def base_names_of(file: GGUFFile) -> tuple[str, ...]:
    """Names of the models that a GGUF file comes from, from `general.base_model.*`."""
    count = file.metadata.get("general.base_model.count")
    if not isinstance(count, int) or isinstance(count, bool):
        return ()
    names = []
    for number in range(min(count, 16)):
        prefix = f"general.base_model.{number}."
        url = file.metadata.get(prefix + "repo_url")
        name = file.metadata.get(prefix + "name")
        if isinstance(url, str) and "huggingface.co/" in url:
            names.append(url.split("huggingface.co/", 1)[1].strip("/"))
        elif isinstance(name, str):
            names.append(name)
    return tuple(names)


def _alpha(file: GGUFFile) -> float:
    value: Any = file.metadata.get("adapter.lora.alpha", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise AdapterError(
            f"{str(file.path)!r} has the adapter.lora.alpha {value!r}",
            why="It must be a finite number.",
            next="Convert the adapter again: ollama-forge adapters convert FOLDER -o adapter.gguf",
        )
    return float(value)


def _collect(file: GGUFFile, alpha: float) -> tuple[tuple[LoraPair, ...], tuple[Replacement, ...]]:
    halves: dict[str, dict[str, AdapterTensor]] = {}
    replacements = []
    for name, entry in file.tensors.items():
        tensor = AdapterTensor(name, entry.shape, entry.type, functools.partial(file.read, name))
        half = _HALVES.get(name[-7:])
        if half is not None:
            halves.setdefault(name[:-7], {})[half] = tensor
        elif name.endswith("_norm.weight"):
            replacements.append(Replacement(name, tensor))
        else:
            raise AdapterError(
                f"{str(file.path)!r} has a tensor {name!r}, which is no part of a LoRA",
                why="Its tensors end with .lora_a and .lora_b; llama.cpp refuses all others.",
                next="Convert the adapter again: ollama-forge adapters convert FOLDER -o adapter.gguf",
            )
    pairs = []
    for target, found in halves.items():
        if len(found) < 2:
            raise missing_half(target, found)
        a, b = found["a"], found["b"]
        if target == EMBEDDING:
            a, b = b.transposed(), a
        rank = a.shape[-2] if len(a.shape) >= 2 else 0
        pairs.append(make_pair(target, a, b, alpha or float(rank or 1)))
    return tuple(pairs), tuple(replacements)


def missing_half(target: str, found: dict[str, AdapterTensor]) -> AdapterError:
    """What is said when one of the two matrices is not there."""
    there = next(iter(found.values())).name
    absent = "B" if "a" in found else "A"
    return AdapterError(
        f"The adapter has {there!r} without its partner, the matrix {absent} of {target!r}",
        why="A LoRA is a product of two matrices; half of one says nothing. The file is incomplete.",
        next="Save the adapter again, or get it again from where it was made.",
    )
