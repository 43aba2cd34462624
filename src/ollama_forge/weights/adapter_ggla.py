"""A LoRA in llama.cpp's format from before GGUF (magic `ggla`, 2023 to mid 2024; usually `ggml-adapter-model.bin`).

In: a path. Out: pairs by GGUF tensor name. Facts: `llama_model_apply_lora_from_file` in llama.cpp, `write_tensor` in
examples/finetune/finetune.cpp and convert-lora-to-ggml.py, all removed in July 2024 (pull request 8332): little-endian
u32 magic, version 1, rank, alpha; then tensors: n_dims, length of the name, type, dimensions (innermost first), name,
zeros up to the next multiple of 32, data. A is stored as [inputs, rank]; scale = alpha / rank of the header. Files made
before August 2023 carry the names that LLaMA's own release used.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import re
import struct
from pathlib import Path

from ollama_forge.errors import AdapterError, NotFoundError
from ollama_forge.files import disk_error
from ollama_forge.gguf.types import GGMLType, tensor_bytes
from ollama_forge.weights.adapter_gguf import missing_half
from ollama_forge.weights.adapter_parts import AdapterTensor, LoraPair, make_pair

MAGIC = b"algg"
_ALIGNMENT = 32
_MAX_NAME_BYTES = 200
_MAX_TENSORS = 100_000
_SUFFIX = re.compile(r"(.+)\.lora([AB])")
_LAYER = re.compile(r"layers\.(0|[1-9]\d{0,5})\.(.+)")
_OLD_LAYER_NAMES = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
_OLD_NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}


class GGLAFile:
    """An open GGLA file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._content = content
        self._view = memoryview(content)
        self.pairs = _Parser(path, self._view).parse()

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # arrays in use keep the mapping until they go
            self._view.release()
            self._content.close()


def open_ggla(path: Path) -> GGLAFile:
    """Open and check the whole file.

    Raises:
        NotFoundError: no such file.
        AdapterError: its numbers do not agree with its size, or a tensor's name says nothing.
    """
    try:
        with path.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size < 16:
                raise _broken(path, "it has fewer than 16 bytes")
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    return GGLAFile(path, content)


def gguf_name_of(name: str) -> str:
    """The GGUF spelling of a tensor's name, which is what files since August 2023 have anyway."""
    if name in _OLD_NAMES:
        return _OLD_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match and match[2] in _OLD_LAYER_NAMES:
        return f"blk.{match[1]}.{_OLD_LAYER_NAMES[match[2]]}"
    return name


class _Parser:
    """Walks through the file; every count is held against the bytes that are left."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self._path = path
        self._view = view
        self._position = 0

    def parse(self) -> tuple[LoraPair, ...]:
        magic, version, rank, alpha = struct.unpack("<4sIII", self._take(16, "the header"))
        if magic != MAGIC or version != 1:
            raise _broken(self._path, f"it begins with {magic!r}, version {version}")
        if not rank:
            raise _broken(self._path, "its rank is 0")
        halves: dict[str, dict[str, AdapterTensor]] = {}
        while self._position < len(self._view):
            tensor = self._tensor()
            match = _SUFFIX.fullmatch(tensor.name)
            if match is None:
                raise _broken(self._path, f"the tensor {tensor.name!r} is neither loraA nor loraB")
            half = match[2].lower()
            target = gguf_name_of(match[1])
            if not re.fullmatch(r"(blk\.\d{1,6}\.)?[a-z0-9_]+\.weight", target):
                raise AdapterError(
                    f"{str(self._path)!r} changes {match[1]!r}, a name that no model has",
                    why="Which tensor of the model it means cannot be determined.",
                    next="Convert the original PEFT folder instead: ollama-forge adapters convert FOLDER -o lora.gguf",
                )
            if half in halves.setdefault(target, {}):
                raise _broken(self._path, f"{tensor.name!r} is there twice")
            halves[target][half] = tensor.transposed() if half == "a" else tensor
            if len(halves) > _MAX_TENSORS:
                raise _broken(self._path, f"it has more than {_MAX_TENSORS:,} tensors")
        pairs = []
        for target, found in halves.items():
            if len(found) < 2:
                raise missing_half(target, found)
            pairs.append(make_pair(target, found["a"], found["b"], float(alpha), divisor=float(rank)))
        return tuple(pairs)

    def _tensor(self) -> AdapterTensor:
        n_dims, name_bytes, type_number = struct.unpack("<III", self._take(12, "a tensor's header"))
        if n_dims not in (1, 2) or not 0 < name_bytes <= _MAX_NAME_BYTES:
            raise _broken(self._path, f"a tensor claims {n_dims} dimensions and a name of {name_bytes} bytes")
        sizes = struct.unpack(f"<{n_dims}I", self._take(4 * n_dims, "a tensor's shape"))
        try:
            name = bytes(self._take(name_bytes, "a tensor's name")).decode("ascii")
        except UnicodeDecodeError as exc:
            raise _broken(self._path, "a tensor's name is not text") from exc
        if type_number not in (GGMLType.F32, GGMLType.F16):
            raise _broken(self._path, f"{name!r} has the type {type_number}; F32 and F16 are known")
        encoding = GGMLType(type_number)
        # Innermost first, and a missing second dimension is 1.
        shape = (sizes[1] if n_dims == 2 else 1, sizes[0])
        self._position = -(-self._position // _ALIGNMENT) * _ALIGNMENT
        start = self._position
        if math.prod(shape) * 2 > len(self._view):
            raise _broken(self._path, f"{name!r} of shape {shape} is larger than the file")
        self._take(tensor_bytes(encoding, shape), f"the numbers of {name!r}")
        return AdapterTensor(name, shape, encoding, functools.partial(self._slice, start, self._position))

    def _slice(self, start: int, stop: int) -> memoryview:
        return self._view[start:stop]

    def _take(self, n_bytes: int, what: str) -> memoryview:
        left = len(self._view) - self._position
        if n_bytes > left:
            where = f"{what} at byte {self._position:,}"
            raise _broken(self._path, f"{where} takes {n_bytes:,} bytes and {left:,} are left")
        self._position += n_bytes
        return self._view[self._position - n_bytes : self._position]


def _broken(path: Path, why: str) -> AdapterError:
    return AdapterError(
        f"{str(path)!r} is not a LoRA that can be read: {why}",
        why="It was taken for llama.cpp's old adapter format (ggla).",
        next="Convert the original PEFT folder instead: ollama-forge adapters convert FOLDER -o lora.gguf",
    )
