"""What the tests of ablation share: random directions, how much of them is left, and learnt refusers of four families.

`refuser(layout, folder)` gives a Hugging Face folder: the demo's own Llama; the same weights spelled as a Qwen 2, which
has biases (small ones here); and the Gemma 2 and GPT-2 that `scripts/make_learnt_layouts.py` has trained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import learnt_model as world
import numpy as np

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.files import atomic_output
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import parse_file_type
from ollama_forge.gguf.writer import write_gguf
from ollama_forge.transform.ablation import AblationOptions, Directions, Projection, plan_projections
from ollama_forge.weights.checkpoint import Checkpoint, open_checkpoint

LAYOUTS = ("llama", "qwen2", "gemma2", "gpt2")
LEARNT_DIR = Path(__file__).parent / "learnt"


def to_gguf(folder: Path, out: Path, outtype: str = "f32", quant: str | None = None) -> Path:
    """A folder as GGUF."""
    options = ConvertOptions(outtype=outtype, quantize=QuantizeOptions(parse_file_type(quant)) if quant else None)
    with plan_conversion(folder, options) as conversion, atomic_output(out) as sink:
        write_gguf(sink, conversion.fields, conversion.entries)
    return out


def random_directions(path: Path, n_directions: int = 1, seed: int = 1) -> Directions:
    """Unit vectors for the model at `path`, with means of harmless prompts."""
    draw = np.random.default_rng(seed)
    with open_checkpoint(path) as model:
        shape = (model.config.n_layers, n_directions, model.config.hidden_size)
    vectors = draw.standard_normal(shape)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    means = draw.standard_normal((shape[0], shape[2])) + 1
    return Directions(vectors.astype(np.float32), shape[0] // 2, harmless_means=means.astype(np.float32))


def outputs_along(model: Checkpoint, item: Projection) -> np.ndarray:
    """What a tensor's outputs have along the basis: [k, ...]; zero where nothing is written there."""
    key = item.tensor.key
    values = model.read_float32(model.find(key.role, key.layer, key.expert, is_bias=key.is_bias)).astype(np.float64)
    return item.basis @ values if item.axis == -2 and values.ndim > 1 else item.basis @ np.atleast_2d(values).T


def share_left(before: Path, after: Path, directions: Directions, options: AblationOptions) -> dict[str, float]:
    """For each tensor that writes the residual stream: |along the direction afterwards| / |before|."""
    left = {}
    with open_checkpoint(before) as old, open_checkpoint(after) as new:
        for item in plan_projections(old, directions, options):
            name = f"{item.tensor.gguf_name} {item.tensor.key.expert}"
            left[name] = float(np.linalg.norm(outputs_along(new, item)) / np.linalg.norm(outputs_along(old, item)))
    return left


def tensor_bytes(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of a GGUF."""
    with open_gguf(path) as file:
        return {name: bytes(file.read(name)) for name in file.tensors}


def refuser(layout: str, folder: Path) -> Path:
    """A model that has learnt to explain tasks and to refuse those about vegetables."""
    if layout in ("gemma2", "gpt2"):
        return LEARNT_DIR / layout
    if layout == "llama":
        return world.MODEL_DIR
    return _as_qwen2(folder / "qwen2")


def _as_qwen2(folder: Path) -> Path:
    """Llama and Qwen 2 compute the same but for the biases of queries, keys and values."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(world.MODEL_DIR, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    for key in ("attention_bias", "mlp_bias", "pretraining_tp", "head_dim"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            bias = 0.01 * torch.randn(tensors[name].shape[0])
            tensors[name.removesuffix("weight") + "bias"] = bias.to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
