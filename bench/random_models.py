"""The inputs of the bench: seeded random models, written by streaming so that no size is too large to make.

write_llama_folder   a Hugging Face folder: bf16 safetensors shards, config, a byte-level BPE of any size
write_vocabulary_gguf   a GGUF that is nearly all vocabulary, as llama.cpp's own writer makes it
write_store          an Ollama store of many models with realistic headers
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SHARD_BYTES = 1_000_000_000
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WIDE_VOCABULARY = 150_000
SPECIAL_TOKENS = ("<|begin|>", "<|end|>")


@dataclass(frozen=True)
class LlamaShape:
    """TinyLlama's dimensions unless others are given; only the number of layers changes with the size asked for."""

    n_layers: int = 22
    hidden: int = 2048
    intermediate: int = 5632
    n_heads: int = 32
    n_kv_heads: int = 4
    vocabulary: int = 32000

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        kv = self.hidden // self.n_heads * self.n_kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield prefix + "mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            yield prefix + "self_attn.k_proj.weight", (kv, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield prefix + "self_attn.v_proj.weight", (kv, self.hidden)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def largest_tensor_bytes(self) -> int:
        """Of the largest tensor in float32: what the memory bound is counted in."""
        return max(math.prod(shape) for _, shape in self.tensors()) * 4


def write_llama_folder(folder: Path, shape: LlamaShape, seed: int = 0) -> None:
    """Write the folder, unless it is whole already."""
    done = folder / "bench-made.json"
    made = {"shape": list(vars(shape).values()), "seed": seed}
    if not (done.is_file() and json.loads(done.read_text("utf-8")) == made):
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(folder, shape, seed)
        _write_llama_config(folder, shape)
        write_bpe_tokenizer(folder, shape.vocabulary)
        done.write_text(json.dumps(made), "utf-8")


def _write_shards(folder: Path, shape: LlamaShape, seed: int) -> None:
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dims in shape.tensors():
        nbytes = math.prod(dims) * 2
        if filled and filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, dims))
        filled += nbytes
    import numpy as np

    random = np.random.default_rng(seed)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update({name: file_name for name, _ in tensors})
        _write_shard(folder / file_name, tensors, random)
    index = {"metadata": {"total_size": shape.n_parameters * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in tensors:
        nbytes = math.prod(dims) * 2
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, dims in tensors:
            for values in _random_chunks(random, math.prod(dims), is_norm="norm" in name):
                stream.write(_to_bfloat16(values).tobytes())


def _random_chunks(random: np.random.Generator, count: int, *, is_norm: bool) -> Iterator[np.ndarray]:
    import numpy as np

    while count:
        size = min(count, 1 << 22)
        values = random.standard_normal(size, dtype=np.float32)
        yield 1 + values * np.float32(0.01) if is_norm else values * np.float32(0.02)
        count -= size


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; the upper 16 bits of each float32."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_llama_config(folder: Path, shape: LlamaShape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": shape.vocabulary - 2,
        "eos_token_id": shape.vocabulary - 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")


# --- vocabularies -----------------------------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 printable characters that byte-level BPE writes bytes with, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def bpe_words(size: int) -> tuple[list[str], list[str]]:
    """`size` distinct tokens, and the merges that build them: pairs of letters, then pairs and a letter, and so on."""
    letters = byte_alphabet()
    tokens, merges = list(letters), []
    previous, joiners = letters, letters[:178]
    while True:
        grown = []
        for first, second in itertools.product(previous, joiners):
            if len(tokens) == size:
                return tokens, merges
            tokens.append(first + second)
            merges.append(f"{first} {second}")
            grown.append(first + second)
        previous, joiners = grown, letters[:26]


def write_bpe_tokenizer(folder: Path, size: int) -> None:
    """`tokenizer.json` of `size` tokens, split as Llama 3 splits, with its `tokenizer_config.json`."""
    tokens, merges = bpe_words(size - len(SPECIAL_TOKENS))
    added = [
        {"id": len(tokens) + index, "content": token, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for index, token in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "chat_template": "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}",
    }
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def write_vocabulary_gguf(path: Path, size: int, *, seed: int = 0) -> None:
    """A GGUF with `size` tokens and their merges and one small tensor, by gguf-py's writer (llama.cpp's own)."""
    import gguf
    import numpy as np

    tokens, merges = bpe_words(size)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"vocabulary {seed}")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * size)
    writer.add_token_merges(merges)
    values = np.random.default_rng(seed).standard_normal((64, 64), dtype=np.float32)
    writer.add_tensor("blk.0.attn_q.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- a store ----------------------------------------------------------------------------------------------------------


def write_store(models_dir: Path, count: int, vocabulary: int = 32000) -> None:
    """`count` models as Ollama keeps them: a GGUF, a template, parameters and a config blob each, and a manifest."""
    if len(list(models_dir.glob("manifests/registry.ollama.ai/library/*/latest"))) == count:
        return
    blobs = models_dir / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    made = models_dir / "made.gguf"
    for number in range(count):
        write_vocabulary_gguf(made, vocabulary, seed=number)
        model = _place_blob(blobs, made.read_bytes())
        parameters = _place_blob(blobs, json.dumps({"temperature": number / count, "stop": ["<|end|>"]}).encode())
        system = _place_blob(blobs, f"You are model number {number}.".encode())
        layers = [
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": size}
            for kind, (digest, size) in (("model", model), ("system", system), ("params", parameters))
        ]
        config_digest, config_size = _place_blob(blobs, _config_blob(layers))
        config = {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": f"sha256:{config_digest}"}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {**config, "size": config_size},
            "layers": layers,
        }
        target = models_dir / "manifests" / "registry.ollama.ai" / "library" / f"bench-{number:03d}" / "latest"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(manifest, separators=(",", ":")), "utf-8")
    made.unlink()


def _config_blob(layers: list[dict[str, Any]]) -> bytes:
    config = {
        "model_format": "gguf",
        "model_family": "llama",
        "model_families": ["llama"],
        "model_type": "4.1K",
        "file_type": "F32",
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    }
    return json.dumps(config, separators=(",", ":")).encode()


def _place_blob(blobs: Path, content: bytes) -> tuple[str, int]:
    digest = hashlib.sha256(content).hexdigest()
    (blobs / f"sha256-{digest}").write_bytes(content)
    return digest, len(content)


def main() -> None:
    what, path, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if what == "llama":
        write_llama_folder(path, LlamaShape(n_layers=number))
    elif what == "wide-llama":
        write_llama_folder(path, LlamaShape(n_layers=number, vocabulary=WIDE_VOCABULARY))
    elif what == "llama-8b":
        write_llama_folder(path, LlamaShape(number, 4096, 14336, n_kv_heads=8, vocabulary=128_256))
    elif what == "vocabulary":
        write_vocabulary_gguf(path, number)
    else:
        write_store(path, number)


if __name__ == "__main__":
    main()
