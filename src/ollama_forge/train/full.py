"""Every weight of a GGUF as a number that can learn, and back into the same GGUF afterwards.

In: a packed model. Out: the same transformers model with plain float32 layers (four times its 16-bit size, and as much
again three times over for gradients and optimizer), then edits that put what was learnt into the file's own types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ollama_forge.arch.rows import TensorAddress, Transform
from ollama_forge.files import atomic_output
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.train.blocks import PackedMatrix
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedEmbedding, PackedLinear
from ollama_forge.transform.apply import EditedGGUF, plan_gguf_edit
from ollama_forge.transform.edits import Floats, RowChange, TensorEdit

_OTHER_MODALITIES = ("v.", "a.", "mm.")


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are multiplied by a number (Gemma's square root of the width)."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = super().forward(input)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(rows.dtype)


def unpack_weights(packed: PackedModel) -> None:
    """Replace every packed layer of the model by a float32 one that learns; a tied head stays tied."""
    shared: dict[int, nn.Parameter] = {}

    def numbers(matrix: PackedMatrix) -> nn.Parameter:
        # a tied head reads the very matrix of the embedding
        return shared.setdefault(matrix.blocks.data_ptr(), nn.Parameter(matrix.dequantized()))

    for name, module in list(packed.model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            linear.weight = numbers(module.matrix)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().clone())
            packed.model.set_submodule(name, linear)
        elif isinstance(module, PackedEmbedding):
            table = ScaledEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
            table.weight = numbers(module.matrix)
            scale = getattr(module, "embed_scale", None)
            if scale is not None:
                table.register_buffer("embed_scale", scale, persistent=False)
            packed.model.set_submodule(name, table)
    packed.model.requires_grad_(True)
    packed.workspace.release()


def plan_write_back(packed: PackedModel) -> EditedGGUF:
    """The file with what was learnt, each tensor in its own type; the model is read when its turn comes.

    Raises:
        UnsupportedError: a type that cannot be encoded without an importance matrix.
    """
    return plan_gguf_edit(packed.file, list(_edits(packed)))


def write_back(packed: PackedModel, output: Path) -> None:
    """Write that file."""
    plan = plan_write_back(packed)
    with atomic_output(output, overwrite=True, expected_bytes=plan.size_bytes) as sink:
        write_gguf(sink, plan.fields, plan.entries, alignment=plan.alignment)


def _edits(packed: PackedModel) -> Iterator[TensorEdit]:
    for name in packed.file.tensors:
        address = packed.family.address_by_gguf_name(name)
        if name.startswith(_OTHER_MODALITIES) or address is None or not address.row.hf_name:
            continue
        yield TensorEdit(name, _opener(packed, name, address))


def _opener(packed: PackedModel, name: str, address: TensorAddress) -> Callable[[], RowChange]:
    def open_tensor() -> RowChange:
        learnt = _learnt(packed, name, address)

        def change(first: int, rows: Floats) -> Floats:
            return learnt[first : first + rows.shape[0]]

        return change

    return open_tensor


def _learnt(packed: PackedModel, name: str, address: TensorAddress) -> Floats:
    """What a tensor has become, float32 [all its rows, columns], in the order of the file."""
    shape = packed.file.find_tensor(name).shape
    row = address.row
    if "{expert}" in row.hf_name:
        parts = [
            _parameter(packed.model, row.hf_name.format(layer=address.layer, expert=number))
            for number in range(shape[0])
        ]
        value = torch.stack([_in_file_order(packed, part, row.transform) for part in parts])
    else:
        value = _in_file_order(packed, _parameter(packed.model, address.hf_name), row.transform)
    flat: Floats = value.reshape(-1, shape[-1] if shape else 1).numpy().astype(np.float32, copy=False)
    return flat


def _parameter(model: nn.Module, hf_name: str) -> torch.Tensor:
    path, _, leaf = hf_name.rpartition(".")
    value: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return value.detach().float().cpu()


def _in_file_order(packed: PackedModel, value: torch.Tensor, transform: Transform) -> torch.Tensor:
    if transform is Transform.ADD_ONE:
        return value + 1
    if transform not in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
        return value
    heads = packed.file.arch_value("attention.head_count", 0)
    if transform is Transform.PERMUTE_KEY:
        heads = packed.file.arch_value("attention.head_count_kv", heads)
    halves = value.unflatten(0, (int(heads), 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
