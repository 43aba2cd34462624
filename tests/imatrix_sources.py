"""Models and a text for importance matrices: what the goldens of `llama-imatrix` were made from, and how they read.

In: a source's name and a path. Out: a GGUF file; and `describe`, which puts an importance matrix into lines of text.
The tests and scripts/make_imatrix_goldens.py share it. `demo` is the model that ships with the package, as it is and in
float32; `experts` is a seeded mixture of experts whose weights come from the raw PCG64 stream, so that every NumPy
makes the same bytes.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import tiny_gguf
from command import DEMO_MODEL

from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.jobs.conversion import convert_folder, convert_options

GOLDENS = Path(__file__).parent / "goldens" / "imatrix"
TEXT = GOLDENS / "text.txt"
SOURCES = ("demo-f32", "demo-bf16", "experts")
CONTEXTS = {"demo-f32": 64, "demo-bf16": 96, "experts": 128}
SHOWN_COLUMNS = 6

_WIDTH, _HEAD, _HIDDEN, _EXPERTS = 64, 32, 48, 4


def write_source(path: Path, name: str) -> Path:
    """Write the model of that name."""
    if name == "experts":
        return _write_experts(path)
    convert_folder(DEMO_MODEL, path, convert_options(name.removeprefix("demo-"), None))
    return path


def describe(imatrix: Imatrix) -> list[str]:
    """A line for each row of sums: name, count, total, and some of its numbers."""
    lines = [f"chunks {imatrix.chunk_count} of {imatrix.chunk_size}, text {' '.join(imatrix.datasets)}"]
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        for number, (sums, count) in enumerate(zip(entry.sums, entry.counts, strict=True)):
            picked = sums[:: max(1, len(sums) // SHOWN_COLUMNS)][:SHOWN_COLUMNS]
            numbers = " ".join(f"{value:.7g}" for value in (sums.sum(dtype=np.float64), *picked))
            lines.append(f"{name} {number} {count} {numbers}")
    return lines


def _uniform(raw: np.random.PCG64, shape: tuple[int, ...], scale: float) -> np.ndarray:
    count = int(np.prod(shape))
    bits = raw.random_raw(count) >> np.uint64(40)
    return ((bits.astype(np.float64) / 2**24 - 0.5) * scale).astype(np.float32).reshape(shape)


def _write_experts(path: Path) -> Path:
    tokens = tiny_gguf.vocabulary()
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(_HEAD)
    writer.add_value_length(_HEAD)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(_EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(_HIDDEN)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    raw = np.random.PCG64(11)
    for name, shape in _expert_shapes(len(tokens)).items():
        values = _uniform(raw, shape, 0.5)
        writer.add_tensor(name, values + np.float32(1) if name.endswith("_norm.weight") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _expert_shapes(n_tokens: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_tokens, _WIDTH),
        "output_norm.weight": (_WIDTH,),
        "output.weight": (n_tokens, _WIDTH),
    }
    block: dict[str, tuple[int, ...]] = {
        "attn_norm": (_WIDTH,),
        "attn_q": (2 * _HEAD, _WIDTH),
        "attn_k": (_HEAD, _WIDTH),
        "attn_v": (_HEAD, _WIDTH),
        "attn_output": (_WIDTH, 2 * _HEAD),
        "attn_q_norm": (_HEAD,),
        "attn_k_norm": (_HEAD,),
        "ffn_norm": (_WIDTH,),
        "ffn_gate_inp": (_EXPERTS, _WIDTH),
        "ffn_gate_exps": (_EXPERTS, _HIDDEN, _WIDTH),
        "ffn_up_exps": (_EXPERTS, _HIDDEN, _WIDTH),
        "ffn_down_exps": (_EXPERTS, _WIDTH, _HIDDEN),
    }
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes
