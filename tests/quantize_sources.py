"""Small models of every family for the quantizer: real names and hyper-parameters, a few rows per tensor, seeded.

In: a source's name and a path. Out: a GGUF file and an importance matrix that fits it, written by gguf-py; and
`describe`, which puts a quantized file into one line of text. The tests and scripts/make_quantize_goldens.py share it.
The weights come from the raw PCG64 stream and exact arithmetic, so that every NumPy makes the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ollama_forge.gguf.types import FileType, GGMLType, is_quantized

N_ROWS = 4
IMATRIX_NAME = "imatrix.gguf"
CALM_FILE_TYPES = frozenset({"IQ1_M"})
"""Made from calm F32 weights, on which builds of ggml agree. Where two of 16 weights are equal, or one rules them all,
IQ1_M has codes that are equally good and the compiler decides: two builds differed in up to 5 of 1000 blocks."""
FILE_TYPES = [
    "F32 F16 BF16 Q8_0 Q6_K Q5_K_M Q5_K_S Q5_0 Q5_1 Q4_K_M Q4_K_S Q4_0 Q4_1 Q3_K_L Q3_K_M Q3_K_S Q2_K Q2_K_S",
    "IQ4_NL IQ4_XS IQ3_M IQ3_S IQ3_XS IQ3_XXS IQ2_M IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S TQ2_0 TQ1_0",
]
OPTION_SETS: dict[str, list[str]] = {
    "pure": ["--pure"],
    "leave-output": ["--leave-output-tensor"],
    "ends": ["--output-tensor-type", "q5_k", "--token-embedding-type", "q8_0"],
    "overrides": ["--tensor-type", r"blk\.[0-3]\.attn_v=q5_0", "--tensor-type", "ffn_(up|down)=iq4_xs"],
}
OPTION_FILE_TYPES = ["Q4_K_M", "Q8_0", "IQ4_XS", "F16"]
OPTIONS_SOURCES = ["llama", "qwen2", "llama-rows-of-288", "qwen3moe"]
FILE_TYPE_WORDS = [word for line in FILE_TYPES for word in line.split()]


@dataclass(frozen=True)
class Source:
    """One small model. `blocks` maps a tensor's name within a layer to its row-major shape."""

    architecture: str
    encoding: GGMLType
    blocks: dict[str, tuple[int, ...]]
    outside: dict[str, tuple[int, ...]]
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | list[int] = 8
    n_experts: int = 0
    width: int = 256
    epsilon: str = "layer_norm_rms_epsilon"
    file_types: list[str] = field(default_factory=lambda: FILE_TYPE_WORDS)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        named = dict(self.outside)
        for layer in range(self.n_layers):
            named |= {f"blk.{layer}.{name}": shape for name, shape in self.blocks.items()}
        return named


def _attention(width: int = 256) -> dict[str, tuple[int, ...]]:
    return {"attn_norm.weight": (width,)} | {
        f"attn_{part}.weight": (N_ROWS, width) for part in ("q", "k", "v", "output")
    }


def _gated(width: int = 256, hidden: int = 512) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_norm.weight": (width,),
        "ffn_gate.weight": (N_ROWS, width),
        "ffn_up.weight": (N_ROWS, width),
        "ffn_down.weight": (N_ROWS, hidden),
    }


def _experts(n_experts: int, hidden: int = 256) -> dict[str, tuple[int, ...]]:
    return {
        "ffn_norm.weight": (256,),
        "ffn_gate_inp.weight": (n_experts, 256),
        "ffn_gate_exps.weight": (n_experts, 2, 256),
        "ffn_up_exps.weight": (n_experts, 2, 256),
        "ffn_down_exps.weight": (n_experts, 2, hidden),
    }


