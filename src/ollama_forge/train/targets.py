"""Which linear layers get LoRA matrices: one rule for the plan, which has a header, and for training.

In: names of linear layers, as transformers gives them, and what was asked for. Out: which are adapted. The head is
none of them: the loss is computed from its matrix in pieces. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.arch.rows import Family, Role
from ollama_forge.errors import TrainingError
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.train.options import LoraOptions

_ROUTER_NAMES = ("router", "gate")
_NOT_ADAPTED = (Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.ROUTER, Role.OUTPUT)


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a model that is not loaded yet, with the shape of its matrix."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class TargetCount:
    """What LoRA options mean for a model.

    Attributes:
        n_parameters: numbers in all LoRA matrices.
        n_experts_left: matrices of experts that get none.
    """

    n_parameters: int
    n_experts_left: int


def is_adapted(name: str, wanted: Sequence[str]) -> bool:
    """Whether a linear layer gets LoRA matrices.

    Args:
        wanted: whole names or ends of them, matched as peft does; empty: all but routers and experts.
    """
    if wanted:
        return any(name == word or name.endswith(f".{word}") for word in wanted)
    return not is_expert(name) and name.rpartition(".")[-1] not in _ROUTER_NAMES


def is_expert(name: str) -> bool:
    """Whether a layer is part of one expert of a mixture."""
    return ".experts." in name


def require_targets(names: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a target that is none of a model's linear layers.

    Raises:
        TrainingError: with the layers that there are.
    """
    for word in wanted:
        if not any(is_adapted(name, (word,)) for name in names):
            raise TrainingError(
                f"The model has no layer {word!r} to adapt",
                why="Its linear layers are " + ", ".join(sorted({name.rpartition(".")[-1] for name in names})),
                next="Name some of them with --target-modules, or leave the option out.",
            )


def linear_layers(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[LinearLayer]:
    """The linear layers that a model will have, experts one by one.

    Args:
        shapes: of its GGUF tensors, row-major, by name; from a header, or from a conversion that is only planned.
    """
    for name, shape in shapes.items():
        address = family.address_by_gguf_name(name)
        if address is None or address.row.role in _NOT_ADAPTED or len(shape) < 2:
            continue
        *stack, rows, columns = shape
        for number in range(math.prod(stack)):
            place = replace(address, expert=number) if address.row.is_per_expert else address
            yield LinearLayer(place.hf_name.removesuffix(".weight"), rows, columns)


def count_targets(gguf: GGUFFile, lora: LoraOptions) -> TargetCount:
    """The sums, from the header alone: rank x (rows + columns) for each layer that is adapted.

    Raises:
        TrainingError: a target that the model does not have.
        UnsupportedError: no family of ours.
    """
    shapes = {name: tensor.shape for name, tensor in gguf.tensors.items()}
    layers = list(linear_layers(find_family_by_gguf(gguf.architecture), shapes))
    require_targets([layer.name for layer in layers], lora.target_modules)
    adapted = [layer for layer in layers if is_adapted(layer.name, lora.target_modules)]
    n_experts = sum(is_expert(layer.name) for layer in layers)
    return TargetCount(
        sum(lora.rank * (layer.rows + layer.columns) for layer in adapted),
        n_experts - sum(is_expert(layer.name) for layer in adapted),
    )
