"""A seeded llama of a few hundred kilobytes with a SentencePiece-like vocabulary, for tests that need some model.

In: a path and a seed. Out: a GGUF file (or a LoRA GGUF that fits it) written by gguf-py, so that nothing of ours is
its own judge. The weights are random: the model babbles, but always the same babble.
"""

from __future__ import annotations

import string
from pathlib import Path

import gguf
import numpy as np

N_LAYERS = 2
WIDTH = 32
N_HEADS = 4
N_KV_HEADS = 2
FEED_FORWARD = 64
CONTEXT_LENGTH = 512
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> list[tuple[str, float, int]]:
    """(text, score, type) of each token: specials, the 256 bytes, then letters and a few syllables."""
    kinds = gguf.TokenType
    tokens = [("<unk>", 0.0, int(kinds.UNKNOWN)), ("<s>", 0.0, int(kinds.CONTROL)), ("</s>", 0.0, int(kinds.CONTROL))]
    tokens += [("<|im_start|>", 0.0, int(kinds.CONTROL)), ("<|im_end|>", 0.0, int(kinds.CONTROL))]
    tokens += [(f"<0x{byte:02X}>", 0.0, int(kinds.BYTE)) for byte in range(256)]
    syllables = ["\u2581the", "\u2581a", "he", "th", "in", "er", "an", "re", "on", "at"]
    letters = ["\u2581", *string.ascii_letters, *string.digits, *".,:;!?'-()"]
    pieces = [*syllables, *letters]
    tokens += [(piece, -float(rank + 1), int(kinds.NORMAL)) for rank, piece in enumerate(pieces)]
    return tokens


def tensor_shapes(n_vocab: int) -> dict[str, tuple[int, ...]]:
    head = WIDTH // N_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_vocab, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (n_vocab, WIDTH),
    }
    for layer in range(N_LAYERS):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (WIDTH,),
            block + "attn_q.weight": (WIDTH, WIDTH),
            block + "attn_k.weight": (N_KV_HEADS * head, WIDTH),
            block + "attn_v.weight": (N_KV_HEADS * head, WIDTH),
            block + "attn_output.weight": (WIDTH, WIDTH),
            block + "ffn_norm.weight": (WIDTH,),
            block + "ffn_gate.weight": (FEED_FORWARD, WIDTH),
            block + "ffn_up.weight": (FEED_FORWARD, WIDTH),
            block + "ffn_down.weight": (WIDTH, FEED_FORWARD),
        }
    return shapes


def write_tiny_gguf(
    path: Path,
    *,
    seed: int = 0,
    architecture: str = "llama",
    chat_template: str | None = CHATML,
    ends_at_once: bool = False,
) -> Path:
    """Write the model: it babbles letters and syllables without end, or, with `ends_at_once`, says only `</s>`."""
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // N_HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_scores([score for _, score, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if chat_template:
        writer.add_chat_template(chat_template)
    random = np.random.default_rng(seed)
    n_silent = next(rank for rank, (_, _, kind) in enumerate(tokens) if kind == int(gguf.TokenType.NORMAL))
    for name, shape in tensor_shapes(len(tokens)).items():
        array = random.standard_normal(shape, dtype=np.float32) * np.float32(0.3)
        if name.endswith("_norm.weight"):
            array = np.ones(shape, dtype=np.float32)
        elif name == "token_embd.weight":
            array *= np.float32(3.0)
            # A part that every hidden state shares, so that one row of the output can answer to all of them.
            array[:, 0] = 4.0
        elif name == "output.weight":
            array *= np.float32(3.0)
            array[:n_silent] = 0.0
            array[:n_silent, 0] = -10.0
            array[2, 0] = 100.0 if ends_at_once else -10.0
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_lora(path: Path, *, seed: int = 1, rank: int = 2, alpha: float = 64.0) -> Path:
    """Write a LoRA GGUF for every attention and feed-forward matrix of the tiny model."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    random = np.random.default_rng(seed)
    for name, shape in tensor_shapes(len(vocabulary())).items():
        if not name.startswith("blk.") or len(shape) != 2:
            continue
        writer.add_tensor(name + ".lora_a", random.standard_normal((rank, shape[1]), dtype=np.float32))
        writer.add_tensor(name + ".lora_b", random.standard_normal((shape[0], rank), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
