"""Small real adapters: PEFT's own LoRA on a tiny model, with random numbers in every matrix, saved by PEFT itself.

`build_adapter(base, folder, ...)` takes what `LoraConfig` takes. `build_ggla` writes llama.cpp's old format plainly.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "phi3_long": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def targets_of(kind: str) -> list[str]:
    """Every linear module of a family."""
    return TARGETS.get(kind, ALL)


def wrap(base: Path, *, dtype: str = "float32", seed: int = 0, spread: float = 0.2, **config: Any) -> Any:
    """A transformers model with a PEFT adapter of random numbers on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype), attn_implementation="eager").eval()
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape) * spread
                if "lora_magnitude" in name:
                    parameter.mul_(1 + noise)
                elif "lora_" in name:
                    parameter.copy_(noise)
                else:
                    parameter.add_(noise)
    return wrapped


def build_adapter(base: Path, folder: Path, **config: Any) -> Any:
    """Save an adapter of random numbers; returns the PEFT model."""
    wrapped = wrap(base, **config)
    wrapped.save_pretrained(folder)
    return wrapped


def write_lora(base: Path, folder: Path, *, spread: float = 0.02, rank: int = 4, seed: int = 0) -> None:
    """A LoRA on the query and value matrices of a Llama folder, as PEFT saves it, written without PEFT: no torch."""
    from safetensors.numpy import save_file

    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rows = {"q_proj": heads, "v_proj": config.get("num_key_value_heads", heads)}
    draw = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, count in rows.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            height = count * (config.get("head_dim") or width // heads)
            tensors[f"{stem}.lora_A.weight"] = draw.normal(0, spread, (rank, width)).astype("float32")
            tensors[f"{stem}.lora_B.weight"] = draw.normal(0, spread, (height, rank)).astype("float32")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(rows)}
    settings |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def change_adapter(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change keys of adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, changes: Mapping[str, Any], *, drop: tuple[str, ...] = ()) -> None:
    """Change, add or drop tensors of adapter_model.safetensors; names are without `base_model.model.`."""
    from safetensors.numpy import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors |= {f"base_model.model.{name}": value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if not name.endswith(drop or ("\0",))}, path)


def read_tensors(folder: Path) -> dict[str, Any]:
    """All tensors of a PEFT folder, by their names without `base_model.model.`."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in tensors.items()}


def build_ggla(path: Path, pairs: Mapping[str, tuple[Any, Any]], *, rank: int, alpha: int, name: str = "{}") -> None:
    """llama.cpp's old format. `pairs` gives A [rank, inputs] and B [outputs, rank] for each GGUF tensor name."""
    content = bytearray(struct.pack("<4sIII", b"algg", 1, rank, alpha))
    for target, (a, b) in pairs.items():
        for suffix, values in (("loraA", np.asarray(a).T), ("loraB", np.asarray(b))):
            stored = np.ascontiguousarray(values)
            kind = {"float32": 0, "float16": 1}[stored.dtype.name]
            label = (name.format(target) + "." + suffix).encode()
            content += struct.pack("<III", stored.ndim, len(label), kind)
            content += struct.pack(f"<{stored.ndim}I", *reversed(stored.shape))
            content += label
            content += bytes(-len(content) % 32)
            content += stored.tobytes()
    path.write_bytes(bytes(content))
