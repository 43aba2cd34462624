"""What a smaller model keeps of a larger one, and along which axes each of its tensors is cut for that.

In: the sizes of a model and a `Cut` (kept layers, channels, key-value heads, experts). Out: for each tensor row of the
family the indices that stay, per axis, in GGUF's shapes. Pure: which indices are worth keeping is `ranking`'s business,
moving the bytes is `prune`'s (GGUF) and `prune_folder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ollama_forge.arch import layout
from ollama_forge.arch.rows import Residual, Role, TensorRow
from ollama_forge.errors import UnsupportedError, UsageError
from ollama_forge.weights.checkpoint import Checkpoint, TensorKey

Indices = NDArray[np.int64]

EXPERT_ROLES = frozenset({Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN})
# Norms whose scale runs along the residual stream; those of single heads do not.
_STREAM_NORMS = frozenset(
    {Role.ATTENTION_NORM, Role.ATTENTION_POST_NORM, Role.FFN_NORM, Role.FFN_POST_NORM, Role.OUTPUT_NORM}
)
# llama.cpp gives these a query projection as wide as the residual stream (src/models/gpt2.cpp, phi3.cpp, qwen2.cpp).
_HEADS_FILL_STREAM = frozenset({"gpt2", "phi3", "qwen2"})
# Every so many layers the kind of attention repeats, counted from the first (src/models/gemma2.cpp, gemma3.cpp).
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
# With exactly so many layers llama.cpp scales attention scores by the stream's width, not by the head's (ibid.).
_SCALE_BY_DEPTH = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class ModelSizes:
    """The numbers of a model that a cut can change.

    Attributes:
        hidden: channels of the residual stream.
        ffn: channels between the feed-forward matrices; of one expert in a mixture.
        n_experts: 0 for a dense model.
        period: layers after which the kinds of layers repeat; 1 where all are alike.
        fills_stream: query heads times their size must be `hidden`.
        is_scaled_by_depth: the number of layers decides how attention scores are scaled.
    """

    n_layers: int
    hidden: int
    ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int = 0
    n_experts_used: int = 0
    period: int = 1
    fills_stream: bool = False
    is_scaled_by_depth: bool = False

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.n_heads // self.n_kv_heads


@dataclass(frozen=True, eq=False)
class Cut:
    """What stays, as ascending indices into the source; None: all of it.

    Attributes:
        layers: [kept].
        ffn: [source layers, kept].
        kv_heads: [source layers, kept]; the query heads that share a key-value head stay or go with it.
        hidden: [kept], the same in all layers.
        experts: [source layers, kept].
    """

    layers: Indices | None = None
    ffn: Indices | None = field(default=None, repr=False)
    kv_heads: Indices | None = field(default=None, repr=False)
    hidden: Indices | None = field(default=None, repr=False)
    experts: Indices | None = field(default=None, repr=False)

    @property
    def is_depth_only(self) -> bool:
        return self.ffn is None and self.kv_heads is None and self.hidden is None and self.experts is None


def read_sizes(checkpoint: Checkpoint) -> ModelSizes:
    """The sizes of a model, from its configuration and the shapes of its tensors.

    Raises:
        FormatError: the configuration lacks a number, or gives one for each layer.
        UnsupportedError: the first layer has no feed-forward part.
    """
    config, family = checkpoint.config, checkpoint.family
    n_experts = int(config.n_experts or 0)
    period = _PERIODS.get(family.name, 1)
    if family.name in _PERIODS:
        metadata = checkpoint.gguf.arch_value("attention.sliding_window_pattern") if checkpoint.gguf else None
        given = metadata or config.values.get("sliding_window_pattern") or config.values.get("_sliding_window_pattern")
        period = given if isinstance(given, int) and given > 0 else period
    return ModelSizes(
        n_layers=config.n_layers,
        hidden=config.hidden_size,
        ffn=_ffn_channels(checkpoint),
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        n_experts=n_experts,
        n_experts_used=config.count("num_experts_per_tok", "num_experts_per_token") if n_experts else 0,
        period=period,
        fills_stream=family.name in _HEADS_FILL_STREAM,
        is_scaled_by_depth=_SCALE_BY_DEPTH.get(family.name) == config.n_layers,
    )


def _ffn_channels(checkpoint: Checkpoint) -> int:
    for key in (TensorKey(Role.FFN_DOWN, 0), TensorKey(Role.EXPERT_DOWN, 0, 0)):
        tensor = checkpoint.tensors.get(key)
        if tensor is not None:
            shape = tensor.spec.shape
            return (shape if checkpoint.is_gguf else layout.hf_shape(shape, tensor.row.transform))[-1]
    raise UnsupportedError(
        f"The first layer of {str(checkpoint.path)!r} has no feed-forward part",
        why="Only models whose layers are all built alike can be cut.",
    )


def sizes_after(sizes: ModelSizes, cut: Cut) -> ModelSizes:
    """The sizes of the smaller model."""
    n_kv_heads = sizes.n_kv_heads if cut.kv_heads is None else cut.kv_heads.shape[1]
    return ModelSizes(
        n_layers=sizes.n_layers if cut.layers is None else len(cut.layers),
        hidden=sizes.hidden if cut.hidden is None else len(cut.hidden),
        ffn=sizes.ffn if cut.ffn is None else cut.ffn.shape[1],
        n_heads=n_kv_heads * sizes.group,
        n_kv_heads=n_kv_heads,
        head_dim=sizes.head_dim,
        n_experts=sizes.n_experts if cut.experts is None else cut.experts.shape[1],
        n_experts_used=sizes.n_experts_used,
        period=sizes.period,
        fills_stream=sizes.fills_stream,
        is_scaled_by_depth=sizes.is_scaled_by_depth,
    )


def validate_cut(sizes: ModelSizes, cut: Cut) -> None:
    """Refuse what makes no model, before a weight is read.

    Raises:
        UsageError: nothing would be left, nothing would be cut, or the pieces would not fit each other.
        UnsupportedError: llama.cpp would compute the result differently.
    """
    after = sizes_after(sizes, cut)
    for name, (has, keeps) in {
        "layers": (sizes.n_layers, after.n_layers),
        "feed-forward channels": (sizes.ffn, after.ffn),
        "key-value heads": (sizes.n_kv_heads, after.n_kv_heads),
        "hidden channels": (sizes.hidden, after.hidden),
        "experts": (sizes.n_experts, after.n_experts),
    }.items():
        if keeps > has or (has and keeps < 1):
            raise UsageError(
                f"The model has {has:,} {name}, and {keeps:,} should be kept",
                why="At least one must stay, and none can be added.",
                next="See what there is, without changing anything: ollama-forge downsize prune REF --dry-run",
            )
    if after == sizes:
        raise UsageError(
            "Nothing would be cut", why="What should be kept is all there is.", next="Ask for less: --keep 70%"
        )
    if after.n_experts and after.n_experts < sizes.n_experts_used:
        raise UsageError(
            f"{after.n_experts} experts would be left, and each token goes to {sizes.n_experts_used}",
            why="A token needs as many experts as the model was trained to choose.",
            next=f"Keep at least {sizes.n_experts_used}: --width experts={sizes.n_experts_used}",
        )
    if sizes.fills_stream and after.n_heads * after.head_dim != after.hidden:
        raise UsageError(
            f"{after.n_heads} heads of {after.head_dim} do not make up {after.hidden} hidden channels",
            why="In this family the query heads must be as wide as the residual stream.",
            next=f"Cut both alike: --width hidden={after.n_heads * after.head_dim},heads={after.n_heads}",
        )
    if sizes.is_scaled_by_depth:
        raise UnsupportedError(
            f"This model has {sizes.n_layers} layers, and llama.cpp scales its attention by that number",
            why="With another number of layers or channels it would scale the scores differently, and answer worse.",
            next="Cut a smaller model of the family.",
        )
    if cut.layers is not None:
        require_kinds(sizes, cut.layers)


def require_kinds(sizes: ModelSizes, layers: Indices) -> None:
    """Refuse a choice of layers after which a layer would stand where another kind of layer belongs.

    Raises:
        UsageError: with the layer that would change its kind.
    """
    for place, layer in enumerate(layers.tolist()):
        if place % sizes.period != layer % sizes.period:
            raise UsageError(
                f"Layer {layer} would become layer {place}, which is of another kind in this family",
                why=f"Sliding and full attention take turns every {sizes.period} layers, counted from the first.",
                next=f"Cut {sizes.period} neighbouring layers, or a multiple of them.",
            )


def kept_axes(row: TensorRow, layer: int | None, sizes: ModelSizes, cut: Cut) -> dict[int, Indices]:
    """Which indices of a tensor stay: axis of the GGUF shape (negative, from the end) -> indices. Empty: all of it.

    Experts of a stack are on axis -3. Layers and single experts are the caller's.
    """
    axes: dict[int, Indices] = {}
    if cut.hidden is not None:
        if row.role in _STREAM_NORMS:
            axes[-1] = cut.hidden
        elif row.residual is not Residual.NONE:
            axes[row.residual_axis] = cut.hidden
    if layer is not None:
        axes |= _layer_axes(row, layer, sizes, cut)
    return axes


def _layer_axes(row: TensorRow, layer: int, sizes: ModelSizes, cut: Cut) -> Mapping[int, Indices]:
    outputs = -1 if row.is_bias else -2
    if cut.kv_heads is not None and (found := _head_axes(row, cut.kv_heads[layer], sizes, outputs)):
        return found
    if cut.ffn is not None:
        channels = cut.ffn[layer]
        if row.role in (Role.FFN_GATE, Role.FFN_UP):
            return {outputs: channels}
        if row.role is Role.FFN_GATE_UP:
            return {outputs: np.concatenate([channels, channels + sizes.ffn])}
        if row.role is Role.FFN_DOWN and not row.is_bias:
            return {-1: channels}
    if cut.experts is not None:
        if row.role in EXPERT_ROLES:
            return {-3: cut.experts[layer]}
        if row.role is Role.ROUTER:
            return {outputs: cut.experts[layer]}
    return {}


def _head_axes(row: TensorRow, kv_heads: Indices, sizes: ModelSizes, outputs: int) -> Mapping[int, Indices]:
    heads = spread(kv_heads, sizes.group)
    queries, keys = spread(heads, sizes.head_dim), spread(kv_heads, sizes.head_dim)
    if row.role is Role.ATTENTION_QUERY:
        return {outputs: queries}
    if row.role in (Role.ATTENTION_KEY, Role.ATTENTION_VALUE):
        return {outputs: keys}
    if row.role is Role.ATTENTION_QKV:
        first = sizes.n_heads * sizes.head_dim
        second = first + sizes.n_kv_heads * sizes.head_dim
        return {outputs: np.concatenate([queries, keys + first, keys + second])}
    if row.role is Role.ATTENTION_OUTPUT and not row.is_bias:
        return {-1: queries}
    return {}


def spread(indices: Indices, size: int) -> Indices:
    """Indices of groups -> the indices of their `size` members each, in order."""
    result: Indices = (indices[:, None] * size + np.arange(size, dtype=np.int64)).reshape(-1)
    return result
