"""Read safetensors, one file or a folder of shards: headers checked in full, tensors mapped and never copied.

In: a file or a folder. Out: `SafetensorsFolder`. No number and no name from a file is believed: the header is bounded
before it is parsed, every range is checked against the file, shard names cannot leave the folder. Files that can run
code when they are read (.bin, .pt, .pth, .ckpt) are refused with the way out.

The format: https://github.com/huggingface/safetensors#format. numpy is not needed to read headers or bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NoReturn

from ollama_forge.errors import NotFoundError, SafetensorsError, UnsafeFileError, UnsupportedError
from ollama_forge.files import disk_error
from ollama_forge.weights.header import MAX_HEADER_BYTES, SafetensorsTensor, parse_header, parse_json, refuse

INDEX_NAME = "model.safetensors.index.json"
CHUNK_BYTES = 1 << 23

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@-]{0,250}\.safetensors")


class SafetensorsFolder:
    """The tensors of one file or of all shards of a folder, in the order of shard names and then of tensor names.

    Use it as a context manager; views from `read` must not be used after it is closed.

    Attributes:
        before_read: called with a tensor's file before its bytes are looked at, for files whose bytes come on demand.
    """

    def __init__(self, path: Path, files: Mapping[Path, mmap.mmap], tensors: Mapping[str, SafetensorsTensor]) -> None:
        self.path = path
        self.files = tuple(files)
        self.tensors: Mapping[str, SafetensorsTensor] = MappingProxyType(dict(tensors))
        self.size_bytes = sum(len(content) for content in files.values())
        self.before_read: Callable[[Path], None] | None = None
        self._maps = dict(files)
        self._views = {file: memoryview(content) for file, content in files.items()}

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back. Arrays that are still in use keep their mapping alive until they go."""
        for view in self._views.values():
            view.release()
        for content in self._maps.values():
            _close_quietly(content)

    def find_tensor(self, name: str) -> SafetensorsTensor:
        """The tensor's entry.

        Raises:
            NotFoundError: no such tensor.
        """
        found = self.tensors.get(name)
        if found is None:
            raise NotFoundError(f"There is no tensor {name!r} in {str(self.path)!r}", next="Check the name.")
        return found

    def read(self, name: str) -> memoryview:
        """The tensor's bytes, not copied: read-only, little-endian, row-major.

        Raises:
            NotFoundError: no such tensor.
        """
        tensor = self.find_tensor(name)
        self._prepare(tensor.file)
        return self._views[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]

    def iter_chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The tensor's bytes in pieces; each piece's pages are given back when the next one is asked for.

        Raises:
            NotFoundError: no such tensor.
        """
        tensor = self.find_tensor(name)
        self._prepare(tensor.file)
        for start in range(0, tensor.nbytes, chunk_bytes):
            stop = min(start + chunk_bytes, tensor.nbytes)
            yield self._views[tensor.file][tensor.offset + start : tensor.offset + stop]
            self.release(name, start, stop)

    def _prepare(self, file: Path) -> None:
        if self.before_read is not None:
            self.before_read(file)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Let the system drop pages of the tensor from this process; the bytes stay readable.

        Args:
            start, stop: bytes from the beginning of the tensor.
        """
        tensor = self.find_tensor(name)
        advice = getattr(mmap, "MADV_DONTNEED", None)
        end = tensor.offset + (tensor.nbytes if stop is None else stop)
        first = (tensor.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if advice is not None and end > first:
            self._maps[tensor.file].madvise(advice, first, end - first)


def open_safetensors(path: Path) -> SafetensorsFolder:
    """Open a .safetensors file, or a folder that holds a model in one or several of them.

    Raises:
        NotFoundError: nothing there, or a shard is missing.
        SafetensorsError: a header, an index or a size that does not hold together.
        UnsafeFileError: only pickles, or a shard that leads outside the folder.
        UnsupportedError: a dtype that nobody knows.
        DiskError: the system refused to read.
    """
    path = Path(path)
    weight_map: Mapping[str, str] | None = None
    if path.is_dir():
        names, weight_map = _shards_of(path)
        files = [resolve_member(path, name) for name in names]
    else:
        if path.suffix.lower() in _PICKLES:
            _refuse_pickle(path, [path.name])
        files = [path]
    tensors: dict[str, SafetensorsTensor] = {}
    maps: dict[Path, mmap.mmap] = {}
    with contextlib.ExitStack() as undo:
        for file in files:
            content = _map_file(file)
            undo.callback(_close_quietly, content)
            maps[file] = content
            for tensor in parse_header(content, file):
                if tensor.name in tensors:
                    other = tensors[tensor.name].file.name
                    raise SafetensorsError(
                        f"The tensor {tensor.name!r} is in two shards: {other!r} and {file.name!r}",
                        why="Nothing says which one counts.",
                        next="Remove the shard that does not belong to the model.",
                    )
                tensors[tensor.name] = tensor
        if weight_map is not None:
            _check_index(path, weight_map, tensors)
        undo.pop_all()
    return SafetensorsFolder(path, maps, tensors)


def resolve_member(folder: Path, name: str) -> Path:
    """The path of a file of the folder, without any way out of it.

    A symbolic link may lead into the folder itself or, in a Hugging Face cache (`models--*/snapshots/<revision>`), to
    the blobs of the same repository.

    Raises:
        UnsafeFileError: the name or the link leads elsewhere.
        NotFoundError: no such file.
    """
    if name != Path(name).name or name in ("", ".", "..") or "\0" in name or "\\" in name or ":" in name:
        raise UnsafeFileError(
            f"The file name {name!r} in {str(folder)!r} leads out of the folder",
            why="A model may only name files that lie beside it.",
            next="Do not use this model; get it from its original repository.",
        )
    member = folder / name
    try:
        target = member.resolve(strict=True)
        home = folder.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError, RuntimeError) as exc:
        raise NotFoundError(
            f"{str(folder)!r} has no file {name!r}",
            why="The download may be incomplete.",
            next="Download the model again; what is complete is not fetched twice.",
        ) from exc
    except OSError as exc:
        raise disk_error(exc, member, "read") from exc
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise UnsafeFileError(
            f"{str(member)!r} is a link to {str(target)!r}, outside the model's folder",
            why="A model may only use files that lie beside it.",
            next=f"If you trust it, put the file itself there: cp --remove-destination {target} {member}",
        )
    return member


