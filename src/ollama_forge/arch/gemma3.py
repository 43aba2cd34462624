"""Gemma 3, the text part: sliding and full attention with a base frequency each. Example: google/gemma-3-1b-it."""

from collections.abc import Mapping
from typing import Any

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.decoder import (
    HEAD_LENGTHS,
    IGNORED,
    OTHER_MODALITIES,
    RMS_EPSILON,
    ROPE,
    SIZES,
    attention,
    ends,
    float32,
    four_norms,
    gated_ffn,
    query_key_norms,
)
from ollama_forge.arch.gemma2 import ACTIVATION
from ollama_forge.arch.rows import Expectation, Family, HyperRow, Transform
from ollama_forge.gguf.types import ValueType

_LAYERS_27B = 62


def _sliding_window(config: ModelConfig) -> int | None:
    return None if config.values.get("sliding_window_pattern") == 1 else config.values.get("sliding_window")


def turn_back(metadata: Mapping[str, Any], result: dict[str, Any]) -> None:
    """llama.cpp divides scores by the head's size, except in the 27 B model (src/models/gemma3.cpp)."""
    is_largest = metadata.get("block_count") == _LAYERS_27B
    per_head = result["hidden_size"] // result["num_attention_heads"]
    result["query_pre_attn_scalar"] = per_head if is_largest else result["head_dim"]
    if metadata.get("attention.sliding_window") is None:
        result["sliding_window_pattern"] = 1
    result["tie_word_embeddings"] = True


FAMILY = Family(
    name="gemma3_text",
    gguf_architecture="gemma3",
    hf_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    tensors=(*ends(Transform.ADD_ONE), *attention(), *query_key_norms(Transform.ADD_ONE), *four_norms(), *gated_ffn()),
    hypers=(
        *SIZES,
        *ROPE,
        HyperRow("rope.freq_base_swa", ValueType.FLOAT32, compute=lambda config: config.rope.theta_local),
        RMS_EPSILON,
        *HEAD_LENGTHS,
        float32("final_logit_softcapping", "final_logit_softcapping"),
        HyperRow("attention.sliding_window", ValueType.UINT32, ("sliding_window",), compute=_sliding_window),
    ),
    defaults={
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
    },
    rope_defaults={"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
    rope_by_layer_type=True,
    ignored=IGNORED,
    skipped=OTHER_MODALITIES,
    expectations=(
        ACTIVATION,
        Expectation("attn_logit_softcapping", (), "llama.cpp does not cap the scores of this family."),
        Expectation("use_bidirectional_attention", (False,), "llama.cpp computes this family with causal attention."),
    ),
    turn_back=turn_back,
    trims_vocabulary=True,
)
