"""Qwen 3: norms on each head's query and key, no biases. Example: Qwen/Qwen3-0.6B."""

from dataclasses import replace

from ollama_forge.arch import qwen2
from ollama_forge.arch.decoder import query_key_norms

FAMILY = replace(
    qwen2.FAMILY,
    name="qwen3",
    gguf_architecture="qwen3",
    hf_architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    tensors=(*qwen2.FAMILY.tensors, *query_key_norms()),
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
)
