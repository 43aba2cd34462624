"""What of a base model matters to an adapter: its family, its shapes, its vocabulary and its names; headers only.

In: a GGUF file or a Hugging Face folder (config.json is enough). Out: `LoraBase`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.arch import layout
from ollama_forge.arch.config import ModelConfig, config_from_gguf, parse_config
from ollama_forge.arch.families import find_family, find_family_by_gguf
from ollama_forge.arch.rows import Family, Role
from ollama_forge.errors import FormatError, NotFoundError, UnsupportedError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.weights.adapter_gguf import base_names_of
from ollama_forge.weights.checkpoint import open_checkpoint
from ollama_forge.weights.folder import read_config

Shapes = Mapping[str, tuple[int, ...]]
HEAD = "output.weight"

_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True, eq=False)
class LoraBase:
    """A base model as an adapter sees it.

    Attributes:
        name: the file or folder, for messages.
        architecture: `general.architecture` of its GGUF form.
        family: its rows; None for a GGUF of a family that is not known, which still takes LoRA GGUFs.
        config: says how rows are shared out among heads.
        shapes: by GGUF name, row-major as GGUF has them; None when only config.json is there.
        n_tokens: size of the vocabulary.
        names: what it is called: names on the Hub, `general.name`.
    """

    name: str
    architecture: str
    family: Family | None
    config: ModelConfig | None
    shapes: Shapes | None
    n_tokens: int | None
    names: tuple[str, ...]

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output head too."""
        if self.shapes is not None:
            return HEAD not in self.shapes
        return bool(self.config and self.config.values.get("tie_word_embeddings", False))

    @property
    def can_untie(self) -> bool:
        """Whether a model of this family may have a head of its own; llama.cpp never looks for one in the others."""
        return self.family is None or bool(self.family.rows_with_role(Role.OUTPUT))

    def shape_of(self, gguf_name: str) -> tuple[int, ...] | None:
        """The shape of one of its tensors; None when it has none of that name."""
        return None if self.shapes is None else self.shapes.get(gguf_name)


def describe_base(path: Path) -> LoraBase:
    """A GGUF file or a Hugging Face folder.

    Raises:
        UnsupportedError: a folder of an unknown family.
        NotFoundError, FormatError, GGUFError, SafetensorsError, UnsafeFileError: as the readers say.
    """
    if path.is_dir():
        return describe_folder(path)
    with open_gguf(path) as file:
        return describe_gguf(file)


def describe_gguf(file: GGUFFile) -> LoraBase:
    """An open GGUF file. The result does not need it any more."""
    family = config = None
    with contextlib.suppress(UnsupportedError):
        family = find_family_by_gguf(file.architecture)
    if family is not None:
        with contextlib.suppress(UnsupportedError, FormatError):
            config = parse_config(family, _config_of(family, file))
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    own = file.metadata.get("general.name")
    names = (own,) if isinstance(own, str) else ()
    return LoraBase(
        name=str(file.path),
        architecture=file.architecture,
        family=family,
        config=config,
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        n_tokens=len(tokens) if tokens is not None else None,
        names=(*names, *base_names_of(file)),
    )


def describe_folder(folder: Path) -> LoraBase:
    """A Hugging Face folder; its weights may be missing."""
    raw = read_config(folder)
    family = find_family(raw)
    config = parse_config(family, raw)
    own = raw.get("_name_or_path")
    return LoraBase(
        name=str(folder),
        architecture=family.gguf_architecture,
        family=family,
        config=config,
        shapes=_shapes_of_folder(folder),
        n_tokens=config.find("vocab_size"),
        names=(own,) if isinstance(own, str) and own else (),
    )


def _config_of(family: Family, file: GGUFFile) -> dict[str, Any]:
    factors = {}
    for name in _FACTORS:
        tensor = file.tensors.get(name)
        if tensor is not None and math.prod(tensor.shape) < 1 << 20:
            factors[name] = dequantize(file.read(name), tensor.type, tensor.shape).reshape(-1).tolist()
    return config_from_gguf(family, file.metadata, tensor_names=tuple(file.tensors), rope_factors=factors)


def _shapes_of_folder(folder: Path) -> Shapes | None:
    try:
        checkpoint = open_checkpoint(folder)
    except NotFoundError:
        return None
    with checkpoint:
        shapes: dict[str, tuple[int, ...]] = {}
        experts: dict[str, int] = {}
        for key, tensor in checkpoint.tensors.items():
            shape = layout.hf_shape(tensor.spec.shape, tensor.row.transform)
            if key.expert is not None:
                experts[tensor.gguf_name] = max(experts.get(tensor.gguf_name, 0), key.expert + 1)
            shapes[tensor.gguf_name] = shape
        return {name: (experts[name], *shape) if name in experts else shape for name, shape in shapes.items()}
