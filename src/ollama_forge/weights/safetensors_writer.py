"""Write safetensors: every byte of every header is known before the first weight, so nothing is held or written twice.

In: entries (name, shape, dtype, and where the bytes come from) and how large a file may be. Out: a `ShardPlan`, pure
and exact, then one file, or numbered files with an index as transformers names them. Same entries, same bytes: inside a
file tensors lie by the width of their numbers and then by name, as the safetensors library itself lays them out, so
that each starts where its numbers are aligned.

The format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import SafetensorsError, UsageError
from ollama_forge.files import Advance, WrittenFile, atomic_output, write_bytes
from ollama_forge.weights.header import DTYPE_BITS, MAX_HEADER_BYTES
from ollama_forge.weights.safetensors import INDEX_NAME

SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 5_000_000_000
"""As large as transformers lets a file become before it begins another."""

_ALIGNMENT = 8
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class SafetensorsEntry:
    """A tensor to be written.

    Attributes:
        shape: row-major.
        dtype: a word of the format: `F32`, `F16`, `BF16`, ...
        chunks: called when its turn comes; gives exactly `nbytes` bytes, little-endian.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """One file: its header, ready to be written, and the entries in the order of their bytes."""

    filename: str
    header: bytes
    entries: tuple[SafetensorsEntry, ...]

    @property
    def size_bytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class ShardPlan:
    """What will be written; `index` is there when there are several files."""

    shards: tuple[Shard, ...]
    index: bytes | None

    @property
    def size_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.shards) + len(self.index or b"")

    @property
    def filenames(self) -> tuple[str, ...]:
        return tuple(shard.filename for shard in self.shards) + ((INDEX_NAME,) if self.index is not None else ())


def parse_shard_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or a number of bytes.

    Raises:
        UsageError: something else, or nothing that a tensor could fit in.
    """
    digits = text.strip().upper()
    unit = digits.lstrip("0123456789.")
    number = digits.removesuffix(unit)
    factor = _UNITS.get(unit.strip())
    if factor is not None and number and number.count(".") <= 1 and number != ".":
        size = int(float(number) * factor)
        if size > 0:
            return size
    raise UsageError(
        f"{text!r} is not a size for a file", why="A number with KB, MB or GB is expected.", next="Example: 5GB"
    )


def plan_shards(entries: Sequence[SafetensorsEntry], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> ShardPlan:
    """Share the entries out among files in the order given; a tensor larger than a file gets one for itself.

    Raises:
        SafetensorsError: no entries, a name twice, an unknown dtype, or names that no reader would take.
    """
    _check_entries(entries)
    groups: list[list[SafetensorsEntry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.nbytes
    if len(groups) == 1:
        return ShardPlan((_plan_shard(SINGLE_NAME, groups[0]),), None)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    shards = tuple(_plan_shard(name, group) for name, group in zip(names, groups, strict=True))
    return ShardPlan(shards, _render_index(shards))


def write_shards(plan: ShardPlan, folder: Path, advance: Advance | None = None) -> list[WrittenFile]:
    """Write the files into `folder`, each whole or not at all; the index comes last.

    Raises:
        SafetensorsError: an entry gave more or fewer bytes than it announced.
        ExistsError: one of the files is there.
        DiskError: no room, or the system refused.
    """
    written = []
    for shard in plan.shards:
        with atomic_output(folder / shard.filename, expected_bytes=shard.size_bytes) as sink:
            sink.write(shard.header)
            if advance:
                advance(len(shard.header))
            for entry in shard.entries:
                _write_entry(sink.write, entry, advance)
        written.append(WrittenFile(sink.path, sink.size_bytes, sink.sha256))
    if plan.index is not None:
        written.append(write_bytes(folder / INDEX_NAME, plan.index))
        if advance:
            advance(len(plan.index))
    return written


def _write_entry(write: Callable[[Any], int], entry: SafetensorsEntry, advance: Advance | None) -> None:
    count = 0
    for chunk in entry.chunks():
        view = memoryview(chunk).cast("B")
        count += len(view)
        if count > entry.nbytes:
            break
        write(view)
        if advance:
            advance(len(view))
    if count != entry.nbytes:
        raise SafetensorsError(
            f"{entry.name!r} gave {'more than ' if count > entry.nbytes else ''}{min(count, entry.nbytes):,} bytes "
            f"and announced {entry.nbytes:,}",
            why="The header is written before the numbers; a file that does not match it could not be read.",
        )


def _plan_shard(filename: str, entries: Iterable[SafetensorsEntry]) -> Shard:
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BITS[entry.dtype], entry.name))
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in ordered:
        described[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise SafetensorsError(
            f"The header of {filename!r} would have {len(text):,} bytes",
            why=f"Readers take {MAX_HEADER_BYTES:,}.",
            next="Choose a smaller --max-shard-size, which gives more files with fewer tensors each.",
        )
    return Shard(filename, len(text).to_bytes(8, "little") + text, tuple(ordered))


def _render_index(shards: Sequence[Shard]) -> bytes:
    weight_map: Mapping[str, str] = {entry.name: shard.filename for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _check_entries(entries: Sequence[SafetensorsEntry]) -> None:
    if not entries:
        raise SafetensorsError("There are no tensors to write", why="A file without tensors is no model.")
    seen = set()
    for entry in entries:
        if entry.dtype not in DTYPE_BITS:
            raise SafetensorsError(
                f"{entry.name!r} has the dtype {entry.dtype!r}", why=f"Known: {', '.join(DTYPE_BITS)}."
            )
        if entry.name in seen or entry.name in ("", "__metadata__"):
            raise SafetensorsError(
                f"Two tensors have the name {entry.name!r}" if entry.name else "A tensor has no name"
            )
        seen.add(entry.name)
