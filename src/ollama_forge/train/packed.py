"""Frozen layers whose weights stay the blocks of a GGUF file.

In: views of the memory-mapped blocks. Out: torch modules that multiply by them (`PackedLinear`), look rows up in them
(`PackedEmbedding`) and route tokens through stacks of them (`PackedExperts`). Blocks are turned into numbers a piece at
a time, in forward and again in backward, inside one `Workspace` that all layers of a model share; no weight has a
gradient and nothing keeps a dequantized copy. Which blocks belong to which layer is `train.load`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ollama_forge.errors import TrainingError, UnsupportedError
from ollama_forge.train.blocks import PackedMatrix, Workspace, write_rows
from ollama_forge.train.tape import find_product, offer_product


class _Multiply(torch.autograd.Function):
    """x [n, columns] times the matrix transposed, added to `onto` [n, rows] where that lies -> [n, rows], in the file's
    row order. Saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, onto: torch.Tensor | None, matrix: PackedMatrix, workspace: Workspace
    ) -> torch.Tensor:
        ctx.matrix, ctx.workspace = matrix, workspace
        kept = find_product(matrix)
        if kept is not None:
            return kept
        out = products(x, matrix, workspace, onto)
        if onto is not None:
            ctx.mark_dirty(onto)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_x = sum_products(gradient, ctx.matrix, ctx.workspace) if ctx.needs_input_grad[0] else None
        return d_x, gradient if ctx.needs_input_grad[1] else None, None, None


def products(
    x: torch.Tensor, matrix: PackedMatrix, workspace: Workspace, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, columns] -> x W^T [n, rows], rows in the file's order, added to `onto` if given; no gradient follows it."""
    out = x.new_empty(x.shape[0], matrix.rows) if onto is None else onto
    with workspace.pieces(matrix, x) as pieces:
        for start, end, values in pieces:
            part = out[:, start:end]
            if onto is None:
                torch.mm(x, values.t(), out=part)
            else:
                part.addmm_(x, values.t())
    workspace.heap.note(out)
    return out


def sum_products(gradient: torch.Tensor, matrix: PackedMatrix, workspace: Workspace) -> torch.Tensor:
    """gradient [n, rows], rows in the file's order -> gradient W [n, columns]; asks for the rows backwards."""
    total = gradient.new_empty(gradient.shape[0], matrix.columns)
    is_first = True
    with workspace.pieces(matrix, gradient, reverse=True) as pieces:
        for start, end, values in pieces:
            if is_first:
                torch.mm(gradient[:, start:end], values, out=total)
                is_first = False
            else:
                total.addmm_(gradient[:, start:end], values)
    workspace.heap.note(total)
    return total


