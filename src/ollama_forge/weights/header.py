"""The header of a safetensors file: parsed in bounded memory, every number checked against the file.

In: the bytes of a file (mapped) and its size. Out: `SafetensorsTensor` entries. Opening files is `weights.safetensors`.
The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ollama_forge.errors import SafetensorsError, UnsupportedError

AGAIN = "Download the file again; if it stays broken, report it where you got it."

# Bits in one element. https://github.com/huggingface/safetensors/blob/v0.6.2/safetensors/src/tensor.rs (`Dtype`)
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
_MAX_PARSED_BYTES = 120_000_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 50


@dataclass(frozen=True)
class SafetensorsTensor:
    """Where a tensor lies: `offset` is absolute in `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int


def parse_header(content: mmap.mmap | bytes, file: Path) -> list[SafetensorsTensor]:
    """Read a file's header and check each range against the file; sorted by tensor name.

    Raises:
        SafetensorsError: the header and the file do not agree.
        UnsupportedError: a dtype that nobody knows.
    """
    size = len(content)
    if size < 10:
        refuse(file, f"it has {size} bytes, and the smallest safetensors file has 10", "It may be half downloaded.")
    length = int.from_bytes(content[:8], "little")
    if length > size - 8:
        refuse(file, f"its header claims {length:,} bytes and only {size - 8:,} follow", "It may be half downloaded.")
    if length > MAX_HEADER_BYTES:
        refuse(file, f"its header claims {length:,} bytes; {MAX_HEADER_BYTES:,} are allowed")
    entries = parse_json(content[8 : 8 + length], file)
    start = 8 + length
    tensors = [
        _parse_tensor(name, value, file, start, size) for name, value in entries.items() if name != "__metadata__"
    ]
    _check_ranges(tensors, file, start, size)
    return sorted(tensors, key=lambda tensor: tensor.name)


def parse_json(text: bytes, file: Path) -> dict[str, Any]:
    """A JSON object in which no key appears twice, parsed only when its values fit in bounded memory.

    Raises:
        SafetensorsError: it is not JSON, not an object, or too large.
    """
    # What the parsed values will weigh, counted before they exist: text, lists, dicts, keys, other items.
    weight = len(text) * (1 if text.isascii() else 4)
    weight += 80 * text.count(b"[") + 250 * text.count(b"{") + 120 * text.count(b":") + 20 * text.count(b",")
    if weight > _MAX_PARSED_BYTES:
        refuse(file, f"its {len(text):,} bytes of header would take about {weight:,} bytes of memory")
    try:
        parsed = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as exc:
        raise SafetensorsError(f"{str(file)!r} has a header that is not JSON", why=str(exc)[:200], next=AGAIN) from exc
    if not isinstance(parsed, dict):
        refuse(file, "its header is not a JSON object")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the key {name[:100]!r} appears twice")
        result[name] = value
    return result


def _parse_tensor(name: str, value: Any, file: Path, start: int, size: int) -> SafetensorsTensor:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        refuse(file, f"its header describes {name[:100]!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UnsupportedError(
            f"The tensor {name[:100]!r} in {str(file)!r} has the dtype {str(dtype)[:40]!r}",
            why=f"Known dtypes: {', '.join(DTYPE_BITS)}.",
            next="Use a checkpoint of the model in BF16, F16 or F32.",
        )
    if not _is_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        refuse(file, f"its header gives {name[:100]!r} the shape {str(shape)[:80]}")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(file, f"its header gives {name[:100]!r} the offsets {str(offsets)[:80]}")
    first, last = offsets
    if last > size - start:
        refuse(
            file,
            f"{name[:100]!r} ends at byte {start + last:,} and the file at {size:,}",
            "It may be half downloaded.",
        )
    elements = math.prod(shape)
    if elements > _MAX_ELEMENTS or elements * DTYPE_BITS[dtype] != (last - first) * 8:
        refuse(file, f"{name[:100]!r} of shape {str(shape)[:80]} in {dtype} does not fill its {last - first:,} bytes")
    return SafetensorsTensor(name, tuple(shape), dtype, file, start + first, last - first)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_ranges(tensors: list[SafetensorsTensor], file: Path, start: int, size: int) -> None:
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < position:
            refuse(file, f"{tensor.name[:100]!r} starts at byte {tensor.offset:,}, inside another tensor")
        if tensor.offset > position:
            refuse(file, f"bytes {position:,} to {tensor.offset:,} belong to no tensor")
        position = tensor.offset + tensor.nbytes
    if position != size:
        refuse(file, f"bytes {position:,} to {size:,} at its end belong to no tensor")


def refuse(file: Path, what: str, why: str = "") -> NoReturn:
    """Raise `SafetensorsError` for a file whose bytes do not hold together."""
    raise SafetensorsError(f"{str(file)!r} cannot be used: {what}", why=why, next=AGAIN)
