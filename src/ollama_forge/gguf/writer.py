"""Write a GGUF file in one pass, its exact size known before the first byte.

In: metadata fields, and tensor entries that give their bytes when their turn comes. Out: GGUF v3 into a sink, which
hashes and renames (`files.atomic_output`, the store's `stage`). What the tensors hold belongs to the caller.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ollama_forge.errors import GGUFError
from ollama_forge.files import Advance, FileSpan
from ollama_forge.gguf.ahead import Ahead
from ollama_forge.gguf.header import (
    DEFAULT_ALIGNMENT,
    MAX_ALIGNMENT,
    MAX_DIMENSIONS,
    MAX_FIELDS,
    MAX_KEY_BYTES,
    MAX_TENSORS,
    GGUFArray,
    GGUFField,
    GGUFTensor,
)
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import VALUE_FORMATS, GGMLType, ValueType, tensor_bytes

VERSION = 3
MAX_WRITTEN_NAME_BYTES = 63  # llama.cpp: GGML_MAX_NAME is 64 with the closing zero
_ALIGNMENT_KEY = "general.alignment"


class Sink(Protocol):
    """Whatever takes bytes in order."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...


@dataclass(frozen=True)
class Field:
    """One metadata key. `item_type` is for arrays only; `raw`, when set, is written as it is (see `from_reader`)."""

    key: str
    type: ValueType
    value: Any
    item_type: ValueType | None = None
    raw: memoryview | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to come.

    Args:
        name: as the file will spell it.
        shape: row-major.
        type: the encoding.
        chunks: called once, when the tensor's turn comes; gives exactly `tensor_bytes(type, shape)` bytes.
        is_computed: the bytes take a processor, not a disk, so they are asked for one tensor ahead of their turn, in
            another thread; each chunk stays as it is when the next one is asked for.
        pieces: of a computed tensor: the same chunks as calls, which up to `n_threads` threads make at once, well ahead
            of the tensor's turn.
        release: called when the last byte is written, to give memory back.
        span: where the same bytes lie in a file, for sinks that can take them from there.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    chunks: Callable[[], Iterable[Any]] = field(repr=False)
    is_computed: bool = False
    pieces: Callable[[], Iterable[Callable[[], Any]]] | None = field(default=None, repr=False)
    n_threads: int = 1
    release: Callable[[], None] | None = field(default=None, repr=False)
    span: FileSpan | None = None

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.type, self.shape)


@dataclass(frozen=True)
class Layout:
    """Where everything will lie; `header` ends, padded, where the first tensor starts."""

    header: bytes = field(repr=False)
    tensors: tuple[GGUFTensor, ...]
    size_bytes: int
    alignment: int


def uint32(key: str, value: int) -> Field:
    return Field(key, ValueType.UINT32, value)


def int32(key: str, value: int) -> Field:
    return Field(key, ValueType.INT32, value)


def uint64(key: str, value: int) -> Field:
    return Field(key, ValueType.UINT64, value)


def float32(key: str, value: float) -> Field:
    return Field(key, ValueType.FLOAT32, value)


def boolean(key: str, value: bool) -> Field:
    return Field(key, ValueType.BOOL, value)


def string(key: str, value: str | bytes) -> Field:
    return Field(key, ValueType.STRING, value)


def array(key: str, item_type: ValueType, values: Sequence[Any]) -> Field:
    """An array field; text items may be `str` or `bytes`."""
    return Field(key, ValueType.ARRAY, values, item_type)


def from_reader(entry: GGUFField) -> Field:
    """The same key with the same bytes. The file it came from must stay open until it is written."""
    return Field(entry.key, entry.type, entry.value, entry.item_type, entry.raw)


def copy_entry(source: GGUFFile, name: str, new_name: str | None = None) -> TensorEntry:
    """A tensor of an open file, byte for byte, streamed in bounded memory.

    Raises:
        NotFoundError: the file has no tensor of that name.
    """
    tensor = source.find_tensor(name)
    chunks = partial(source.iter_chunks, name)
    return TensorEntry(new_name or name, tensor.shape, tensor.type, chunks, span=source.span(name))


