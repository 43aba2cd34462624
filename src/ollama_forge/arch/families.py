"""Which families there are: a literal table from the class names of config.json, and from GGUF architectures.

In: config.json as a mapping, or `general.architecture`. Out: the `Family`. A family is one module here and one line in
each table.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ollama_forge.arch.rows import Family
from ollama_forge.errors import FormatError, UnsupportedError

HF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "LLaMAForCausalLM": "llama",
    "LlamaModel": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2Model": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3Model": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "Phi3ForCausalLM": "phi3",
    "GPT2LMHeadModel": "gpt2",
}

# For a config.json without `architectures`.
MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}

GGUF_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
}


def family_names() -> list[str]:
    """The names that a user is told."""
    return list(dict.fromkeys(HF_ARCHITECTURES.values()))


def load_family(module_name: str) -> Family:
    """The rows of one module of this package."""
    family: Family = importlib.import_module(f"ollama_forge.arch.{module_name}").FAMILY
    return family


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """The class name that decides: the text part's where there is one."""
    for part in (config.get("text_config"), config):
        names = part.get("architectures") if isinstance(part, Mapping) else None
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
    return None


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        UnsupportedError: no family of ours; it lists those that there are.
        FormatError: the configuration does not say what it is.
    """
    architecture = architecture_of(config)
    if architecture is not None:
        module_name = HF_ARCHITECTURES.get(architecture)
    else:
        module_name = MODEL_TYPES.get(str(config.get("model_type")))
    if module_name is not None:
        return load_family(module_name)
    if architecture is None and config.get("model_type") is None:
        raise FormatError(
            "config.json names neither 'architectures' nor 'model_type'",
            why="Without one of them nobody can tell what kind of model this is.",
            next="Take config.json from the model's original repository.",
        )
    raise UnsupportedError(
        f"No family is known for {architecture or config.get('model_type')!r}",
        why=f"Known families: {', '.join(family_names())}.",
        next="llama.cpp's own converter knows more: pip install 'ollama-forge[llama-cpp-converter]' "
        "and add --converter llama.cpp",
    )


def find_family_by_gguf(architecture: str) -> Family:
    """The family of a GGUF file by its `general.architecture`.

    Raises:
        UnsupportedError: no family of ours.
    """
    module_name = GGUF_ARCHITECTURES.get(architecture)
    if module_name is None:
        raise UnsupportedError(
            f"No family is known for the GGUF architecture {architecture!r}",
            why=f"Known architectures: {', '.join(GGUF_ARCHITECTURES)}.",
            next="This model can be quantized, landed and run, but not edited or trained.",
        )
    return load_family(module_name)