def _shards_of(folder: Path) -> tuple[list[str], Mapping[str, str] | None]:
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map = _read_index(folder)
        return sorted(set(weight_map.values())), weight_map
    try:
        present = sorted(entry.name for entry in folder.iterdir())
    except OSError as exc:
        raise disk_error(exc, folder, "read") from exc
    names = [name for name in present if name.startswith("model") and name.endswith(".safetensors")]
    if names:
        return names, None
    _refuse_without_weights(folder, present)


def _refuse_without_weights(folder: Path, present: list[str]) -> NoReturn:
    pickles = [name for name in present if Path(name).suffix.lower() in _PICKLES]
    others = [name for name in present if name.endswith(".safetensors")]
    ggufs = [name for name in present if name.endswith(".gguf")]
    if "adapter_model.safetensors" in others:
        raise NotFoundError(
            f"{str(folder)!r} holds a LoRA adapter, not a model",
            why="An adapter is a small change to a model; without the model it says nothing.",
            next="Name the base model, and the adapter with --adapter.",
        )
    if others:
        raise UnsupportedError(
            f"{str(folder)!r} has {others[0]!r} but no model.safetensors",
            why="These weights do not have the names that transformers gives them.",
            next="Use the repository of the same model that transformers can load.",
        )
    if ggufs:
        raise NotFoundError(
            f"{str(folder)!r} has no safetensors weights, but it has {ggufs[0]!r}",
            next=f"Name the GGUF file itself: {folder / ggufs[0]}",
        )
    if pickles:
        _refuse_pickle(folder, pickles)
    raise NotFoundError(
        f"{str(folder)!r} has no model.safetensors",
        why="The folder of a model holds its weights in one file of that name, or in numbered ones with an index.",
        next="Check the path, or download the model again.",
    )


def _refuse_pickle(path: Path, names: list[str]) -> NoReturn:
    raise UnsafeFileError(
        f"{str(path)!r} has its weights only in {names[0]!r}",
        why="Files of this kind can run any program when they are read, so they are never opened.",
        next="Use the model's safetensors files: on the Hub see the branch refs/pr made by SFconvertbot, or ask "
        "https://huggingface.co/spaces/safetensors/convert for one.",
    )


def _read_index(folder: Path) -> dict[str, str]:
    path = resolve_member(folder, INDEX_NAME)
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            refuse(path, f"it has {size:,} bytes; {MAX_HEADER_BYTES:,} are allowed")
        parsed = parse_json(path.read_bytes(), path)
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        refuse(path, "it has no 'weight_map' that says where each tensor lies")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise UnsafeFileError(
                f"The index {str(path)!r} says that {name[:100]!r} lies in {str(shard)[:100]!r}",
                why="A shard is a .safetensors file in the same folder; this name is not one.",
                next="Do not use this model; get it from its original repository.",
            )
    return weight_map


def _check_index(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, SafetensorsTensor]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise SafetensorsError(
                f"The index of {str(folder)!r} says that {name[:100]!r} lies in {shard!r}, and it does not",
                why="The shard belongs to another version of the model, or is incomplete.",
                next="Download the model again.",
            )
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise SafetensorsError(
            f"{tensors[extra].file.name!r} in {str(folder)!r} holds {extra[:100]!r}, which the index does not know",
            why="The shard belongs to another version of the model.",
            next="Download the model again.",
        )


def _map_file(path: Path) -> mmap.mmap:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            refuse(path, "it is not a file")
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size < 10:
                refuse(path, f"it has {status.st_size} bytes, and the smallest safetensors file has 10")
            return mmap.mmap(stream.fileno(), status.st_size, access=mmap.ACCESS_READ)
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def _close_quietly(content: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):
        content.close()
