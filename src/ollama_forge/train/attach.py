"""Adapters on a packed model for as long as it is scored: B(Ax) is added to what each layer gives.

In: a packed model, and adapters that fit it (`weights.adapter_fit`), in any form that llama.cpp can run as an adapter.
Out: the model with hooks on its linear layers, taken off again at the end. Nothing is trained and nothing merged; what
trains is peft's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ollama_forge.errors import AdapterError
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedEmbedding, PackedLinear
from ollama_forge.transform.lora import WeightedAdapter
from ollama_forge.transform.lora_gguf import require_expressible
from ollama_forge.weights.adapter_fit import FittedPair


@contextlib.contextmanager
def attached(packed: PackedModel, adapters: Sequence[WeightedAdapter]) -> Iterator[None]:
    """Inside the block the model answers with the adapters on, each at its own strength.

    Raises:
        AdapterError: only a merge could express one of them (DoRA, replaced tensors, a changed bias); the tensor is
            named.
    """
    for adapter in adapters:
        require_expressible(adapter.fitted)
    with contextlib.ExitStack() as undo:
        for adapter in adapters:
            for pair in adapter.fitted.pairs:
                layer = find_layer(packed, pair)
                undo.callback(layer.register_forward_hook(_adding(layer, pair, adapter.weight)).remove)
        yield


def find_layer(packed: PackedModel, pair: FittedPair) -> PackedLinear | PackedEmbedding:
    """The layer that a pair changes.

    Raises:
        AdapterError: the packed model has none there.
    """
    row, home = pair.home.row, pair.home
    found: nn.Module | None = None
    if row is not None:
        path = row.hf_name.format(layer=home.layer, expert=home.expert).rpartition(".")[0]
        with contextlib.suppress(AttributeError):
            found = packed.model.get_submodule(path)
    if not isinstance(found, (PackedLinear, PackedEmbedding)):
        raise AdapterError(
            f"The adapter's tensor {pair.pair.b.name!r} changes {pair.gguf_name!r}, which is no layer that can be run "
            "with an adapter here",
            next="Merge it first: ollama-forge merge BASE ADAPTER -o merged.gguf",
        )
    return found


def _adding(layer: PackedLinear | PackedEmbedding, pair: FittedPair, weight: float) -> Callable[..., Any]:
    """A forward hook. The outputs of a packed layer stand in Hugging Face's order, the pair in GGUF's."""
    a = torch.from_numpy(pair.read_a()).to(layer.matrix.device)
    b = torch.from_numpy(pair.read_b() * (weight * pair.pair.scale)).to(layer.matrix.device)
    b = layer.matrix.from_rope_order(b, 0)

    def add_product(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        return output + (x.float() @ a.t() @ b.t()).to(output.dtype)

    def add_rows(_layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        rows = b[inputs[0]] @ a
        scale = getattr(layer, "embed_scale", None)
        return output + (rows if scale is None else rows * scale.to(rows.dtype))

    return add_rows if isinstance(layer, PackedEmbedding) else add_product
