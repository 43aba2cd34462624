"""The header of one GGUF file: metadata fields and tensor entries, every number checked before it is used.

In: the bytes of a file (mapped, nothing is copied). Out: a `Header` whose arrays are not decoded until asked for.
Sets of shards and the file itself belong to `reader`. Format: docs/gguf.md of ggml, v2 and v3, little endian.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from mmap import mmap
from pathlib import Path
from typing import Any, NoReturn, overload

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.types import BLOCKS, VALUE_BYTES, VALUE_FORMATS, GGMLType, ValueType

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
MAX_FIELDS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY_BYTES = 65535  # docs/gguf.md: keys are at most 2^16-1 bytes
MAX_NAME_BYTES = 1024  # llama.cpp stops at 63; image models have longer names and no reader of theirs minds

_MIN_FIELD_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 4 + 8
_REMOVED_TYPES = {4, 5, 31, 32, 33, 36, 37, 38}
_VALUE_TYPES = {int(value_type): value_type for value_type in ValueType}
_TENSOR_TYPES = {int(tensor_type): tensor_type for tensor_type in GGMLType}
_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from
_NEXT = "Download or export the file again, and compare its size and SHA-256 with the publisher's."


class GGUFArray(Sequence[Any]):
    """An array of metadata, decoded when it is asked for.

    Text that is not valid UTF-8 (byte-level tokens in the wild) is decoded with `surrogateescape`, so that
    `text.encode("utf-8", "surrogateescape")` gives the stored bytes back. `raw_items` is all items as stored.
    """

    def __init__(self, items: memoryview, item_type: ValueType, length: int) -> None:
        self.item_type = item_type
        self.raw_items = items
        self._length = length
        self._starts: array[int] | None = None

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"GGUFArray({self.item_type.name}, length {self._length})"

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        positions = range(self._length)[index]
        if isinstance(positions, range):
            return [self._item(position) for position in positions]
        return self._item(positions)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def tolist(self) -> list[Any]:
        """Every item, decoded."""
        if self.item_type is not ValueType.STRING:
            code = VALUE_FORMATS[self.item_type][1]
            return list(struct.unpack_from(f"<{self._length}{code}", self.raw_items))
        content = self.raw_items.tobytes()
        texts = []
        position = 0
        for _ in repeat(None, self._length):
            start = position + 8
            position = start + _U64(content, position)[0]
            texts.append(content[start:position].decode("utf-8", "surrogateescape"))
        return texts

    def _item(self, position: int) -> Any:
        if self.item_type is not ValueType.STRING:
            fixed = VALUE_FORMATS[self.item_type]
            return struct.unpack_from(fixed, self.raw_items, position * VALUE_BYTES[self.item_type])[0]
        if self._starts is None:
            self._starts = array("Q")
            start = 0
            for _ in repeat(None, self._length):
                self._starts.append(start)
                start += 8 + _U64(self.raw_items, start)[0]
        start = self._starts[position]
        length = _U64(self.raw_items, start)[0]
        return str(self.raw_items[start + 8 : start + 8 + length], "utf-8", "surrogateescape")


@dataclass(frozen=True)
class GGUFField:
    """One key of the metadata as it lies in the file.

    `raw` is everything after the value's type number: for an array its item type and length come first. `offset` is
    where that starts in the file.
    """

    key: str
    type: ValueType
    item_type: ValueType | None
    raw: memoryview = field(repr=False)
    offset: int

    @property
    def value(self) -> Any:
        """The decoded scalar or text, or a `GGUFArray`."""
        if self.type is ValueType.ARRAY:
            return GGUFArray(self.raw[12:], _VALUE_TYPES[_U32(self.raw)[0]], _U64(self.raw, 4)[0])
        if self.type is ValueType.STRING:
            return str(self.raw[8:], "utf-8", "surrogateescape")
        return struct.unpack_from(VALUE_FORMATS[self.type], self.raw)[0]


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` is row-major, `offset` counts from the start of its shard."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int
    shard: int = 0

    @property
    def n_elements(self) -> int:
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


@dataclass(frozen=True)
class Header:
    """All that one file says about itself before its tensor bytes."""

    version: int
    alignment: int
    fields: dict[str, GGUFField]
    tensors: dict[str, GGUFTensor]
    end: int
    """Offset of the first byte of tensor data."""


def parse_header(content: mmap | bytes, path: Path, shard: int = 0) -> Header:
    """Read a header that starts with a supported version (see `reader.open_gguf` for files that are not GGUF).

    Raises:
        GGUFError: a number that disagrees with another or with the file's size; names the offset and both numbers.
    """
    cursor = _Cursor(content, path)
    cursor.position = 4
    version = cursor.u32("the version")
    n_tensors = cursor.count("tensors", _MIN_TENSOR_BYTES, MAX_TENSORS)
    n_fields = cursor.count("metadata keys", _MIN_FIELD_BYTES, MAX_FIELDS)
    fields: dict[str, GGUFField] = {}
    for _ in repeat(None, n_fields):
        start = cursor.position
        entry = _parse_field(cursor)
        if entry.key in fields:
            cursor.refuse(start, f"the metadata key {entry.key!r} appears twice")
        fields[entry.key] = entry
    alignment = _parse_alignment(cursor, fields)
    infos = []
    names: set[str] = set()
    for _ in repeat(None, n_tensors):
        start = cursor.position
        info = _parse_tensor(cursor, shard, alignment)
        if info.name in names:
            cursor.refuse(start, f"the tensor name {info.name!r} appears twice")
        names.add(info.name)
        infos.append((info, start))
    end = -(-cursor.position // alignment) * alignment
    tensors = _place_tensors(cursor, infos, end)
    return Header(version, alignment, fields, tensors, end)


class _Cursor:
    """A position in the file that never passes its end."""

    def __init__(self, content: mmap | bytes, path: Path) -> None:
        self.content = content
        self.view = memoryview(content)
        self.size = len(content)
        self.path = path
        self.position = 0

    def refuse(self, offset: int, why: str) -> NoReturn:
        raise GGUFError(f"{str(self.path)!r} is not a sound GGUF file: at byte {offset}, {why}", next=_NEXT)

    def need(self, size_bytes: int, what: str) -> int:
        """Step over `size_bytes` and give their start."""
        start = self.position
        if size_bytes > self.size - start:
            self.refuse(start, f"{what} needs {size_bytes} bytes and {self.size - start} are left")
        self.position = start + size_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32(self.content, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64(self.content, self.need(8, what))[0])

    def count(self, what: str, min_bytes: int, limit: int) -> int:
        start = self.position
        number = self.u64(f"the number of {what}")
        left = self.size - self.position
        if number * min_bytes > left:
            self.refuse(start, f"{number} {what} need at least {number * min_bytes} bytes and {left} are left")
        if number > limit:
            self.refuse(start, f"{number} {what} are more than the {limit} that this tool reads")
        return number

    def text(self, what: str, limit: int) -> str:
        start = self.position
        length = self.u64(f"the length of {what}")
        if not 0 < length <= limit:
            self.refuse(start, f"{what} has {length} bytes; 1 to {limit} are allowed")
        first = self.need(length, what)
        content = bytes(self.view[first : first + length])
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as exc:
            self.refuse(first + exc.start, f"{what} {content[:80]!r} is not valid UTF-8")


def _parse_field(cursor: _Cursor) -> GGUFField:
    key = cursor.text("a metadata key", MAX_KEY_BYTES)
    at = cursor.position
    number = cursor.u32(f"the type of {key!r}")
    value_type = _VALUE_TYPES.get(number)
    if value_type is None:
        cursor.refuse(at, f"{key!r} has value type {number}; 0 to {max(_VALUE_TYPES)} exist")
    start = cursor.position
    item_type = None
    if value_type is ValueType.ARRAY:
        item_type = _skip_array(cursor, key)
    elif value_type is ValueType.STRING:
        cursor.need(cursor.u64(f"the length of {key!r}"), f"the text of {key!r}")
    else:
        cursor.need(VALUE_BYTES[value_type], f"the value of {key!r}")
    return GGUFField(key, value_type, item_type, cursor.view[start : cursor.position], start)


def _skip_array(cursor: _Cursor, key: str) -> ValueType:
    at = cursor.position
    number = cursor.u32(f"the item type of {key!r}")
    item_type = _VALUE_TYPES.get(number)
    if item_type is None:
        cursor.refuse(at, f"the items of {key!r} have value type {number}; 0 to {max(_VALUE_TYPES)} exist")
    if item_type is ValueType.ARRAY:
        cursor.refuse(at, f"{key!r} is an array of arrays, which neither llama.cpp nor Ollama reads")
    at = cursor.position
    length = cursor.u64(f"the length of {key!r}")
    size_bytes = length * VALUE_BYTES.get(item_type, 8)
    left = cursor.size - cursor.position
    if size_bytes > left:
        cursor.refuse(at, f"{key!r} has {length} items of at least {size_bytes} bytes and {left} are left")
    if item_type is ValueType.STRING:
        _skip_strings(cursor, length, key)
    else:
        cursor.position += size_bytes
    return item_type


_RUN = 100


def _short_strings() -> re.Pattern[bytes]:
    # A vocabulary is 300,000 strings, nearly all short. A regular expression that spells out "length n, then n bytes"
    # steps over them in half the time of a Python loop (22 ms instead of 37), and checks all 8 bytes of each length.
    spelled = [re.escape(bytes([n])) + b"\0\0\0\0\0\0\0" + b".{%d}" % n for n in (*range(1, 64), 0)]
    return re.compile(b"(?s:" + b"|".join(spelled) + b"){%d}" % _RUN)


def _skip_strings(cursor: _Cursor, length: int, key: str) -> None:
    content, size, position, unpack = cursor.content, cursor.size, cursor.position, _U64
    last_start = size - 8
    skip_run = _short_strings().match if length >= 20 * _RUN else None
    left = length
    while left:
        run = min(left, _RUN)
        if skip_run and run == _RUN and (match := skip_run(content, position)):
            position = match.end()
        else:
            for _ in repeat(None, run):
                if position > last_start:
                    cursor.refuse(position, f"a string of {key!r} needs 8 bytes and {size - position} are left")
                text_bytes = unpack(content, position)[0]
                position += 8 + text_bytes
                if position > size:
                    start = position - text_bytes
                    cursor.refuse(
                        start - 8, f"a string of {key!r} needs {text_bytes} bytes and {size - start} are left"
                    )
        left -= run
    cursor.position = position


def _parse_alignment(cursor: _Cursor, fields: dict[str, GGUFField]) -> int:
    entry = fields.get("general.alignment")
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.type is not ValueType.UINT32:
        cursor.refuse(entry.offset, f"general.alignment is {entry.type.name}, and UINT32 is required")
    alignment = int(entry.value)
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        cursor.refuse(
            entry.offset, f"general.alignment is {alignment}; it must be a power of two up to {MAX_ALIGNMENT}"
        )
    return alignment


def _parse_tensor(cursor: _Cursor, shard: int, alignment: int) -> GGUFTensor:
    """One entry of the tensor table; `offset` still counts from the start of the tensor data."""
    name = cursor.text("a tensor name", MAX_NAME_BYTES)
    at = cursor.position
    n_dimensions = cursor.u32(f"the dimensions of {name!r}")
    if n_dimensions > MAX_DIMENSIONS:
        cursor.refuse(at, f"tensor {name!r} has {n_dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed")
    start = cursor.need(8 * n_dimensions, f"the shape of {name!r}")
    shape = struct.unpack_from(f"<{n_dimensions}Q", cursor.content, start)[::-1]
    at = cursor.position
    number = cursor.u32(f"the type of {name!r}")
    tensor_type = _TENSOR_TYPES.get(number)
    if tensor_type is None:
        known = (
            "llama.cpp has removed it" if number in _REMOVED_TYPES else f"the last one known is {max(_TENSOR_TYPES)}"
        )
        cursor.refuse(at, f"tensor {name!r} has type {number}; {known}")
    n_elements = 1
    for dimension in shape:
        n_elements *= dimension
    block_elements, block_bytes = BLOCKS[tensor_type]
    nbytes = n_elements // block_elements * block_bytes
    if max(n_elements, nbytes, *shape, 0) >= 1 << 63:
        cursor.refuse(start, f"tensor {name!r} of shape {shape} has {n_elements} elements, and 2**63 is the limit")
    columns = shape[-1] if shape else 1
    if columns % block_elements:
        cursor.refuse(
            start,
            f"tensor {name!r} has rows of {columns} elements, not a multiple of {tensor_type.name}'s {block_elements}",
        )
    at = cursor.position
    offset = cursor.u64(f"the offset of {name!r}")
    if offset % alignment:
        cursor.refuse(at, f"tensor {name!r} has offset {offset}, not a multiple of the alignment {alignment}")
    return GGUFTensor(name, shape, tensor_type, offset, nbytes, shard)


def _place_tensors(cursor: _Cursor, infos: list[tuple[GGUFTensor, int]], data_start: int) -> dict[str, GGUFTensor]:
    available = max(0, cursor.size - data_start)
    tensors = {}
    for info, at in infos:
        if info.offset + info.nbytes > available:
            cursor.refuse(
                at,
                f"tensor {info.name!r} ends at byte {data_start + info.offset + info.nbytes} "
                f"and the file ends at byte {cursor.size}",
            )
        tensors[info.name] = GGUFTensor(
            info.name, info.shape, info.type, data_start + info.offset, info.nbytes, info.shard
        )
    end, previous = 0, ""
    for info, at in sorted(infos, key=lambda pair: pair[0].offset):
        if not info.nbytes:
            continue
        if info.offset < end:
            cursor.refuse(
                at,
                f"tensor {info.name!r} starts at {data_start + info.offset}, inside {previous!r}, "
                f"which ends at {data_start + end}",
            )
        end, previous = info.offset + info.nbytes, info.name
    return tensors
