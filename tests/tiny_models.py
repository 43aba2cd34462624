"""Small real models of every family, built here through transformers and saved as the Hub holds them.

`build_model(kind, folder)` writes a seeded two-layer checkpoint with a real tokenizer and returns the configuration
that was saved. All numbers are random, norms and biases included, so that nothing passes by being one or zero.

Kinds: `llama2`, `llama3` (tied, stretched context), `mistral`, `qwen2` (tied), `qwen3`, `qwen3_moe`, `gemma2`,
`gemma3`, `gemma3_json` (no tokenizer.model), `gemma3_vision` (text part of a model that sees), `phi3`, `phi3_long`,
`gpt2`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_tokenizers import build_tokenizer

TOKENIZERS = {
    "llama2": "llama2-spm",
    "llama3": "llama3-bpe",
    "mistral": "llama2-spm",
    "qwen2": "qwen2-bpe",
    "qwen3": "qwen2-bpe",
    "qwen3_moe": "qwen2-bpe",
    "gemma2": "gemma-spm",
    "gemma3": "gemma-spm",
    "gemma3_json": "gemma-json",
    "gemma3_vision": "gemma-spm",
    "phi3": "phi3-spm",
    "phi3_long": "phi3-spm",
    "gpt2": "gpt2-bpe",
}
KINDS = tuple(TOKENIZERS)

_N_LAYERS = 2
_FACTORS = 16  # pairs in a head of 32


def build_model(
    kind: str,
    folder: Path,
    *,
    dtype: str = "bfloat16",
    hidden_size: int = 64,
    max_shard_size: str = "1GB",
    extra_rows: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a checkpoint of a family.

    Args:
        dtype: of the weights, as torch names it.
        hidden_size: a multiple of 64; heads have 32 dimensions.
        max_shard_size: as transformers takes it; small ones give an index and several files.
        extra_rows: rows of the embedding beyond the tokenizer.
    """
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    n_tokens = build_tokenizer(TOKENIZERS[kind], folder) + extra_rows
    config = _config(kind, n_tokens, hidden_size)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            is_vector = parameter.dim() < 2
            parameter.copy_(torch.randn(parameter.shape) * (0.2 if is_vector else 0.08))
            if is_vector and name.endswith("weight") and not kind.startswith("gemma"):
                parameter.add_(1.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def change_config(folder: Path, changes: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Change keys of config.json."""
    config = {
        key: value for key, value in {**read_json(folder / "config.json"), **changes}.items() if key not in remove
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def spell_as_transformers_4(folder: Path) -> None:
    """Rewrite config.json as transformers 4 spelled it: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    config = read_json(folder / "config.json")
    parts = [config, config["text_config"]] if "text_config" in config else [config]
    for part in parts:
        _spell_part(part)
    config["transformers_version"] = "4.51.3"
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def quantize_fp8(folder: Path, block: tuple[int, int] | None, settings: dict[str, Any], ending: str) -> None:
    """Turn the projections of a checkpoint into FP8 with scales, as a quantizing tool would."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        if block is None:
            scale = weight.abs().max() / 448
            spread = scale
        else:
            n_rows, n_columns = -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1])
            scale = torch.rand(n_rows, n_columns) * 0.001 + 0.0005
            spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            spread = spread[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[name + ending] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, {"quantization_config": settings})


def stack_experts(folder: Path) -> None:
    """The experts of each layer in two stacked tensors, as transformers 5 keeps them in memory."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for layer in range(_N_LAYERS):
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = sorted({int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)})
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{expert}.{part}_proj.weight") for expert in experts])
            for part in ("gate", "up", "down")
        )
        tensors[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[prefix + "down_proj"] = down
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def split_in_two(folder: Path) -> None:
    """The same checkpoint in two shards with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for shard, members in halves.items():
        save_file({name: tensors[name] for name in members}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, members in halves.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def _spell_part(config: dict[str, Any]) -> None:
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("partial_rotary_factor") is not None:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = None if rope.get("rope_type") == "default" else rope
    if "layer_types" in config and config.get("model_type") == "gemma3_text":
        del config["layer_types"]
        config["sliding_window_pattern"] = 6


def _config(kind: str, n_tokens: int, hidden_size: int) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": n_tokens,
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 3 // 2 if hidden_size < 256 else hidden_size * 2,
        "num_hidden_layers": _N_LAYERS,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    head_dim = {"head_dim": 32}
    gemma = {**sizes, **head_dim, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 32}
    gemma |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    long = [1.0 + 0.5 * number for number in range(_FACTORS)]
    short = [1.0 + 0.05 * number for number in range(_FACTORS)]
    t = transformers
    if kind in ("gemma3", "gemma3_json", "gemma3_vision"):
        text = t.Gemma3TextConfig(**gemma, sliding_window=64, architectures=["Gemma3ForCausalLM"])
        return _seeing(text) if kind == "gemma3_vision" else text
    made = {
        "llama2": lambda: t.LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "llama3": lambda: t.LlamaConfig(
            **{**sizes, **head_dim, "tie_word_embeddings": True},
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        "mistral": lambda: t.MistralConfig(**sizes, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**{**sizes, "tie_word_embeddings": True}),
        "qwen3": lambda: t.Qwen3Config(**sizes, **head_dim),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **sizes, **head_dim, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
        ),
        "gemma2": lambda: t.Gemma2Config(**gemma, sliding_window=64),
        "phi3": lambda: t.Phi3Config(**sizes, original_max_position_embeddings=512),
        "phi3_long": lambda: t.Phi3Config(
            **{**sizes, "max_position_embeddings": 4096},
            original_max_position_embeddings=512,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": long,
                "short_factor": short,
            },
        ),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=n_tokens,
            n_positions=512,
            n_embd=hidden_size,
            n_layer=_N_LAYERS,
            n_head=hidden_size // 32,
            bos_token_id=n_tokens - 1,
            eos_token_id=n_tokens - 1,
            n_ctx=512,
        ),
    }
    config = made[kind]()
    config.architectures = [_CLASSES[kind]]
    return config


_CLASSES = {
    "llama2": "LlamaForCausalLM",
    "llama3": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi3_long": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def _seeing(text: Any) -> Any:
    import transformers

    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    config.architectures = ["Gemma3ForConditionalGeneration"]
    return config