def plan_layout(fields: Sequence[Field], entries: Sequence[TensorEntry], alignment: int = DEFAULT_ALIGNMENT) -> Layout:
    """Compute the header and every offset; nothing is written and no chunk is asked for.

    Keys are ordered as Ollama's quick scan of a store needs them: `general.architecture`, `general.*`, the
    architecture's own keys, `tokenizer.*`, then the rest. `general.alignment` always says `alignment`.

    Raises:
        GGUFError: a key or name appears twice or is not allowed, a value does not fit its type, no architecture.
        UnsupportedError: a tensor's row does not divide into its type's blocks.
    """
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise GGUFError(
            f"A GGUF file cannot have the alignment {alignment}",
            why=f"It must be a power of two up to {MAX_ALIGNMENT}.",
            next=f"Use {DEFAULT_ALIGNMENT}.",
        )
    ordered = order_fields(_with_alignment(fields, alignment))
    _require_unique("metadata key", [entry.key for entry in ordered], MAX_FIELDS)
    _require_unique("tensor name", [entry.name for entry in entries], MAX_TENSORS)
    header = bytearray(struct.pack("<4sIQQ", b"GGUF", VERSION, len(entries), len(ordered)))
    for entry in ordered:
        header += _encode_text(entry.key, "a metadata key", MAX_KEY_BYTES)
        header += struct.pack("<I", entry.type)
        header += _encode_value(entry)
    table = [(entry, entry.nbytes) for entry in entries]
    offset = 0
    offsets = []
    for planned, nbytes in table:
        header += _encode_tensor(planned, offset)
        offsets.append(offset)
        offset += _padded(nbytes, alignment)
    header += bytes(_padded(len(header), alignment) - len(header))
    tensors = tuple(
        GGUFTensor(entry.name, tuple(entry.shape), entry.type, len(header) + start, nbytes)
        for (entry, nbytes), start in zip(table, offsets, strict=True)
    )
    return Layout(bytes(header), tensors, len(header) + offset, alignment)


def write_gguf(
    sink: Sink,
    fields: Sequence[Field],
    entries: Sequence[TensorEntry],
    *,
    alignment: int = DEFAULT_ALIGNMENT,
    advance: Advance | None = None,
) -> None:
    """Write a whole file; `plan_layout` of the same arguments tells its size beforehand.

    Raises:
        GGUFError: as `plan_layout`, or a tensor gave more or fewer bytes than its shape and type need.
        UnsupportedError: a tensor's row does not divide into its type's blocks.
    """
    with Ahead(entries) as ahead:
        layout = plan_layout(fields, entries, alignment)  # a vocabulary takes a while to encode
        sink.write(layout.header)
        if advance:
            advance(len(layout.header))
        for entry, tensor in zip(entries, layout.tensors, strict=True):
            if not _copy_tensor(sink, entry, advance):
                _write_tensor(sink, entry, ahead.take(entry), tensor.nbytes, advance)
            if entry.release:
                entry.release()
            padding = _padded(tensor.nbytes, alignment) - tensor.nbytes
            if padding:
                sink.write(bytes(padding))
                if advance:
                    advance(padding)


def order_fields(fields: Sequence[Field]) -> list[Field]:
    """The fields in the order in which they are written; equal ranks keep their order.

    Raises:
        GGUFError: `general.architecture` is missing or is not text.
    """
    found = next((entry for entry in fields if entry.key == "general.architecture"), None)
    is_imatrix = any(entry.key == "general.type" and entry.value == "imatrix" for entry in fields)
    if found is None and not is_imatrix:
        raise GGUFError(
            "A GGUF file needs the key 'general.architecture'",
            why="Nothing can tell what model it is without it.",
            next="Add it to the metadata.",
        )
    if found is not None and found.type is not ValueType.STRING:
        raise GGUFError(
            f"'general.architecture' is {found.type.name}, and STRING is required", next="Write it as text."
        )
    own = f"{found.value}." if found is not None else "\0"

    def rank(entry: Field) -> int:
        if entry.key == "general.architecture":
            return 0
        for number, prefix in enumerate(("general.", own, "tokenizer."), 1):
            if entry.key.startswith(prefix):
                return number
        return 4

    return sorted(fields, key=rank)


def _with_alignment(fields: Sequence[Field], alignment: int) -> list[Field]:
    wanted = uint32(_ALIGNMENT_KEY, alignment)
    kept = [entry for entry in fields if entry.key != _ALIGNMENT_KEY or entry == wanted]
    if alignment != DEFAULT_ALIGNMENT and wanted not in kept:
        kept.append(wanted)
    return kept


