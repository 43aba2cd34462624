"""Which columns of each weight matter: the mean squared activations that reach them, as an importance matrix.

In: a packed model with its adapter on, and rows of tokens. Out: an `Imatrix` keyed by GGUF tensor name. When the merged
weights are quantized again, it tells the quantizer what to keep (`merge --imatrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedLinear


@torch.no_grad()
def gather_importance(packed: PackedModel, adapted: nn.Module, rows: Iterable[Tokenized]) -> Imatrix:
    """Run the rows once and sum squares.

    Args:
        packed: names and layers of the model.
        adapted: what is run: the model inside its adapter.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}
    hooks = [
        layer.register_forward_pre_hook(_summing(name, sums, counts))
        for name, layer in layers_by_gguf_name(packed).items()
    ]
    was_training = adapted.training
    adapted.eval()
    n_rows = 0
    try:
        for row in rows:
            n_rows += 1
            device = next(adapted.parameters()).device
            adapted(input_ids=torch.tensor([row.input_ids], device=device), labels=torch.tensor([row.labels]))
    finally:
        for hook in hooks:
            hook.remove()
        adapted.train(was_training)
    entries = {
        name: ImatrixEntry(total.cpu().numpy()[None, :], np.array([counts[name]], dtype=np.int64))
        for name, total in sums.items()
    }
    return Imatrix(entries, datasets=("training",), chunk_count=n_rows, chunk_size=1)


def layers_by_gguf_name(packed: PackedModel) -> dict[str, PackedLinear]:
    """The plain linear layers, each under the name of its tensor in the file (experts are left out)."""
    layers = {}
    for name in packed.file.tensors:
        address = packed.family.address_by_gguf_name(name)
        if address is None or not address.row.hf_name or "{expert}" in address.row.hf_name:
            continue
        path, _, leaf = address.hf_name.rpartition(".")
        if leaf != "weight":
            continue
        module = packed.model.get_submodule(path) if path else packed.model
        wrapped = getattr(module, "base_layer", module)
        if isinstance(wrapped, PackedLinear):
            layers[name] = wrapped
    return layers


def _summing(name: str, sums: dict[str, torch.Tensor], counts: dict[str, int]) -> Callable[[nn.Module, Any], None]:
    def add(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        flat = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
        total = flat.square().sum(dim=0)
        sums[name] = sums[name] + total if name in sums else total
        counts[name] = counts.get(name, 0) + flat.shape[0]

    return add
