"""What each layer hands on at a few tokens of each prompt: means of all prompts, and some of the states themselves.

In: a packed model and prompts as token ids. Out: `States`. The layers are found by the family's rows; no logits are
computed, and nothing else of a forward pass is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ollama_forge.arch.rows import Family, Role
from ollama_forge.errors import TrainingError
from ollama_forge.train.load import PackedModel

KEPT_PROMPTS = 256
"""States of so many prompts are kept, unless all are asked for."""
BATCH_TOKENS = 2048
"""Tokens that run through the layers together, padding included."""

Ids = Sequence[int]


@dataclass(frozen=True, eq=False)
class States:
    """States of a set of prompts, at some positions and every layer.

    Attributes:
        means: float64 [positions, layers, width], over all prompts.
        kept: float32 [prompts, positions, layers, width], of the first prompts or of all.
    """

    means: np.ndarray[Any, np.dtype[np.float64]]
    kept: torch.Tensor

    def at(self, place: int, layer: int) -> torch.Tensor:
        """The kept states [prompts, width] at one position and layer."""
        return self.kept[:, place, layer]


@torch.no_grad()
def gather_states(
    packed: PackedModel,
    rows: Sequence[Ids],
    positions: Sequence[int],
    *,
    keep_all: bool = False,
    advance: Callable[[int], None] | None = None,
) -> States:
    """What each layer hands on at `positions` of each prompt, averaged and (some) kept.

    Prompts of like length run together, padded at the end, where nothing before looks.

    Raises:
        TrainingError: a prompt that has no such token, or states that are not finite.
    """
    _require_long_enough(rows, positions)
    layers = find_layers(packed)
    width = packed.model.config.get_text_config().hidden_size
    device = next(packed.model.parameters()).device
    n_kept = len(rows) if keep_all else min(len(rows), KEPT_PROMPTS)
    kept = torch.zeros(n_kept, len(positions), len(layers), width)
    total = torch.zeros(len(positions), len(layers), width, dtype=torch.float64)
    offsets = torch.tensor(positions, device=device)
    for batch in _batches(rows):
        length = max(len(rows[index]) for index in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, index in enumerate(batch):
            ids[number, : len(rows[index])] = torch.as_tensor(list(rows[index]))
            mask[number, : len(rows[index])] = 1
        places = mask.sum(dim=1).to(device)[:, None] + offsets
        with _watching(layers, places) as seen:
            packed.model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        found = torch.stack([seen[layer] for layer in range(len(layers))], dim=2).float().cpu()
        if not torch.isfinite(found).all():
            raise TrainingError(
                "The model's states are not finite numbers (NaN or infinity)",
                why="The file is damaged, or the model overflows.",
                next="Check the model: ollama-forge run REF 'Hello'",
            )
        total += found.double().sum(dim=0)
        for number, index in enumerate(batch):
            if index < n_kept:
                kept[index] = found[number]
        if advance:
            advance(int(mask.sum()))
    return States((total / len(rows)).numpy(), kept)


def find_layers(packed: PackedModel) -> list[nn.Module]:
    """The blocks of the model, in order: `model.layers`, `transformer.h`, as the family's rows spell it."""
    path = _layer_path(packed.family)
    count = packed.model.config.get_text_config().num_hidden_layers
    return [packed.model.get_submodule(path.format(layer=layer)) for layer in range(count)]


def _layer_path(family: Family) -> str:
    row = family.rows_with_role(Role.ATTENTION_OUTPUT)[0]
    return row.hf_name[: row.hf_name.index("{layer}")] + "{layer}"


@contextmanager
def _watching(layers: Sequence[nn.Module], places: torch.Tensor) -> Iterator[dict[int, torch.Tensor]]:
    """Inside the block: the states [batch, positions, width] by layer, filled by a forward pass."""
    seen: dict[int, torch.Tensor] = {}

    def watch(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[number] = torch.gather(hidden, 1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))

        return hook

    handles = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _batches(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """Indices of prompts that run together: of like length, within `BATCH_TOKENS` with what is padded."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if batch and len(rows[index]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _require_long_enough(rows: Sequence[Ids], positions: Sequence[int]) -> None:
    needed = -min(positions)
    shortest = min((len(row) for row in rows), default=0)
    if shortest < needed:
        raise TrainingError(
            f"A prompt has {shortest} tokens, and position {-needed} is asked for",
            next="Leave --position out: the last token of the prompt is always there.",
        )
