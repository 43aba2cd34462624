"""Forged and mutated safetensors files, and a child process that opens them under a limit of memory and time.

Usage as a program: python forged_safetensors.py FOLDER: opens every file below it and prints one JSON line for each.
"""

import json
import random
import resource
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BODY = bytes(range(256)) * 4


def file_bytes(header: Any, body: bytes = BODY, length: int | None = None) -> bytes:
    """A file with this header (an object, or bytes as they are) and, if given, a false header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(dtype: Any = "F32", shape: Any = (16, 16), offsets: Any = (0, 1024)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def valid() -> bytes:
    return file_bytes(
        {"__metadata__": {"format": "pt"}, "a": entry("F16", (8, 16), (0, 256)), "b": entry("F32", (192,), (256, 1024))}
    )


def forged() -> Iterator[tuple[str, bytes]]:
    """Files that each tell one lie."""
    for length in (0, 1, 7, 9, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10_000_000_000):
        yield f"header-length-{length}", file_bytes({"a": entry()}, length=length)
    for size in range(10):
        yield f"cut-to-{size}", valid()[:size]
    yield "cut-in-header", valid()[:40]
    yield "cut-in-body", valid()[:-1]
    yield "one-byte-more", valid() + b"\0"
    bad_shapes: list[Any] = [[-1, 16], [2**62, 4], [2**63], [16.0, 16], ["16", 16], [True, 256], [None], [[16], 16]]
    bad_shapes += [[2**32, 2**32, 2**32], [1] * 5000, [0, 2**63 - 1], [16, 15], [1e3]]
    for number, shape in enumerate(bad_shapes):
        yield f"shape-{number}", file_bytes({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1024]}})
    for number, shape in enumerate(("16", None, {"0": 16}, 1024)):
        yield f"shape-kind-{number}", file_bytes({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 1024]}})
    bad_offsets: list[Any] = [[1024, 0], [-4, 1020], [0, 1028], [0, 2**63], [2**63, 2**63 + 1024], [0], [0, 1, 2], []]
    bad_offsets += [[0.0, 1024.0], ["0", "1024"], [None, 1024], [False, 1024], [4, 1024], [0, 1020], "01", None, {}]
    for number, offsets in enumerate(bad_offsets):
        yield f"offsets-{number}", file_bytes({"a": {"dtype": "F32", "shape": [16, 16], "data_offsets": offsets}})
    for number, dtype in enumerate(("f32", "FLOAT", "", "Q4_K", None, 32, ["F32"], "F32\0", "F320" * 1000)):
        yield f"dtype-{number}", file_bytes({"a": {"dtype": dtype, "shape": [16, 16], "data_offsets": [0, 1024]}})
    for number, value in enumerate(
        (None, [], "tensor", 5, {}, {"dtype": "F32"}, {"shape": [1], "data_offsets": [0, 4]})
    ):
        yield f"entry-{number}", file_bytes({"a": value})
    yield "overlap", file_bytes({"a": entry("U8", (512,), (0, 512)), "b": entry("U8", (513,), (511, 1024))})
    yield "same-range", file_bytes({"a": entry(), "b": entry()})
    yield "hole", file_bytes({"a": entry("U8", (500,), (0, 500)), "b": entry("U8", (500,), (524, 1024))})
    yield "unused-end", file_bytes({"a": entry("U8", (1000,), (0, 1000))})
    yield "no-tensors", file_bytes({})
    yield "twice", file_bytes(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}")
    for number, text in enumerate((b"[]", b"null", b"5", b'"a"', b"{", b"}", b"{'a': 1}", b"\xff\xfe{}", b"{}{}", b"")):
        yield f"json-{number}", file_bytes(text)
    yield "nan", file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,1024]}}')
    yield "huge-number", file_bytes(b'{"a":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,1024]}}')
    yield "deep-list", file_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}")
    yield "deep-object", file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
    yield "many-lists", file_bytes(b'{"__metadata__":[' + b"[]," * 5_000_000 + b"[]]}")
    yield "many-objects", file_bytes(b'{"__metadata__":[' + b"{}," * 5_000_000 + b"{}]}")
    yield "many-keys", file_bytes(b"{" + b",".join(b'"%d":0' % number for number in range(2_000_000)) + b"}")
    yield (
        "as-many-keys-as-allowed",
        file_bytes(b"{" + b",".join(b'"%d":0' % number for number in range(750_000)) + b"}"),
    )
    yield "wide-text", file_bytes(b'{"__metadata__":{"a":"' + "\U0001f600".encode() * 12_000_000 + b'"}}')
    yield "duplicate-storm", file_bytes(b"{" + b",".join(b'"a%d":0' % (n % 9999) for n in range(500_000)) + b"}")


def mutated(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """A valid file with a few bytes of its length or header changed."""
    source = random.Random(seed)
    original = valid()
    header_end = 8 + int.from_bytes(original[:8], "little")
    for number in range(count):
        content = bytearray(original)
        for _ in range(source.randrange(1, 4)):
            content[source.randrange(header_end)] = source.choice((source.randrange(256), 0x22, 0x39, 0x7B, 0x5D, 0x2D))
        if bytes(content) != original:
            yield f"mutation-{number}", bytes(content)


def main() -> None:
    from ollama_forge.errors import ForgeError
    from ollama_forge.weights.safetensors import open_safetensors

    for path in sorted(Path(sys.argv[1]).rglob("*.safetensors")):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.monotonic()
        try:
            with open_safetensors(path) as folder:
                outcome = "opened"
                for name, tensor in folder.tensors.items():
                    assert len(folder.read(name)) == tensor.nbytes
        except ForgeError as exc:
            outcome = type(exc).__name__
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        line = {"name": path.stem, "outcome": outcome, "seconds": time.monotonic() - start, "megabytes": grown}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))
    main()