def _padded(size_bytes: int, alignment: int) -> int:
    return -(-size_bytes // alignment) * alignment


def _require_unique(what: str, words: list[str], limit: int) -> None:
    if len(words) > limit:
        raise GGUFError(f"{len(words)} times a {what}; {limit} are allowed", next="Write fewer.")
    seen: set[str] = set()
    for word in words:
        if word in seen:
            raise GGUFError(f"The {what} {word!r} appears twice", next="Keep one of them.")
        seen.add(word)


def _encode_text(text: str, what: str, limit: int) -> bytes:
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise GGUFError(f"{text!r} cannot be {what}", why="It is not valid Unicode.", next="Rename it.") from exc
    if not 0 < len(content) <= limit:
        raise GGUFError(
            f"{text[:100]!r} cannot be {what}",
            why=f"It has {len(content)} bytes; 1 to {limit} are allowed.",
            next="Rename it.",
        )
    return struct.pack("<Q", len(content)) + content


def _encode_tensor(entry: TensorEntry, offset: int) -> bytes:
    if len(entry.shape) > MAX_DIMENSIONS:
        raise GGUFError(
            f"The tensor {entry.name!r} has {len(entry.shape)} dimensions: {entry.shape}",
            why=f"GGUF allows {MAX_DIMENSIONS}.",
            next="Reshape it.",
        )
    if any(dimension < 0 for dimension in entry.shape) or entry.nbytes >= 1 << 63:
        raise GGUFError(f"The tensor {entry.name!r} cannot have the shape {entry.shape}", next="Check its shape.")
    name = _encode_text(entry.name, "a tensor name", MAX_WRITTEN_NAME_BYTES)
    count = len(entry.shape)
    return name + struct.pack(f"<I{count}QIQ", count, *reversed(entry.shape), entry.type, offset)


def _encode_value(entry: Field) -> bytes | memoryview:
    if entry.raw is not None:
        return entry.raw
    try:
        if entry.type is not ValueType.ARRAY:
            return _encode_scalar(entry.type, entry.value)
        if entry.item_type is None or entry.item_type is ValueType.ARRAY:
            raise GGUFError(f"The array {entry.key!r} needs an item type that is not ARRAY", next="Name its item type.")
        return struct.pack("<IQ", entry.item_type, len(entry.value)) + _encode_items(entry.item_type, entry.value)
    except (struct.error, UnicodeEncodeError, OverflowError, TypeError, AttributeError) as exc:
        kind = entry.type.name if entry.item_type is None else f"{entry.type.name} of {entry.item_type.name}"
        raise GGUFError(
            f"The value of {entry.key!r} does not fit its type {kind}: {repr(entry.value)[:80]}",
            why=str(exc),
            next="Check the value, or choose a wider type.",
        ) from exc


def _encode_scalar(type: ValueType, value: Any) -> bytes:
    if type is ValueType.STRING:
        content = _text_bytes(value)
        return struct.pack("<Q", len(content)) + content
    return struct.pack(VALUE_FORMATS[type], value)


def _encode_items(item_type: ValueType, values: Sequence[Any]) -> bytes:
    if isinstance(values, GGUFArray) and values.item_type is item_type:
        return values.raw_items.tobytes()
    if item_type is ValueType.STRING:
        length = struct.Struct("<Q").pack
        parts = []
        for value in values:
            content = _text_bytes(value)
            parts.append(length(len(content)))
            parts.append(content)
        return b"".join(parts)
    return struct.pack(f"<{len(values)}{VALUE_FORMATS[item_type][1]}", *values)


def _text_bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def _copy_tensor(sink: Sink, entry: TensorEntry, advance: Advance | None) -> bool:
    """Have the sink take an untouched tensor from its file; False where it cannot."""
    copy = getattr(sink, "copy", None)
    return copy is not None and entry.span is not None and bool(copy(entry.span, advance))


def _write_tensor(sink: Sink, entry: TensorEntry, chunks: Iterable[Any], nbytes: int, advance: Advance | None) -> None:
    left = nbytes
    for chunk in chunks:
        view = memoryview(chunk)
        if not view.nbytes:
            continue
        left -= view.nbytes
        if left < 0:
            break
        sink.write(view.cast("B"))
        if advance:
            advance(view.nbytes)
    if left:
        given = "more" if left < 0 else f"only {nbytes - left}"
        raise GGUFError(
            f"The tensor {entry.name!r} needs {nbytes} bytes, and {given} were given",
            why=f"It was planned as {entry.type.name} of shape {entry.shape}.",
            next="Check that the input did not change while it was read, then run the command again.",
        )
