"""Gemma 2: norms on both sides of each part, soft caps on scores and logits. Example: google/gemma-2-2b-it."""

from collections.abc import Mapping
from typing import Any

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.decoder import (
    HEAD_LENGTHS,
    IGNORED,
    OTHER_MODALITIES,
    RMS_EPSILON,
    SIZES,
    attention,
    ends,
    float32,
    four_norms,
    gated_ffn,
    uint32,
)
from ollama_forge.arch.rows import Expectation, Family, Transform

_LAYERS_27B = 46

ACTIVATION = Expectation(
    "hidden_activation", ("gelu_pytorch_tanh", "gelu"), "llama.cpp computes this family with the tanh form of gelu."
)


def turn_back(metadata: Mapping[str, Any], result: dict[str, Any]) -> None:
    """llama.cpp divides scores by the head's size, except in the 27 B model (src/models/gemma2.cpp)."""
    is_largest = metadata.get("block_count") == _LAYERS_27B
    per_head = result["hidden_size"] // result["num_attention_heads"]
    result["query_pre_attn_scalar"] = per_head if is_largest else result["head_dim"]


def attention_scalar(config: ModelConfig, layers_of_largest: int) -> int:
    """What llama.cpp takes the square root of to scale attention scores."""
    if config.n_layers == layers_of_largest:
        return config.hidden_size // config.n_heads
    return config.head_dim


FAMILY = Family(
    name="gemma2",
    gguf_architecture="gemma2",
    hf_architectures=("Gemma2ForCausalLM",),
    tensors=(
        *(row for row in ends(Transform.ADD_ONE) if row.hf_name != "lm_head.weight"),
        *attention(),
        *four_norms(),
        *gated_ffn(),
    ),
    hypers=(
        *SIZES,
        RMS_EPSILON,
        *HEAD_LENGTHS,
        float32("attn_logit_softcapping", "attn_logit_softcapping"),
        float32("final_logit_softcapping", "final_logit_softcapping"),
        uint32("attention.sliding_window", "sliding_window"),
    ),
    defaults={
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    ignored=(*IGNORED, "lm_head.weight"),
    skipped=OTHER_MODALITIES,
    expectations=(ACTIVATION,),
    turn_back=turn_back,
)
