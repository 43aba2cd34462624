"""The blocks of packed layers, shared out: of several processes that train together each keeps one part of each layer.

In: models whose layers are packed, and processes that torch.distributed has joined. Out: a `with` block inside which a
layer asks all processes for their parts when its turn comes, and forgets them two layers later. It is what FSDP does
(Zhao et al. 2023, arXiv 2304.11277, section 3), for weights that are frozen and packed: four bits travel as four bits,
nothing is gathered for the optimizer, and torch's FSDP, which wants to own float parameters, is not needed. `accelerate
launch --use_fsdp` asks for it.

Gathering is collective, so all processes must meet the same layers in the same order. They do: each pass goes through
all layers, however long its rows are. What differs between processes (which experts are met, what a cache still holds)
stays within a layer. Embedding and head, of which each process takes other rows and chunks, are not shared out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ollama_forge.train.blocks import PackedMatrix
from ollama_forge.train.packed import PackedLinear
from ollama_forge.train.unpack import UNPACKED_TYPES

_ALIGNMENT_BYTES = 64


@contextlib.contextmanager
def sharing_blocks(models: Sequence[nn.Module], device: torch.device) -> Iterator[list[SharedModel]]:
    """Inside the block each process keeps its part of the layers on `device`; all of them run every pass together.

    Begin before the models move to the device: only parts go there. Without models nothing happens.
    """
    if not models:
        yield []
        return
    group = dist.new_group()  # of its own: gradients are exchanged in between
    shared = [SharedModel(model, device, group) for model in models]
    yield shared
    # not where a process failed: the others wait in the middle of a pass, and end with it
    for model in shared:
        model.give_back()
    dist.destroy_process_group(group)


class SharedModel:
    """The layers of one model; at most three of them are whole at a time: the last two, and the one on its way."""

    def __init__(self, model: nn.Module, device: torch.device, group: dist.ProcessGroup) -> None:
        self._group = group
        self._linear: list[PackedLinear] = []
        self._layers: list[_SharedLayer] = []
        self._whole: dict[int, torch.Tensor] = {}
        self._coming: tuple[int, torch.Tensor, dist.Work] | None = None
        self._last = 0
        for block in model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                self._share_out(block, device)

    @property
    def kept_bytes(self) -> int:
        """What this process keeps all the time."""
        return sum(layer.part.numel() for layer in self._layers)

    @property
    def layer_bytes(self) -> int:
        """What all processes keep together."""
        return sum(layer.places[-1].stop for layer in self._layers)

    def give_back(self) -> None:
        """Each layer reads its own blocks again."""
        if self._coming is not None:
            self._coming[2].wait()
        for module in self._linear:
            module.matrix = replace(module.matrix, lender=None)
            module.workspace.release()  # it remembers matrices
        self._whole.clear()
        self._layers.clear()

    def find_whole(self, number: int) -> torch.Tensor:
        """All bytes of a layer; every process asks for it at the same point of its work."""
        if number not in self._whole:
            self._whole[number] = self._receive(number)
            for old in [held for held in self._whole if held not in (number, self._last)]:
                del self._whole[old]
        if number != self._last:
            self._send_for(2 * number - self._last)
            self._last = number
        return self._whole[number]

    def _lend(self, number: int, place: slice, shape: torch.Size) -> torch.Tensor:
        return self.find_whole(number)[place].view(shape)

    def _receive(self, number: int) -> torch.Tensor:
        if self._coming is not None:
            expected, whole, work = self._coming
            self._coming = None
            work.wait()
            if expected == number:
                return whole
        return self._layers[number].gather()[0]

    def _send_for(self, number: int) -> None:
        """The layer that will probably be next, in the direction of the pass, sets out while this one is computed."""
        if self._coming is None and 0 <= number < len(self._layers) and number not in self._whole:
            whole, work = self._layers[number].gather(wait=False)
            assert work is not None
            self._coming = (number, whole, work)

    def _share_out(self, block: nn.Module, device: torch.device) -> None:
        linear = [m for m in block.modules() if isinstance(m, PackedLinear) and _can_lie_on(device, m.matrix)]
        if not linear:
            return
        number = len(self._layers)
        layer = _SharedLayer([module.matrix for module in linear], device, self._group)
        self._layers.append(layer)
        for module, place in zip(linear, layer.places, strict=True):
            lender = functools.partial(self._lend, number, place, module.matrix.blocks.shape)
            module.matrix = replace(module.matrix, lender=lender)
        self._linear += linear


class _SharedLayer:
    """The blocks of a layer's matrices, one after the other, cut into as many parts as there are processes."""

    def __init__(self, matrices: Sequence[PackedMatrix], device: torch.device, group: dist.ProcessGroup) -> None:
        self._group = group
        self.places: list[slice] = []
        end = 0
        for matrix in matrices:
            start = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            end = start + matrix.blocks.numel()
            self.places.append(slice(start, end))
        n_bytes = -(-end // dist.get_world_size())
        first = dist.get_rank() * n_bytes
        self.part = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
        for matrix, place in zip(matrices, self.places, strict=True):
            start, stop = max(place.start, first), min(place.stop, first + n_bytes)
            if start < stop:
                flat = matrix.blocks.reshape(-1)
                self.part[start - first : stop - first] = flat[start - place.start : stop - place.start]

    def gather(self, wait: bool = True) -> tuple[torch.Tensor, dist.Work | None]:
        """All parts, one after the other; with `wait` false they are on their way still."""
        whole = self.part.new_empty(self.part.numel() * dist.get_world_size())
        work = dist.all_gather_into_tensor(whole, self.part, group=self._group, async_op=not wait)
        return whole, work


def _can_lie_on(device: torch.device, matrix: PackedMatrix) -> bool:
    """Blocks that only ggml can read stay with the processor, in the mapped file, where they take no memory."""
    return device.type == "cpu" or matrix.type in UNPACKED_TYPES
