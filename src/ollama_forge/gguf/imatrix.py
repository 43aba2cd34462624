"""Importance matrices: how much each input column of each weight matrix mattered on some text.

In: a file that `llama-imatrix` wrote (GGUF, or the older `.dat`). Out: float32 weights per column that the quantizer
takes, or a GGUF file again. Which tensor needs them is `mixture.py`'s business.
Facts: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp of llama.cpp b11549.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from ollama_forge.errors import FormatError, NotFoundError
from ollama_forge.files import WrittenFile, atomic_output, disk_error
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import GGMLType, ValueType
from ollama_forge.gguf.writer import Field, TensorEntry, array, string, uint32, write_gguf

_SUMS = ".in_sum2"
_COUNTS = ".counts"
_NEXT = "Make it again (ollama-forge imatrix REF -o imatrix.gguf), or get the file again."


@dataclass(frozen=True, eq=False)
class ImatrixEntry:
    """Squared activations that reached one weight tensor.

    `sums` is float32 [n_matrices, n_columns]: one row per expert, one in all for a plain matrix (the older format has
    one for experts too). `counts` is int64 [n_matrices]: how many vectors each row has summed.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def size(self) -> int:
        """Number of column weights."""
        return int(self.sums.size)


@dataclass(frozen=True, eq=False)
class Imatrix:
    """An importance matrix file in memory.

    `file_name` is the name without its folder, as the quantized file will mention it; `path` is where it was read.
    `chunk_size` (tokens) is 0 when the file does not say it.
    """

    entries: Mapping[str, ImatrixEntry]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    file_name: str = ""
    is_legacy: bool = False
    path: Path | None = None

    def weights(self, name: str) -> np.ndarray:
        """Mean squared activation of every column of tensor `name`: float32 [n_columns x n_experts], flat.

        An expert that no token reached gets ones.

        Raises:
            FormatError: a weight is not a finite number.
            KeyError: no such entry.
        """
        entry = self.entries[name]
        counts = entry.counts.astype(np.float32)[:, None]
        seen = counts > 0
        unseen = entry.sums if self.is_legacy else np.float32(1)
        means = np.where(seen, entry.sums / np.where(seen, counts, np.float32(1)), unseen)
        if not np.isfinite(means).all():
            raise FormatError(
                f"The importance matrix {self.file_name!r} holds a value that is not a finite number for {name!r}",
                why="The run that made it overflowed or met a broken weight.",
                next=_NEXT,
            )
        return np.ascontiguousarray(means, dtype=np.float32).reshape(-1)


