"""Mistral: Llama's tensors and GGUF architecture, other defaults. Example: mistralai/Mistral-7B-Instruct-v0.3."""

from dataclasses import replace

from ollama_forge.arch import llama
from ollama_forge.arch.decoder import head_dim_from_heads
from ollama_forge.arch.rows import Expectation

FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    defaults={
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "head_dim": head_dim_from_heads,
    },
    turn_back=lambda _, result: result.update(sliding_window=None),
    expectations=(
        *llama.FAMILY.expectations,
        Expectation(
            "sliding_window", (), "llama.cpp lets this family attend to the whole context, so answers differ beyond it."
        ),
    ),
)
