"""Open a GGUF file, or a set of shards, without reading its tensors.

In: a path. Out: a `GGUFFile`: metadata and a table of tensors, with each tensor's bytes as a view of the mapped file.
What the bytes mean belongs to `weights` and `convert`; checking the header's numbers to `header`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from ollama_forge.errors import GGUFError, NotFoundError, UnsafeFileError
from ollama_forge.files import FileSpan, disk_error
from ollama_forge.gguf.header import GGUFArray, GGUFField, GGUFTensor, Header, parse_header
from ollama_forge.gguf.types import ValueType

__all__ = ["GGUFArray", "GGUFField", "GGUFFile", "GGUFTensor", "open_gguf"]

CHUNK_BYTES = 1 << 22
MAX_SHARDS = 1000
_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_LEGACY_MAGICS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA (an old LoRA)"}


class _Metadata(Mapping[str, Any]):
    """The fields' values, decoded on access."""

    def __init__(self, fields: Mapping[str, GGUFField]) -> None:
        self._fields = fields

    def __getitem__(self, key: str) -> Any:
        return self._fields[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        return key in self._fields


class GGUFFile:
    """An open GGUF file or set of shards. Close it, or use it in a `with` block.

    `metadata` holds scalars and text (decoded with `surrogateescape`, so that bytes that are not UTF-8 survive) and
    `GGUFArray`s; `fields` the same keys with their types and raw bytes; `tensors` is in file order, shard by shard.
    """

    def __init__(
        self, paths: tuple[Path, ...], maps: list[mmap.mmap], descriptors: list[int], headers: list[Header]
    ) -> None:
        first = headers[0]
        self.path = paths[0]
        self.paths = paths
        self.version = first.version
        self.alignment = first.alignment
        self.size_bytes = sum(len(content) for content in maps)
        self.fields: Mapping[str, GGUFField] = MappingProxyType(first.fields)
        self.metadata: Mapping[str, Any] = _Metadata(first.fields)
        self.tensors: Mapping[str, GGUFTensor] = MappingProxyType(
            {name: tensor for header in headers for name, tensor in header.tensors.items()}
        )
        self.architecture: str = self.metadata.get("general.architecture", "")
        self._all_fields = [entry for header in headers for entry in header.fields.values()]
        self._maps = maps
        self._descriptors = tuple(descriptors)
        self._close_descriptors = weakref.finalize(self, _close_all, self._descriptors)
        self._views = [memoryview(content) for content in maps]

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back. Arrays and views that are still in use keep the mapping alive until they go."""
        for view in (*self._views, *(entry.raw for entry in self._all_fields)):
            view.release()
        for content in self._maps:
            with contextlib.suppress(BufferError):
                content.close()
        self._close_descriptors()

    def arch_value(self, suffix: str, default: Any = None) -> Any:
        """The value of `<architecture>.<suffix>`."""
        return self.metadata.get(f"{self.architecture}.{suffix}", default)

    def find_tensor(self, name: str) -> GGUFTensor:
        """The tensor's entry.

        Raises:
            NotFoundError: the file has no tensor of that name.
        """
        found = self.tensors.get(name)
        if found is None:
            raise NotFoundError(
                f"There is no tensor {name!r} in {str(self.path)!r}",
                next=f"List its tensors: ollama-forge show {self.path} --json",
            )
        return found

    def read(self, name: str) -> memoryview:
        """The tensor's bytes, not copied: read-only, valid until the file is closed.

        Raises:
            NotFoundError: the file has no tensor of that name.
        """
        tensor = self.find_tensor(name)
        return self._views[tensor.shard][tensor.offset : tensor.offset + tensor.nbytes]

    def iter_chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The tensor's bytes in pieces; each piece's pages are given back when the next one is asked for.

        Raises:
            NotFoundError: the file has no tensor of that name.
        """
        tensor = self.find_tensor(name)
        view = self._views[tensor.shard]
        end = tensor.offset + tensor.nbytes
        for start in range(tensor.offset, end, chunk_bytes):
            stop = min(start + chunk_bytes, end)
            yield view[start:stop]
            self._forget(tensor.shard, start, stop)

    def span(self, name: str) -> FileSpan:
        """Where the tensor's bytes lie; valid until the file is closed.

        Raises:
            NotFoundError: the file has no tensor of that name.
        """
        tensor = self.find_tensor(name)
        return FileSpan(self._descriptors[tensor.shard], tensor.offset, tensor.nbytes)

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process, so that its memory stays bounded.

        The bytes stay readable: they come from the file again.
        """
        tensor = self.find_tensor(name)
        self._forget(tensor.shard, tensor.offset, tensor.offset + tensor.nbytes)

    def _forget(self, shard: int, start: int, stop: int) -> None:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        advice = getattr(mmap, "MADV_DONTNEED", None)
        if advice is not None and stop > first:
            self._maps[shard].madvise(advice, first, stop - first)


def shard_paths(path: Path) -> list[Path]:
    """The files that belong together with this one: all shards of its set, or itself alone, whatever it is.

    Raises:
        as `open_gguf`, for a file whose name is that of a shard.
    """
    if path.suffix.lower() != ".gguf" or "-of-" not in path.stem:
        return [path]
    with open_gguf(path) as file:
        return list(file.paths)


def open_gguf(path: Path) -> GGUFFile:
    """Open `path`, and every other shard when it belongs to a set (any shard may be named).

    Raises:
        NotFoundError: no such file, or a shard of the set is missing.
        GGUFError: not GGUF, big-endian, of another version, or its numbers do not agree.
        UnsafeFileError: a pickle.
        DiskError: the system refused to read it.
    """
    path = _first_shard(Path(path))
    with contextlib.ExitStack() as undo:
        content, descriptor, header = _open_one(path, 0, undo)
        _require_architecture(path, header)
        paths, maps, descriptors, headers = [path], [content], [descriptor], [header]
        for number, shard_path in enumerate(_other_shards(path, header), 1):
            content, descriptor, shard = _open_one(shard_path, number, undo)
            _require_shard(shard_path, shard, header, number)
            paths.append(shard_path)
            maps.append(content)
            descriptors.append(descriptor)
            headers.append(shard)
        _require_whole_set(path, headers)
        undo.pop_all()
        return GGUFFile(tuple(paths), maps, descriptors, headers)


def _open_one(path: Path, shard: int, undo: contextlib.ExitStack) -> tuple[mmap.mmap, int, Header]:
    content, descriptor = _map_file(path)
    undo.callback(os.close, descriptor)
    undo.callback(_close_quietly, content)
    if content[:4] != b"GGUF":
        _refuse_other_format(path, content[:64], len(content))
    _require_version(path, content)
    return content, descriptor, parse_header(content, path, shard)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _close_quietly(content: mmap.mmap) -> None:
    # An error on its way up may still hold views in its traceback; the mapping then goes with it.
    with contextlib.suppress(BufferError):
        content.close()


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    """The mapping, and a descriptor of the same file: by its path another one may be found later."""
    try:
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise GGUFError(f"{str(path)!r} is not a file", next="Name a .gguf file.")
            if status.st_size < 24:
                raise GGUFError(
                    f"{str(path)!r} is not a GGUF file: it has {status.st_size} bytes and the smallest GGUF has 24",
                    why="An empty or very short file is usually an interrupted download.",
                    next="Download or export the file again.",
                )
            content = mmap.mmap(stream.fileno(), status.st_size, access=mmap.ACCESS_READ)
            return content, os.dup(stream.fileno())
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except IsADirectoryError as exc:
        raise GGUFError(
            f"{str(path)!r} is a folder, not a GGUF file",
            next=f"Name the .gguf file inside it, or convert the folder: ollama-forge convert {path} -o model.gguf",
        ) from exc
    except (OSError, ValueError) as exc:
        raise disk_error(exc if isinstance(exc, OSError) else OSError(str(exc)), path, "read") from exc


def _require_version(path: Path, content: mmap.mmap) -> None:
    version = struct.unpack_from("<I", content, 4)[0]
    if version in (2, 3):
        return
    if struct.unpack_from(">I", content, 4)[0] in (1, 2, 3):
        raise GGUFError(
            f"{str(path)!r} is a big-endian GGUF file",
            why="It was made for another kind of machine; Ollama and this tool read little-endian files.",
            next="Get the little-endian file, or convert this one with gguf_convert_endian.py of llama.cpp.",
        )
    raise GGUFError(
        f"{str(path)!r} is GGUF version {version}; versions 2 and 3 are read",
        why="Version 1 was replaced in August 2023." if version == 1 else "No such version is known, or it is newer.",
        next="Get a current export of the model.",
    )


def _refuse_other_format(path: Path, head: bytes, size_bytes: int) -> None:
    name = str(path)
    lowered = head.lstrip().lower()
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise UnsafeFileError(
            f"{name!r} is not GGUF: it looks like a PyTorch checkpoint",
            why="Such a file is a pickle, which can run code when it is read.",
            next="Get the model as safetensors or GGUF.",
        )
    if head.startswith(b"version https://git-lfs"):
        why, hint = "It is a Git LFS pointer: the model itself was not downloaded.", "Run `git lfs pull` in its folder."
    elif lowered.startswith((b"<!doctype", b"<html", b"<?xml")):
        why, hint = "It is a web page: the download went to an error or login page.", "Download the model again."
    elif head[:4] in _LEGACY_MAGICS:
        why = f"It is a {_LEGACY_MAGICS[head[:4]]} file, the format before GGUF (August 2023)."
        hint = "Get a GGUF export of the model."
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size_bytes - 8:
        why = "It looks like safetensors."
        hint = f"Convert its folder: ollama-forge convert {path.parent} -o model.gguf"
    elif head.startswith(b"\x1f\x8b"):
        why, hint = "It is compressed with gzip.", f"Unpack it first: gunzip {name}"
    elif not head.strip(b"\0"):
        why, hint = "It begins with zeros only: an interrupted download.", "Download the model again."
    else:
        why, hint = f"It begins with {head[:8]!r} instead of b'GGUF'.", "Name a .gguf file."
    raise GGUFError(f"{name!r} is not a GGUF file", why=why, next=hint)


def _require_architecture(path: Path, header: Header) -> None:
    entry = header.fields.get("general.architecture")
    if entry is None:
        kind = header.fields.get("general.type")
        if kind is not None and kind.value == "imatrix":
            return
        raise GGUFError(
            f"{str(path)!r} does not say what model it is: the key 'general.architecture' is missing",
            next="Get a complete export of the model.",
        )
    if entry.type is not ValueType.STRING:
        raise GGUFError(
            f"{str(path)!r}: 'general.architecture' is {entry.type.name}, and STRING is required",
            next="Get a correct export of the model.",
        )


def _first_shard(path: Path) -> Path:
    match = _SHARD_NAME.fullmatch(path.name)
    if not match or match["number"] == "00001":
        return path
    first = path.with_name(f"{match['prefix']}-00001-of-{match['count']}.gguf")
    return first if first.exists() or int(match["count"]) > 1 else path


def _split_number(header: Header, key: str) -> int | None:
    entry = header.fields.get(key)
    if entry is None or entry.type in (ValueType.ARRAY, ValueType.STRING, ValueType.BOOL):
        return None
    return int(entry.value)


def _other_shards(path: Path, first: Header) -> list[Path]:
    count = _split_number(first, "split.count") or 0
    if count <= 1:
        return []
    hint = "Name the first shard under its original name, beside the others."
    match = _SHARD_NAME.fullmatch(path.name)
    if match is None:
        raise GGUFError(
            f"{str(path)!r} is the first of {count} shards, but its name does not end in -00001-of-{count:05}.gguf",
            why="The other shards are found by name.",
            next=hint,
        )
    if int(match["count"]) != count or not 1 < count <= MAX_SHARDS:
        raise GGUFError(
            f"{str(path)!r} counts {int(match['count'])} shards in its name and {count} in 'split.count' "
            f"(at most {MAX_SHARDS} are read)",
            next=hint,
        )
    number = _split_number(first, "split.no")
    if number != 0:
        raise GGUFError(f"{str(path)!r} is named as shard 1, and its 'split.no' is {number}, not 0", next=hint)
    others = [path.with_name(f"{match['prefix']}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]
    missing = [other for other in others if not other.exists()]
    if missing:
        raise NotFoundError(
            f"{len(missing)} of the {count} shards of {str(path)!r} are missing, the first is {str(missing[0])!r}",
            next="Download the missing shards into the same folder.",
        )
    return others


def _require_shard(path: Path, shard: Header, first: Header, number: int) -> None:
    for key, expected in (("split.no", number), ("split.count", _split_number(first, "split.count"))):
        found = _split_number(shard, key)
        if found != expected:
            raise GGUFError(
                f"{str(path)!r}: {key!r} is {found}, and the set needs {expected}",
                why="This shard belongs to another set or was renamed.",
                next="Download the set again.",
            )


def _require_whole_set(path: Path, headers: list[Header]) -> None:
    announced = _split_number(headers[0], "split.tensors.count")
    total = sum(len(header.tensors) for header in headers)
    if len(headers) > 1 and announced is not None and announced != total:
        raise GGUFError(
            f"{str(path)!r}: 'split.tensors.count' is {announced}, and the {len(headers)} shards hold {total} tensors",
            next="Download the set again.",
        )
    seen: set[str] = set()
    for header in headers:
        twice = seen.intersection(header.tensors)
        if twice:
            raise GGUFError(
                f"{str(path)!r}: the tensor {min(twice)!r} is in two shards", next="Download the set again."
            )
        seen.update(header.tensors)