def multiply(x: torch.Tensor, matrix: PackedMatrix, workspace: Workspace) -> torch.Tensor:
    """x [..., columns] times the matrix transposed -> [..., rows], differentiable in x; autocast is followed."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    product = multiply_rows(x.reshape(-1, matrix.columns), matrix, workspace)
    return product.reshape(*x.shape[:-1], matrix.rows)


def multiply_rows(
    x: torch.Tensor, matrix: PackedMatrix, workspace: Workspace, onto: torch.Tensor | None = None
) -> torch.Tensor:
    """x [n, columns] -> x W^T [n, rows], differentiable.

    Args:
        onto: [n, rows] in the file's row order: the product is added to it, and its memory becomes the result's.
    """
    product = _Multiply.apply(x, onto, matrix, workspace)
    offer_product(matrix, product)
    return matrix.from_rope_order(product, 1)


class PackedWeight(torch.Tensor):
    """What `.weight` of a packed layer shows: shape, dtype and device are free, any arithmetic dequantizes first.

    Written for readers (DoRA norms, TRL's slices of the head, initialisers that look at the base). Writing into it is
    refused: the blocks are a file.
    """

    matrix: PackedMatrix

    @staticmethod
    def __new__(cls, matrix: PackedMatrix) -> PackedWeight:
        shape = (matrix.rows, matrix.columns)
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.float32, device=matrix.device
        )
        weight.matrix = matrix
        return weight

    @property
    def data(self) -> PackedWeight:
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise _read_only("Setting .data")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.matrix.type.name}, shape={tuple(self.shape)}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return PackedWeight(args[0].matrix)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, PackedWeight)
        ]
        if written:
            raise _read_only(str(func))
        if func is torch.ops.aten.slice.Tensor and _is_row_slice(args):
            return _row_slice(*args)
        return func(*(_opened(value) for value in args), **{key: _opened(value) for key, value in kwargs.items()})


def _read_only(action: str) -> UnsupportedError:
    return UnsupportedError(
        f"{action} would change a weight that is a GGUF file's blocks",
        why="Packed weights are read-only.",
        next="Use an initialisation that leaves the base as it is, or merge with: ollama-forge merge",
    )


def _opened(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.matrix.dequantized()
    if isinstance(value, (list, tuple)):
        return type(value)(_opened(item) for item in value)
    return value


def _is_row_slice(args: tuple[Any, ...]) -> bool:
    dim = args[1] if len(args) > 1 else 0
    step = args[4] if len(args) > 4 else 1
    return dim == 0 and step == 1 and not args[0].matrix.rope_heads


def _row_slice(
    weight: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    first, last, _ = slice(start, end).indices(weight.matrix.rows)
    return replace(weight.matrix, blocks=weight.matrix.read()[first:last], lender=None).dequantized()


class PackedLinear(nn.Linear):
    """`nn.Linear` over GGUF blocks: y = x W^T + b. To peft it is a Linear that it can wrap.

    Args:
        matrix: the weight, [out_features, in_features].
        bias: float [out_features] in Hugging Face's row order, or None; frozen.
        workspace: shared by all layers of a model.
    """

    def __init__(self, matrix: PackedMatrix, bias: torch.Tensor | None, workspace: Workspace) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        self.workspace = workspace
        self.in_features = matrix.columns
        self.out_features = matrix.rows
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    # Blocks are no buffer: data-parallel training would broadcast buffers, that is write into the mapped file.
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)
        self.matrix = self.matrix.moved(fn)
        return self

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self.matrix)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = multiply(input, self.matrix, self.workspace)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, type={self.matrix.type.name}"


class PackedEmbedding(nn.Embedding):
    """`nn.Embedding` over GGUF blocks: only the rows that a batch asks for are dequantized.

    Args:
        matrix: the table, [num_embeddings, embedding_dim].
        padding_idx: as in `nn.Embedding`; kept for those who read it.
        embed_scale: what every row is multiplied by (Gemma's square root of the width), a scalar tensor, or None; peft
            looks for it under this name.
    """

    def __init__(
        self, matrix: PackedMatrix, padding_idx: int | None = None, embed_scale: torch.Tensor | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.matrix = matrix
        if embed_scale is not None:
            self.register_buffer("embed_scale", embed_scale, persistent=False)
        self.num_embeddings = matrix.rows
        self.embedding_dim = matrix.columns
        self.padding_idx = padding_idx
        self.max_norm: float | None = None
        self.norm_type = 2.0
        self.scale_grad_by_freq = False
        self.sparse = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedEmbedding:
        super()._apply(fn, recurse)
        self.matrix = self.matrix.moved(fn)
        return self

    @property
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self.matrix)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ids = input.reshape(-1)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.num_embeddings):
            raise TrainingError(
                f"token ids reach from {int(ids.min())} to {int(ids.max())}",
                why=f"The model's table has {self.num_embeddings} rows.",
                next="Tokenize with the tokenizer of this very model.",
            )
        wanted, places = torch.unique(ids, return_inverse=True)
        rows = torch.empty(wanted.numel(), self.embedding_dim, device=input.device)
        blocks = self.matrix.blocks
        write_rows(blocks[wanted.to(blocks.device)], self.matrix.type, rows)
        scale = getattr(self, "embed_scale", None)
        if scale is not None:
            rows *= scale.to(rows.dtype)
        return rows[places].reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, type={self.matrix.type.name}"


class PackedExpert(nn.Module):
    """One expert of a mixture: down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        gate_proj: PackedLinear,
        up_proj: PackedLinear,
        down_proj: PackedLinear,
        activation: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return product


class PackedExperts(nn.ModuleList):
    """The experts of one layer, each with linear layers of its own that peft can wrap (`experts.3.up_proj`).

    Stands where transformers has one module with stacked parameters, and takes the same arguments.
    """

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [n, width], top_k_index and top_k_weights [n, k] -> [n, width]."""
        n_chosen = top_k_index.shape[-1]
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=len(self)).tolist()
        mixed = torch.zeros_like(hidden_states)
        for expert, slots in zip(self, torch.split(order, counts), strict=True):
            if slots.numel() == 0:
                continue
            tokens = slots // n_chosen
            weights = top_k_weights.reshape(-1)[slots].unsqueeze(-1)
            mixed = mixed.index_add(0, tokens, (expert(hidden_states[tokens]) * weights).to(mixed.dtype))
        return mixed
