"""Build GGUF bytes by hand, honest or not, without the writer under test."""

import struct
from collections.abc import Sequence

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q8_0, Q4_K = 0, 1, 8, 12


def text(content: str | bytes) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def field(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + payload


def string_field(key: str, value: str | bytes) -> bytes:
    return field(key, STRING, text(value))


def uint32_field(key: str, value: int) -> bytes:
    return field(key, UINT32, struct.pack("<I", value))


def array_field(key: str, item_type: int, length: int, items: bytes) -> bytes:
    return field(key, ARRAY, struct.pack("<IQ", item_type, length) + items)


def strings_field(key: str, values: Sequence[str | bytes]) -> bytes:
    return array_field(key, STRING, len(values), b"".join(text(value) for value in values))


def tensor(name: str | bytes, ne: Sequence[int], tensor_type: int, offset: int) -> bytes:
    """`ne` as it is stored: the row's length first."""
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, tensor_type, offset)


ARCHITECTURE = string_field("general.architecture", "llama")


def gguf(
    fields: Sequence[bytes] = (ARCHITECTURE,),
    tensors: Sequence[bytes] = (),
    content: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_fields: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(fields) if n_fields is None else n_fields,
    )
    head += b"".join(fields) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + content


def small_file(version: int = 3) -> bytes:
    """A sound file with every kind of value and four tensors."""
    fields = [
        ARCHITECTURE,
        string_field("general.name", "Tiny Ⅳ"),
        uint32_field("llama.block_count", 1),
        field("x.uint8", UINT8, b"\xc8"),
        field("x.int8", INT8, b"\xff"),
        field("x.uint16", UINT16, struct.pack("<H", 65535)),
        field("x.int16", INT16, struct.pack("<h", -2)),
        field("x.int32", INT32, struct.pack("<i", -3)),
        field("x.float32", FLOAT32, struct.pack("<f", 0.5)),
        field("x.bool", BOOL, b"\x01"),
        field("x.uint64", UINT64, struct.pack("<Q", 1 << 63)),
        field("x.int64", INT64, struct.pack("<q", -1 << 62)),
        field("x.float64", FLOAT64, struct.pack("<d", 0.1)),
        strings_field("tokenizer.ggml.tokens", ["<s>", "", "Ġé", b"\xff\xfe", "a" * 300]),
        array_field("tokenizer.ggml.scores", FLOAT32, 5, struct.pack("<5f", 0, -1, -2, -3, -4)),
        array_field("tokenizer.ggml.flags", BOOL, 3, b"\x01\x00\x01"),
        array_field("x.empty", INT32, 0, b""),
    ]
    tensors = [
        tensor("token_embd.weight", (64, 2), Q8_0, 0),
        tensor("blk.0.attn_q.weight", (3, 2), F32, 160),
        tensor("rope.factors", (5,), F16, 192),
        tensor("blk.0.ffn_up_exps.weight", (256, 2, 2), Q4_K, 224),
    ]
    content = bytes(range(136)) + bytes(24) + struct.pack("<6f", *range(6)) + bytes(8)
    content += struct.pack("<5e", *range(5)) + bytes(22) + bytes(576)
    return gguf(fields, tensors, content, version=version)
