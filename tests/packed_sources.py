"""Random models of every family as a GGUF file of any type, and the same numbers dense in transformers.

In: a family name and a tensor type. Out: the GGUF file, and the transformers model that holds exactly what ggml decodes
from it: the reference that packed training must agree with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ollama_forge.arch.config import ModelConfig, hyper_fields, parse_config
from ollama_forge.arch.families import load_family
from ollama_forge.arch.layout import to_gguf, to_hf
from ollama_forge.arch.rows import Family
from ollama_forge.files import atomic_output
from ollama_forge.gguf.native import IMATRIX_TYPES, dequantize, quantize
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType, ValueType
from ollama_forge.gguf.writer import TensorEntry, array, string, write_gguf

WIDTH = 256
VOCABULARY = 320
_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_GEMMA = {"head_dim": 64, "tie_word_embeddings": True, "sliding_window": 8, "query_pre_attn_scalar": 64}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama": {**_SHARED, "rope_theta": 10000.0},
    "llama3": {
        **_SHARED,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mistral": {**_SHARED, "rope_theta": 10000.0, "sliding_window": None},
    "qwen2": {**_SHARED, "rope_theta": 10000.0},
    "qwen3": {**_SHARED, "rope_theta": 10000.0, "head_dim": 64},
    "qwen3_moe": {
        **_SHARED,
        "rope_theta": 10000.0,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "gemma2": {**_SHARED, **_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 3.0},
    "gemma3": {**_SHARED, **_GEMMA, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
    "phi3": {**_SHARED, "rope_theta": 10000.0, "sliding_window": None},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    },
}
_MODEL_TYPES = {"llama3": "llama", "gemma3": "gemma3_text"}
_MODULES = {"llama3": "llama"}


def raw_config(name: str) -> dict[str, Any]:
    """config.json of a small model of that family."""
    return {"model_type": _MODEL_TYPES.get(name, name), **CONFIGS[name]}


def dense_model(name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A seeded model in float32 whose norms and biases are not the trivial ones."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{**raw_config(name), **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in parameter_name:
            parameter.data.mul_(4.0)
    return model.eval()


def write_gguf_of(model: PreTrainedModel, name: str, path: Path, type: GGMLType, **changes: Any) -> None:
    """Write a model's numbers as GGUF, matrices in `type`, by the family's rows."""
    family = load_family(_MODULES.get(name, name))
    config = parse_config(family, {**raw_config(name), **changes})
    entries = _entries(family, config, model, type)
    tokens = [f"<{number}>" for number in range(config.values["vocab_size"])]
    fields = [string("general.architecture", family.gguf_architecture), *hyper_fields(family, config)]
    fields.append(array("tokenizer.ggml.tokens", ValueType.STRING, tokens))
    with atomic_output(path) as sink:
        write_gguf(sink, fields, entries)


def _entries(family: Family, config: ModelConfig, model: PreTrainedModel, type: GGMLType) -> list[TensorEntry]:
    is_tied = model.config.tie_word_embeddings
    entries = []
    for hf_name, parameter in model.state_dict().items():
        if is_tied and hf_name == "lm_head.weight":
            continue
        for address in family.rows_by_hf_name(hf_name):
            numbers = parameter.detach().numpy()
            if address.row.part is not None:
                which, of = address.row.part
                numbers = np.split(numbers, of, axis=-2)[which]
            numbers = np.ascontiguousarray(to_gguf(numbers, address.row.transform, config))
            is_small = numbers.ndim == 1 or "gate_inp" in address.gguf_name
            entries.append(_entry(address.gguf_name, numbers, GGMLType.F32 if is_small else type))
    for computed in family.computed(config) if family.computed else ():
        entries.append(_entry(computed.row.gguf_name, np.array(computed.values, np.float32), GGMLType.F32))
    return entries


def _entry(gguf_name: str, numbers: np.ndarray, type: GGMLType) -> TensorEntry:
    columns = numbers.shape[-1]
    imatrix = np.linspace(0.5, 2.0, columns, dtype=np.float32) if type in IMATRIX_TYPES else None
    blocks = quantize(numbers.reshape(-1, columns), type, imatrix)
    return TensorEntry(gguf_name, numbers.shape, type, lambda: [blocks.tobytes()])


def dequantized_reference(name: str, path: Path, **changes: Any) -> PreTrainedModel:
    """transformers' model from the original configuration, holding what ggml decodes from the file."""
    family = load_family(_MODULES.get(name, name))
    config = parse_config(family, {**raw_config(name), **changes})
    model = dense_model(name, **changes)
    state = {}
    with open_gguf(path) as file:
        stored = {key: dequantize(file.read(key), entry.type, entry.shape) for key, entry in file.tensors.items()}
    for hf_name in model.state_dict():
        parts = [
            to_hf(stored[address.gguf_name], address.row.transform, config)
            for address in family.rows_by_hf_name(hf_name)
            if address.gguf_name in stored
        ]
        if parts:
            state[hf_name] = torch.from_numpy(
                np.ascontiguousarray(np.concatenate(parts, axis=-2 if len(parts) > 1 else 0))
            )
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    return model.eval()
