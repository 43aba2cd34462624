"""Rows that several families share: the parts of a transformer decoder as transformers spells them.

In: nothing. Out: tuples of rows, which a family file joins, changes or leaves out.
GGUF names: gguf-py/gguf/constants.py of llama.cpp (`TENSOR_NAMES`, `Keys`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.rows import HyperRow, Residual, Role, TensorRow, Transform
from ollama_forge.gguf.types import ValueType

LAYER = "model.layers.{layer}."
BLOCK = "blk.{layer}."


def weight_and_bias(row: TensorRow, *, bias_is_optional: bool = True) -> tuple[TensorRow, TensorRow]:
    """A matrix and the vector added to its result; the vector runs along the rows of the matrix."""
    bias = replace(
        row,
        hf_name=row.hf_name.removesuffix("weight") + "bias",
        gguf_name=row.gguf_name.removesuffix("weight") + "bias",
        is_bias=True,
        is_optional=bias_is_optional or row.is_optional,
        transform=Transform.NONE if row.transform is Transform.TRANSPOSE else row.transform,
        residual=Residual.WRITES if row.residual is Residual.WRITES else Residual.NONE,
        residual_axis=-1,
    )
    return row, bias


def matrix(role: Role, hf_name: str, gguf_name: str, **more: Any) -> tuple[TensorRow, ...]:
    """A matrix of a layer that reads the residual stream with its columns, and its bias where there is one."""
    row = TensorRow(role, LAYER + hf_name, BLOCK + gguf_name, residual=Residual.READS, **more)
    return weight_and_bias(row)


def writer(role: Role, hf_name: str, gguf_name: str, **more: Any) -> tuple[TensorRow, ...]:
    """A matrix of a layer that writes the residual stream with its rows."""
    row = TensorRow(role, LAYER + hf_name, BLOCK + gguf_name, residual=Residual.WRITES, residual_axis=-2, **more)
    return weight_and_bias(row)


def norm(role: Role, hf_name: str, gguf_name: str, transform: Transform = Transform.NONE) -> TensorRow:
    """A scale of a layer's normalization."""
    return TensorRow(role, LAYER + hf_name, BLOCK + gguf_name, transform=transform)


def ends(norm_transform: Transform = Transform.NONE) -> tuple[TensorRow, ...]:
    """Embedding, last norm and head. The head is not there when it is tied to the embedding."""
    return (
        TensorRow(Role.TOKEN_EMBEDDING, "model.embed_tokens.weight", "token_embd.weight", residual=Residual.WRITES),
        TensorRow(Role.OUTPUT_NORM, "model.norm.weight", "output_norm.weight", transform=norm_transform),
        TensorRow(Role.OUTPUT, "lm_head.weight", "output.weight", residual=Residual.READS, is_optional=True),
    )


def attention(query: Transform = Transform.NONE, key: Transform = Transform.NONE) -> tuple[TensorRow, ...]:
    """Separate query, key and value projections, and the output projection; with biases where a model has them."""
    return (
        *matrix(Role.ATTENTION_QUERY, "self_attn.q_proj.weight", "attn_q.weight", transform=query),
        *matrix(Role.ATTENTION_KEY, "self_attn.k_proj.weight", "attn_k.weight", transform=key),
        *matrix(Role.ATTENTION_VALUE, "self_attn.v_proj.weight", "attn_v.weight"),
        *writer(Role.ATTENTION_OUTPUT, "self_attn.o_proj.weight", "attn_output.weight"),
    )


def query_key_norms(transform: Transform = Transform.NONE) -> tuple[TensorRow, ...]:
    """Norms of each head's query and key."""
    return (
        norm(Role.ATTENTION_QUERY_NORM, "self_attn.q_norm.weight", "attn_q_norm.weight", transform),
        norm(Role.ATTENTION_KEY_NORM, "self_attn.k_norm.weight", "attn_k_norm.weight", transform),
    )


def two_norms() -> tuple[TensorRow, ...]:
    """One norm before attention and one before the feed-forward part."""
    return (
        norm(Role.ATTENTION_NORM, "input_layernorm.weight", "attn_norm.weight"),
        norm(Role.FFN_NORM, "post_attention_layernorm.weight", "ffn_norm.weight"),
    )


def four_norms() -> tuple[TensorRow, ...]:
    """Gemma 2 and 3: norms before and after both parts, stored less one."""
    return (
        norm(Role.ATTENTION_NORM, "input_layernorm.weight", "attn_norm.weight", Transform.ADD_ONE),
        norm(
            Role.ATTENTION_POST_NORM,
            "post_attention_layernorm.weight",
            "post_attention_norm.weight",
            Transform.ADD_ONE,
        ),
        norm(Role.FFN_NORM, "pre_feedforward_layernorm.weight", "ffn_norm.weight", Transform.ADD_ONE),
        norm(Role.FFN_POST_NORM, "post_feedforward_layernorm.weight", "post_ffw_norm.weight", Transform.ADD_ONE),
    )


