"""Qwen 2 and 2.5: biases on query, key and value. Example: Qwen/Qwen2.5-0.5B-Instruct."""

from ollama_forge.arch.decoder import (
    HEAD_LENGTHS,
    IGNORED,
    OTHER_MODALITIES,
    RMS_EPSILON,
    ROPE,
    SIZES,
    attention,
    ends,
    gated_ffn,
    heads_of_query,
    two_norms,
)
from ollama_forge.arch.rows import Expectation, Family

EXPECTATIONS = (
    Expectation("hidden_act", ("silu", "swish"), "llama.cpp computes this family with silu."),
    Expectation("use_sliding_window", (False,), "llama.cpp lets this family attend to the whole context."),
)

FAMILY = Family(
    name="qwen2",
    gguf_architecture="qwen2",
    hf_architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    tensors=(*ends(), *attention(), *gated_ffn(), *two_norms()),
    hypers=(*SIZES, *ROPE, RMS_EPSILON, *HEAD_LENGTHS),
    defaults={
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": heads_of_query,
    },
    ignored=IGNORED,
    skipped=OTHER_MODALITIES,
    expectations=EXPECTATIONS,
)