def read_imatrix(path: Path) -> Imatrix:
    """Read an importance matrix, in llama.cpp's GGUF format or in the older binary one.

    Raises:
        NotFoundError: no such file.
        GGUFError: a GGUF file that is broken.
        FormatError: the file is no importance matrix, or its numbers do not agree with its size.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                stream.seek(0)
                return replace(_parse_legacy(stream, path, path.stat().st_size), path=path)
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path given to --imatrix.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    with open_gguf(path) as source:
        return replace(_parse_gguf(source, path), path=path)


def write_imatrix(path: Path, imatrix: Imatrix, *, overwrite: bool = False) -> WrittenFile:
    """Write an importance matrix in the GGUF format, whole or not at all.

    Raises:
        ExistsError: the file is there and `overwrite` is false.
    """
    fields: list[Field] = [
        string("general.type", "imatrix"),
        array("imatrix.datasets", ValueType.STRING, list(imatrix.datasets)),
        uint32("imatrix.chunk_count", imatrix.chunk_count),
        uint32("imatrix.chunk_size", imatrix.chunk_size),
    ]
    entries = []
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        entries.append(_float_entry(name + _SUMS, entry.sums))
        entries.append(_float_entry(name + _COUNTS, entry.counts[:, None]))
    with atomic_output(path, overwrite=overwrite) as sink:
        write_gguf(sink, fields, entries)
    return WrittenFile(path, sink.size_bytes, sink.sha256)


def _float_entry(name: str, values: np.ndarray) -> TensorEntry:
    contiguous = np.ascontiguousarray(values, dtype="<f4")
    shape = contiguous.shape if contiguous.shape[0] > 1 else contiguous.shape[1:]  # as ggml counts dimensions
    return TensorEntry(name, shape, GGMLType.F32, lambda: [contiguous.tobytes()])


def _refuse(path: Path, why: str) -> NoReturn:
    raise FormatError(f"{str(path)!r} is not an importance matrix that can be used", why=why, next=_NEXT)


def _parse_gguf(source: GGUFFile, path: Path) -> Imatrix:
    names = {name.removesuffix(_SUMS) for name in source.tensors if name.endswith(_SUMS)}
    names |= {name.removesuffix(_COUNTS) for name in source.tensors if name.endswith(_COUNTS)}
    if not names:
        _refuse(path, f"It holds no tensor whose name ends with {_SUMS!r}: it may be a model.")
    entries = {name: _parse_entry(source, name, path) for name in sorted(names)}
    datasets = source.metadata.get("imatrix.datasets", ())
    return Imatrix(
        entries=entries,
        datasets=tuple(text for text in datasets if isinstance(text, str)) if not isinstance(datasets, str) else (),
        chunk_count=_whole(source.metadata.get("imatrix.chunk_count")),
        chunk_size=_whole(source.metadata.get("imatrix.chunk_size")),
        file_name=path.name,
    )


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _parse_entry(source: GGUFFile, name: str, path: Path) -> ImatrixEntry:
    arrays = []
    for suffix in (_SUMS, _COUNTS):
        tensor = source.tensors.get(name + suffix)
        if tensor is None:
            _refuse(path, f"{name + suffix!r} is missing.")
        if tensor.type != GGMLType.F32:
            _refuse(path, f"{name + suffix!r} is {tensor.type.name}, not F32.")
        arrays.append(np.frombuffer(source.read(name + suffix), dtype="<f4").astype(np.float32))
    sums, counts = arrays
    if not counts.size or not sums.size or sums.size % counts.size:
        _refuse(path, f"{name!r} has {sums.size} sums for {counts.size} counts.")
    if not np.isfinite(counts).all() or np.abs(counts).max() > 2**53:
        _refuse(path, f"{name + _COUNTS!r} holds a count that is not a whole number.")
    return ImatrixEntry(sums.reshape(counts.size, -1), np.floor(counts.astype(np.float64) + 0.5).astype(np.int64))


class _Bounded:
    """Reads that never ask for more than the file holds."""

    def __init__(self, stream: BinaryIO, path: Path, size_bytes: int) -> None:
        self.stream = stream
        self.path = path
        self.left = size_bytes

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes < 0 or n_bytes > self.left:
            offset = self.stream.tell()
            _refuse(self.path, f"{what} at offset {offset} takes {n_bytes:,} bytes and {self.left:,} are left.")
        self.left -= n_bytes
        taken = self.stream.read(n_bytes)
        if len(taken) != n_bytes:
            _refuse(self.path, f"It became shorter while it was read ({what}).")
        return taken

    def take_int32(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    def take_text(self, what: str) -> str:
        raw = self.take(self.take_int32("the length of " + what), what)
        try:
            return raw.split(b"\0")[0].decode("utf-8")
        except UnicodeDecodeError:
            _refuse(self.path, f"{what} is not text: it may be a file of another kind.")


def _parse_legacy(stream: BinaryIO, path: Path, size_bytes: int) -> Imatrix:
    """The format before GGUF: counted entries, then optionally the number of chunks and the data set's name."""
    bounded = _Bounded(stream, path, size_bytes)
    n_entries = bounded.take_int32("the number of entries")
    if n_entries < 1 or n_entries * 13 > size_bytes:
        _refuse(path, f"It announces {n_entries} entries in {size_bytes:,} bytes.")
    entries: dict[str, ImatrixEntry] = {}
    for number in range(n_entries):
        name = bounded.take_text(f"the name of entry {number + 1}")
        n_calls = bounded.take_int32(f"the calls of {name!r}")
        n_values = bounded.take_int32(f"the number of values of {name!r}")
        if n_values < 1:
            _refuse(path, f"{name!r} announces {n_values} values.")
        raw = bounded.take(4 * n_values, f"the values of {name!r}")
        entries[name] = ImatrixEntry(
            np.frombuffer(raw, dtype="<f4").astype(np.float32).reshape(1, -1), np.array([n_calls], dtype=np.int64)
        )
    chunk_count = bounded.take_int32("the number of chunks") if bounded.left else 0
    dataset = bounded.take_text("the name of the data set") if bounded.left else ""
    return Imatrix(
        entries=entries,
        datasets=(dataset,) if dataset else (),
        chunk_count=chunk_count,
        file_name=path.name,
        is_legacy=True,
    )