def gated_ffn() -> tuple[TensorRow, ...]:
    """down(activation(gate(x)) * up(x))."""
    return (
        *matrix(Role.FFN_GATE, "mlp.gate_proj.weight", "ffn_gate.weight"),
        *matrix(Role.FFN_UP, "mlp.up_proj.weight", "ffn_up.weight"),
        *writer(Role.FFN_DOWN, "mlp.down_proj.weight", "ffn_down.weight"),
    )


IGNORED = (".rotary_emb.inv_freq", ".attention.masked_bias", ".attention.bias")
"""Buffers that older checkpoints carry; llama.cpp computes them."""

# What pictures and sound add to a text model; only the text part is converted.
OTHER_MODALITIES = ("vision_tower.", "vision_model.", "multi_modal_projector.", "audio_tower.", "visual.")


def uint32(gguf_key: str, *config_keys: str, is_required: bool = False) -> HyperRow:
    """A whole number that config.json holds as it is."""
    return HyperRow(gguf_key, ValueType.UINT32, config_keys, is_required=is_required)


def float32(gguf_key: str, *config_keys: str, is_required: bool = False) -> HyperRow:
    """A real number that config.json holds as it is."""
    return HyperRow(gguf_key, ValueType.FLOAT32, config_keys, is_required=is_required)


SIZES = (
    uint32("block_count", "num_hidden_layers", "n_layers", "n_layer", "num_layers", is_required=True),
    uint32("context_length", "max_position_embeddings", "n_ctx", "n_positions", "max_length"),
    uint32("embedding_length", "hidden_size", "n_embd", "dim", is_required=True),
    uint32("feed_forward_length", "intermediate_size", "n_inner", "hidden_dim"),
    uint32("attention.head_count", "num_attention_heads", "n_head", "n_heads", is_required=True),
    uint32("attention.head_count_kv", "num_key_value_heads", "n_kv_heads"),
)

RMS_EPSILON = float32("attention.layer_norm_rms_epsilon", "rms_norm_eps", "norm_eps")

HEAD_LENGTHS = (
    uint32("attention.key_length", "head_dim"),
    HyperRow("attention.value_length", ValueType.UINT32, ("head_dim",), turns_back=False),
)


def _rope_scaling_type(config: ModelConfig) -> str | None:
    rope = config.rope
    if rope.rope_type in ("linear", "yarn") and rope.factor is not None:
        return rope.rope_type
    return "longrope" if rope.rope_type in ("su", "longrope") else None


def _only_for(rope_types: tuple[str, ...], name: str) -> Any:
    def compute(config: ModelConfig) -> Any:
        rope = config.rope
        return getattr(rope, name) if rope.rope_type in rope_types and rope.factor is not None else None

    return compute


ROPE_FREQUENCY_BASE = HyperRow("rope.freq_base", ValueType.FLOAT32, compute=lambda config: config.rope.theta)

ROPE = (
    HyperRow("rope.scaling.type", ValueType.STRING, compute=_rope_scaling_type),
    HyperRow("rope.scaling.factor", ValueType.FLOAT32, compute=_only_for(("linear", "yarn"), "factor")),
    HyperRow(
        "rope.scaling.original_context_length",
        ValueType.UINT32,
        compute=_only_for(("yarn",), "original_context_length"),
    ),
    HyperRow("rope.scaling.yarn_ext_factor", ValueType.FLOAT32, compute=_only_for(("yarn",), "extrapolation_factor")),
    HyperRow("rope.scaling.yarn_attn_factor", ValueType.FLOAT32, compute=_only_for(("yarn",), "attention_factor")),
    HyperRow("rope.scaling.yarn_beta_fast", ValueType.FLOAT32, compute=_only_for(("yarn",), "beta_fast")),
    HyperRow("rope.scaling.yarn_beta_slow", ValueType.FLOAT32, compute=_only_for(("yarn",), "beta_slow")),
    ROPE_FREQUENCY_BASE,
)


def head_dim_from_heads(config: ModelConfig) -> int:
    """What transformers assumes when config.json gives no `head_dim`."""
    return config.hidden_size // config.n_heads


def heads_of_query(config: ModelConfig) -> int:
    """What transformers assumes when config.json gives no `num_key_value_heads`: one for each query head."""
    return config.n_heads
