"""Llama 2 and 3 (and every model that calls itself LlamaForCausalLM). Example: meta-llama/Llama-3.2-1B-Instruct."""

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
    gated_ffn,
    head_dim_from_heads,
    heads_of_query,
    two_norms,
    uint32,
)
from ollama_forge.arch.rope import llama3_factors
from ollama_forge.arch.rows import ComputedTensor, Expectation, Family, HyperRow, Role, TensorRow, Transform
from ollama_forge.gguf.types import ValueType

ROPE_FREQUENCIES = TensorRow(Role.ROPE_FREQUENCIES, "", "rope_freqs.weight", is_optional=True)

TENSORS = (
    *ends(),
    *attention(Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY),
    *gated_ffn(),
    *two_norms(),
    ROPE_FREQUENCIES,
)

HYPERS = (
    *SIZES,
    *ROPE,
    RMS_EPSILON,
    *HEAD_LENGTHS,
    uint32("vocab_size", "vocab_size", is_required=True),
    HyperRow("rope.dimension_count", ValueType.UINT32, compute=lambda config: config.head_dim),
)


def frequency_factors(config: ModelConfig) -> tuple[ComputedTensor, ...]:
    """Llama 3 stretches its context with one divisor for each frequency, which GGUF stores as a tensor."""
    if config.rope.rope_type != "llama3":
        return ()
    return (ComputedTensor(ROPE_FREQUENCIES, llama3_factors(config.rope, config.head_dim)),)


FAMILY = Family(
    name="llama",
    gguf_architecture="llama",
    hf_architectures=("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel"),
    tensors=TENSORS,
    hypers=HYPERS,
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "head_dim": head_dim_from_heads,
        "num_key_value_heads": heads_of_query,
    },
    ignored=IGNORED,
    skipped=OTHER_MODALITIES,
    expectations=(Expectation("hidden_act", ("silu", "swish"), "llama.cpp computes this family with silu."),),
    computed=frequency_factors,
)