def _ends(width: int = 256, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    ends: dict[str, tuple[int, ...]] = {"token_embd.weight": (6, width), "output_norm.weight": (width,)}
    return ends if tied else ends | {"output.weight": (6, width)}


_QK_NORMS = {"attn_q_norm.weight": (32,), "attn_k_norm.weight": (32,)}
_POST_NORMS = {"post_attention_norm.weight": (256,), "post_ffw_norm.weight": (256,)}
_FUSED = {"attn_norm.weight": (256,), "attn_qkv.weight": (N_ROWS, 256), "attn_output.weight": (N_ROWS, 256)}
_BIASES = {"attn_norm.bias": (256,), "attn_qkv.bias": (12,), "ffn_up.bias": (N_ROWS,), "ffn_down.bias": (N_ROWS,)}
_DEEP = ["Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_XS", "IQ2_XS", "IQ3_XS"]

SOURCES: dict[str, Source] = {
    "llama": Source("llama", GGMLType.F16, _attention() | _gated(), _ends(), n_layers=16),
    "llama-shared-heads": Source(
        "llama",
        GGMLType.BF16,
        _attention() | _gated(),
        _ends(tied=True) | {"rope_freqs.weight": (16,)},
        n_kv_heads=2,
    ),
    "llama-eight-experts": Source(
        "llama", GGMLType.F16, _attention() | _experts(8), _ends(), n_kv_heads=2, n_experts=8
    ),
    "llama-80-layers": Source(
        "llama",
        GGMLType.F16,
        {"attn_v.weight": (2, 256), "ffn_down.weight": (2, 256)},
        _ends(),
        n_layers=80,
        n_kv_heads=4,
        file_types=_DEEP,
    ),
    "llama-80-layers-own-heads": Source(
        "llama", GGMLType.F16, {"attn_v.weight": (2, 256)}, _ends(), n_layers=80, file_types=_DEEP
    ),
    "llama-rows-of-288": Source(
        "llama", GGMLType.F32, _attention(288) | _gated(288, 96), _ends(288), n_kv_heads=2, width=288
    ),
    "llama-rows-of-80": Source(
        "llama", GGMLType.F32, _attention(64) | _gated(64, 80), _ends(64), n_heads=4, n_kv_heads=4, width=64
    ),
    "mistral-heads-per-layer": Source(
        "llama", GGMLType.BF16, _attention() | _gated(), _ends(), n_kv_heads=[2, 2, 2, 2, 4, 4, 8, 8]
    ),
    "qwen2": Source(
        "qwen2",
        GGMLType.BF16,
        _attention() | {f"attn_{part}.bias": (N_ROWS,) for part in "qkv"} | _gated(),
        _ends(tied=True),
        n_kv_heads=4,
    ),
    "qwen2-80-layers": Source(
        "qwen2",
        GGMLType.F16,
        {"attn_v.weight": (2, 256), "ffn_down.weight": (2, 256)},
        _ends(),
        n_layers=80,
        file_types=_DEEP,
    ),
    "qwen3": Source("qwen3", GGMLType.BF16, _attention() | _QK_NORMS | _gated(), _ends(), n_kv_heads=4),
    "qwen3moe": Source(
        "qwen3moe",
        GGMLType.F16,
        _attention() | _QK_NORMS | _experts(12),
        _ends(),
        n_kv_heads=1,
        n_experts=12,
    ),
    "gemma2": Source("gemma2", GGMLType.F32, _attention() | _POST_NORMS | _gated(), _ends(tied=True), n_kv_heads=4),
    "gemma3": Source(
        "gemma3", GGMLType.BF16, _attention() | _QK_NORMS | _POST_NORMS | _gated(), _ends(tied=True), n_kv_heads=2
    ),
    "phi3": Source(
        "phi3",
        GGMLType.BF16,
        _FUSED | {"ffn_norm.weight": (256,), "ffn_up.weight": (N_ROWS, 256), "ffn_down.weight": (N_ROWS, 512)},
        _ends() | {"rope_factors_long.weight": (16,), "rope_factors_short.weight": (16,)},
    ),
    "gpt2": Source(
        "gpt2",
        GGMLType.F16,
        _FUSED | _BIASES | {"ffn_up.weight": (N_ROWS, 256), "ffn_down.weight": (N_ROWS, 1024)},
        _ends(tied=True) | {"position_embd.weight": (8, 256), "output_norm.bias": (256,)},
        epsilon="layer_norm_epsilon",
    ),
    "falcon": Source(
        "falcon",
        GGMLType.F16,
        _FUSED | {"ffn_up.weight": (N_ROWS, 256), "ffn_down.weight": (N_ROWS, 512)},
        _ends() | {"output_norm.bias": (256,)},
        n_layers=16,
        epsilon="layer_norm_epsilon",
    ),
}


def weights(name: str, shape: tuple[int, ...], seed: int, *, calm: bool = False) -> np.ndarray:
    """Bell-shaped float32 values: one row with a stretch of zeros, one tiny but for an outlier.

    `calm`: no such rows, and finer steps, so that hardly two values are equal.
    """
    n_values = int(np.prod(shape))
    digest = hashlib.sha256(f"{seed}:{name}{':calm' * calm}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:8], "little")).random_raw(n_values)
    quarters = raw.astype("<u8").view("<u2").reshape(n_values, 4).astype(np.int64)
    sums = quarters.sum(axis=1) - 2 * 65535
    if calm:
        return ((sums * 32 + quarters[:, 0] % 32) / 2**22).astype(np.float32).reshape(shape)
    values = (sums / 2**17).astype(np.float32).reshape(shape)
    if len(shape) > 1 and shape[-2] >= 4:
        values[..., 1, :32] = 0
        values[..., 2, :] *= np.float32(2**-10)
        values[..., 2, 5] = np.float32(7.5)
    return values


def encode(values: np.ndarray, encoding: GGMLType) -> np.ndarray:
    """The bytes of float32 `values` in F32, F16 or (truncated) BF16."""
    if encoding == GGMLType.F32:
        return values
    if encoding == GGMLType.F16:
        return values.astype(np.float16)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def write_source(
    path: Path, name: str, change: Callable[[str, np.ndarray], np.ndarray] | None = None, *, calm: bool = False
) -> Path:
    """Write the source called `name`; `change(tensor name, values)` may spoil a tensor; `calm` weights are F32."""
    source = replace(SOURCES[name], encoding=GGMLType.F32) if calm else SOURCES[name]
    writer = gguf.GGUFWriter(path, source.architecture)
    writer.add_name(name)
    writer.add_context_length(128)
    writer.add_embedding_length(source.width)
    writer.add_block_count(source.n_layers)
    writer.add_feed_forward_length(512)
    writer.add_head_count(source.n_heads)
    writer.add_head_count_kv(source.n_kv_heads)
    writer.add_float32(f"{source.architecture}.attention.{source.epsilon}", 1e-5)
    writer.add_file_type({GGMLType.F32: 0, GGMLType.F16: 1, GGMLType.BF16: 32}[source.encoding])
    if source.n_experts:
        writer.add_expert_count(source.n_experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("no_vocab")
    writer.add_array("forge.words", ["one", "zwei", "trois"])
    writer.add_array("forge.numbers", [1, -2, 3])
    for seed, (tensor, shape) in enumerate(source.shapes().items()):
        values = weights(tensor, shape, seed, calm=calm)
        if change is not None:
            values = change(tensor, values)
        encoding = source.encoding if len(shape) > 1 and "ffn_gate_inp" not in tensor else GGMLType.F32
        writer.add_tensor(tensor, encode(values, encoding), raw_dtype=gguf.GGMLQuantizationType(int(encoding)))
    _finish(writer)
    return path


def write_source_imatrix(path: Path, name: str) -> Path:
    """Write an importance matrix for every matrix of the layers; one expert has seen nothing."""
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt", "more.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for tensor, shape in SOURCES[name].shapes().items():
        if len(shape) < 2 or not tensor.startswith("blk."):
            continue
        n_matrices = shape[0] if len(shape) == 3 else 1
        sums = np.abs(weights(tensor + "/sums", (n_matrices, shape[-1]), 0)) * np.float32(96)
        counts = np.full((n_matrices, 1), 1536, dtype=np.float32)
        if n_matrices > 2:
            counts[2] = 0
            sums[2] = 0
        writer.add_tensor(tensor + ".in_sum2", sums)
        writer.add_tensor(tensor + ".counts", counts)
    _finish(writer)
    return path


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(path: Path, main: GGMLType) -> str:
    """One line about a quantized file, as gguf-py reads it.

    `data` hashes every tensor's name, type and bytes; `keys` every key, its types and its value, in any order. Then,
    for the reader's eye, the roles with a quantized type other than `main`, layer by layer.
    """
    reader = gguf.GGUFReader(path)
    data = hashlib.sha256()
    kinds: dict[str, list[str]] = {}
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        type = GGMLType(int(tensor.tensor_type))
        digest = hashlib.sha256(tensor.data.tobytes()).hexdigest()
        data.update(f"{tensor.name} {type.name} {list(tensor.shape)} {digest}\n".encode())
    for tensor in sorted(reader.tensors, key=_layer_and_name):
        parts = tensor.name.removesuffix(".weight").split(".")
        role = ".".join(parts[2:] if parts[0] == "blk" else parts)
        kinds.setdefault(role, []).append(GGMLType(int(tensor.tensor_type)).name)
    notes = [f"{role}={_run_lengths(types)}" for role, types in kinds.items() if _is_notable(types, main)]
    keys = hashlib.sha256("\n".join(describe_fields(reader)).encode()).hexdigest()
    return " ".join([f"data={data.hexdigest()[:16]}", f"keys={keys[:16]}", f"main={main.name}", *notes])


def describe_fields(reader: gguf.GGUFReader) -> list[str]:
    """`key type value` of every key, sorted."""
    return sorted(
        f"{key} {'/'.join(type.name for type in part.types)} {_field_value(part)!r}"
        for key, part in reader.fields.items()
        if not key.startswith("GGUF.")
    )


def _field_value(part: gguf.ReaderField) -> Any:
    return part.contents()


def _layer_and_name(tensor: gguf.ReaderTensor) -> tuple[int, str]:
    parts = tensor.name.split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1, tensor.name)


def _is_notable(types: list[str], main: GGMLType) -> bool:
    return any(is_quantized(GGMLType[type]) and type != main.name for type in types)


def _run_lengths(types: list[str]) -> str:
    def words() -> Iterator[str]:
        for type, run in itertools.groupby(types):
            count = len(list(run))
            yield type if count == 1 else f"{type}*{count}"

    return ",".join(words())


def file_type(word: str) -> FileType:
    return FileType[f"ALL_{word}" if word == "F32" else f"MOSTLY_{word}"]
