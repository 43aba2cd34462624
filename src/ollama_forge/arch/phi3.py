"""Phi 3 and 4: fused projections, two sets of frequency factors. Example: microsoft/Phi-3-mini-4k-instruct."""

from collections.abc import Mapping
from typing import Any

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.decoder import (
    IGNORED,
    OTHER_MODALITIES,
    RMS_EPSILON,
    ROPE_FREQUENCY_BASE,
    SIZES,
    ends,
    heads_of_query,
    matrix,
    two_norms,
    writer,
)
from ollama_forge.arch.rope import longrope_attention_factor
from ollama_forge.arch.rows import ComputedTensor, Expectation, Family, HyperRow, Role, TensorRow
from ollama_forge.errors import FormatError
from ollama_forge.gguf.types import ValueType

LONG = TensorRow(Role.ROPE_FACTORS_LONG, "", "rope_factors_long.weight", is_optional=True)
SHORT = TensorRow(Role.ROPE_FACTORS_SHORT, "", "rope_factors_short.weight", is_optional=True)


def rotated_dimensions(config: ModelConfig) -> int:
    """How much of each head is turned."""
    factor = 1.0 if config.rope.partial_rotary_factor is None else config.rope.partial_rotary_factor
    return int(factor * config.hidden_size) // config.n_heads


def frequency_factors(config: ModelConfig) -> tuple[ComputedTensor, ...]:
    """The factors for long and for short contexts, which GGUF stores as tensors.

    Raises:
        FormatError: one list is missing or does not fit the heads.
    """
    long, short = config.rope.long_factor, config.rope.short_factor
    if not long:
        return ()
    wanted = rotated_dimensions(config) // 2
    if not short or len(long) != wanted or len(short) != wanted:
        raise FormatError(
            f"config.json has {len(long)} long and {len(short or ())} short factors for the positions",
            why=f"The model turns {wanted} pairs in each head and needs one of each for every pair.",
            next="Compare config.json with the one in the model's original repository.",
        )
    return ComputedTensor(LONG, long), ComputedTensor(SHORT, short)


def _attention_factor(config: ModelConfig) -> float | None:
    return longrope_attention_factor(config.rope, config.count("max_position_embeddings", "n_positions"))


def turn_back(metadata: Mapping[str, Any], result: dict[str, Any]) -> None:
    """`sliding_window` 0 means none; the original context stands beside the other sizes in Phi's configuration."""
    if not metadata.get("attention.sliding_window"):
        result["sliding_window"] = None
    if original := metadata.get("rope.scaling.original_context_length"):
        result["original_max_position_embeddings"] = original


FAMILY = Family(
    name="phi3",
    gguf_architecture="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    tensors=(
        *ends(),
        *matrix(Role.ATTENTION_QKV, "self_attn.qkv_proj.weight", "attn_qkv.weight"),
        *writer(Role.ATTENTION_OUTPUT, "self_attn.o_proj.weight", "attn_output.weight"),
        *matrix(Role.FFN_GATE_UP, "mlp.gate_up_proj.weight", "ffn_up.weight"),
        *writer(Role.FFN_DOWN, "mlp.down_proj.weight", "ffn_down.weight"),
        *two_norms(),
        LONG,
        SHORT,
    ),
    hypers=(
        *SIZES,
        HyperRow(
            "rope.scaling.original_context_length",
            ValueType.UINT32,
            compute=lambda config: config.rope.original_context_length,
        ),
        RMS_EPSILON,
        HyperRow("rope.dimension_count", ValueType.UINT32, compute=rotated_dimensions),
        ROPE_FREQUENCY_BASE,
        HyperRow("rope.scaling.attn_factor", ValueType.FLOAT32, compute=_attention_factor),
        HyperRow(
            "attention.sliding_window",
            ValueType.UINT32,
            ("sliding_window",),
            compute=lambda config: config.values.get("sliding_window") or 0,
        ),
    ),
    defaults={
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": heads_of_query,
    },
    rope_defaults={"partial_rotary_factor": 1.0},
    ignored=IGNORED,
    skipped=OTHER_MODALITIES,
    expectations=(Expectation("hidden_act", ("silu", "swish"), "llama.cpp computes this family with silu."),),
    computed=frequency_factors,
    turn_back=turn_back,
)
