"""Which columns of each weight matter: the mean squared activations that reach them, as an importance matrix.

In: a packed model (with its adapter on, after training) and rows of tokens. Out: an `Imatrix` keyed by GGUF tensor
name: it tells the quantizer what to keep. `measure_importance` does what `llama-imatrix` does: every matrix of the
blocks, routers and experts included, each expert counted apart (tools/imatrix/imatrix.cpp of llama.cpp b11549).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.errors import TrainingError
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedExperts, PackedLinear

BATCH_TOKENS = 2048
"""Tokens that run through the layers together: each layer is dequantized once for all of them."""

_BLOCKS = "blk."
_EXPERT = "{expert}"


@torch.no_grad()
def gather_importance(packed: PackedModel, adapted: nn.Module, rows: Iterable[Tokenized]) -> Imatrix:
    """Run training rows once and sum squares; of plain linear layers only, because experts are not trained.

    Args:
        packed: names and layers of the model.
        adapted: what is run: the model inside its adapter.
    """
    layers = {name: [layer] for name, layer in layers_by_gguf_name(packed).items()}
    was_training = adapted.training
    adapted.eval()
    n_rows = 0
    with _watching(layers) as meters:
        for row in rows:
            n_rows += 1
            device = next(adapted.parameters()).device
            adapted(input_ids=torch.tensor([row.input_ids], device=device), labels=torch.tensor([row.labels]))
    adapted.train(was_training)
    return Imatrix(_entries(meters), datasets=("training",), chunk_count=n_rows, chunk_size=1)


@torch.no_grad()
def measure_importance(
    packed: PackedModel,
    windows: Sequence[Sequence[int]],
    *,
    dataset: str,
    advance: Callable[[int], None] | None = None,
) -> Imatrix:
    """What `llama-imatrix` gathers: sums of squares for every matrix of the blocks.

    Args:
        windows: token ids, all of one length: the chunks.
        dataset: what the file will call the text.
        advance: told of the tokens that were read.

    Raises:
        TrainingError: an activation is not a finite number; the tensor is named.
    """
    length = len(windows[0])
    at_once = max(1, BATCH_TOKENS // length)
    device = next(packed.model.parameters()).device
    packed.model.eval()
    with _watching(block_layers(packed)) as meters:
        for start in range(0, len(windows), at_once):
            batch = torch.tensor([list(window) for window in windows[start : start + at_once]], device=device)
            # the head is left out, as llama-imatrix leaves it out; transformers calls what is below it base_model
            packed.model.base_model(input_ids=batch, use_cache=False)
            if advance:
                advance(batch.numel())
    entries = _entries(meters)
    for name, entry in entries.items():
        if not np.isfinite(entry.sums).all():
            raise TrainingError(
                f"The activations that reach {name!r} are not finite numbers",
                why="The model's weights are damaged, or it overflows on this text.",
                next="Make the model again from a source that is whole.",
            )
    return Imatrix(entries, datasets=(dataset,), chunk_count=len(windows), chunk_size=length)


def layers_by_gguf_name(packed: PackedModel) -> dict[str, PackedLinear]:
    """The plain linear layers, each under the name of its tensor in the file (experts are left out)."""
    layers = {}
    for name, module in _modules(packed):
        if isinstance(module, PackedLinear):
            layers[name] = module
    return layers


def block_layers(packed: PackedModel) -> dict[str, list[nn.Module]]:
    """What multiplies by each matrix of the blocks, by its name in the file: one layer, or one for each expert."""
    layers: dict[str, list[nn.Module]] = {}
    for name, module in _modules(packed):
        is_matrix = len(packed.file.tensors[name].shape) > 1
        if isinstance(module, nn.Module) and name.startswith(_BLOCKS) and is_matrix:
            layers[name] = [module]
    layers.update(expert_layers(packed))
    return layers


def expert_layers(packed: PackedModel) -> dict[str, list[nn.Module]]:
    """The layers of every expert, in order, under the name of the tensor that stacks them."""
    layers: dict[str, list[nn.Module]] = {}
    for name in packed.file.tensors:
        address = packed.family.address_by_gguf_name(name)
        if address is None or _EXPERT not in address.row.hf_name:
            continue
        path, _, leaf = address.row.hf_name.format(layer=address.layer, expert=_EXPERT).partition(f".{_EXPERT}.")
        experts = packed.model.get_submodule(path)
        if isinstance(experts, PackedExperts):
            layers[name] = [expert.get_submodule(leaf.removesuffix(".weight")) for expert in experts]
    return layers


def _modules(packed: PackedModel) -> Iterator[tuple[str, nn.Module]]:
    """Each weight with a module of its own, out of its adapter."""
    for name in packed.file.tensors:
        address = packed.family.address_by_gguf_name(name)
        if address is None or not address.row.hf_name or _EXPERT in address.row.hf_name:
            continue
        path, _, leaf = address.hf_name.rpartition(".")
        if leaf == "weight":
            module: Any = packed.model.get_submodule(path) if path else packed.model
            yield name, getattr(module, "base_layer", module)


class _Meter:
    """Sums and counts for the layers of one tensor, a row for each."""

    def __init__(self, n_rows: int) -> None:
        self.counts = np.zeros(n_rows, np.int64)
        self._n_rows = n_rows
        self._sums: torch.Tensor | None = None

    def add(self, row: int, inputs: torch.Tensor) -> None:
        """Inputs [..., columns] of the layer `row`."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._sums is None:
            self._sums = torch.zeros(self._n_rows, flat.shape[1], device=flat.device)
        # without the array of squares
        self._sums[row] += torch.linalg.vector_norm(flat, dim=0).square_()
        self.counts[row] += flat.shape[0]

    @property
    def entry(self) -> ImatrixEntry | None:
        return None if self._sums is None else ImatrixEntry(self._sums.cpu().numpy(), self.counts)


@contextlib.contextmanager
def _watching(layers: Mapping[str, Sequence[nn.Module]]) -> Iterator[dict[str, _Meter]]:
    """Inside the block every input of these layers is summed."""
    meters = {name: _Meter(len(modules)) for name, modules in layers.items()}
    hooks = [
        module.register_forward_pre_hook(_reading(meters[name], row), prepend=True)  # before any rounding
        for name, modules in layers.items()
        for row, module in enumerate(modules)
    ]
    try:
        yield meters
    finally:
        for hook in hooks:
            hook.remove()


def _reading(meter: _Meter, row: int) -> Callable[[nn.Module, Any], None]:
    def read(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        meter.add(row, inputs[0])

    return read


def _entries(meters: Mapping[str, _Meter]) -> dict[str, ImatrixEntry]:
    return {name: meter.entry for name, meter in meters.items() if meter.entry is not None}
