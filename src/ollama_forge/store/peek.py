"""The first numbers of a GGUF file, for listings: one small read instead of a whole header with its vocabulary.

In: a path. Out: the plain values that stand before the first `tokenizer.*` key, as far as one read reaches. Whoever
needs certainty opens the file with `gguf.reader`.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ollama_forge.gguf.types import VALUE_BYTES, VALUE_FORMATS, ValueType

PEEK_BYTES = 1 << 16
_MAX_PEEKED_FIELDS = 512


def peek_metadata(path: Path) -> dict[str, int | float | bool | str]:
    """Scalars and texts of the header's start; empty when the file is missing, unreadable or not GGUF."""
    try:
        with path.open("rb") as stream:
            head = stream.read(PEEK_BYTES)
    except OSError:
        return {}
    values: dict[str, int | float | bool | str] = {}
    try:
        magic, version, _, n_fields = struct.unpack_from("<4sIQQ", head, 0)
        if magic != b"GGUF" or version not in (2, 3):
            return {}
        at = 24
        for _ in range(min(n_fields, _MAX_PEEKED_FIELDS)):
            key, at = _read_text(head, at)
            if key.startswith("tokenizer."):
                break
            kind = ValueType(struct.unpack_from("<I", head, at)[0])
            at = _read_value(head, at + 4, kind, key, values)
    except (struct.error, ValueError, IndexError):
        return values
    return values


def _read_value(head: bytes, at: int, kind: ValueType, key: str, values: dict[str, int | float | bool | str]) -> int:
    if kind is ValueType.STRING:
        values[key], at = _read_text(head, at)
        return at
    if kind is not ValueType.ARRAY:
        values[key] = struct.unpack_from(VALUE_FORMATS[kind], head, at)[0]
        return at + VALUE_BYTES[kind]
    item_kind, length = struct.unpack_from("<IQ", head, at)
    item_kind, at = ValueType(item_kind), at + 12
    if item_kind is ValueType.STRING:
        for _ in range(length):
            _, at = _read_text(head, at)
        return at
    return at + VALUE_BYTES[item_kind] * int(length)


def _read_text(head: bytes, at: int) -> tuple[str, int]:
    length = struct.unpack_from("<Q", head, at)[0]
    end = at + 8 + length
    if end > len(head):
        raise IndexError("the text goes on behind what was read")
    return head[at + 8 : end].decode("utf-8", "replace"), end
