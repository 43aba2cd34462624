"""Apply edits to a Hugging Face folder: a new folder with the same files; only the edited tensors' bytes differ.

In: an open checkpoint of safetensors, edits by tensor name, and where to put the result. Out: the folder, whole or not
at all, and what storing the edits cost. Shards keep their headers, so every other tensor is copied byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ollama_forge.errors import ExistsError, UnsupportedError
from ollama_forge.files import (
    Advance,
    atomic_output,
    disk_error,
    fsync_folder,
    is_process_alive,
    make_folder,
    place_copy,
    require_free_space,
)
from ollama_forge.gguf.native import quantize
from ollama_forge.gguf.types import GGMLType
from ollama_forge.transform.edits import Floats, LossMeter, OutputEdit, TensorEdit, TensorLoss, require_storable
from ollama_forge.transform.outputs import edit_outputs
from ollama_forge.transform.steering import store_rows
from ollama_forge.weights.checkpoint import Checkpoint
from ollama_forge.weights.decode import SAME_BYTES, decode
from ollama_forge.weights.header import SafetensorsTensor
from ollama_forge.weights.safetensors import SafetensorsFolder

PIECE_ELEMENTS = 1 << 20
_REPLACED = "-replaced"
_MARKS = ("config.json", "adapter_config.json")
_LEFT_BEHIND = (".bin", ".pt", ".pth", ".ckpt", ".gguf")


def size_of_edited(checkpoint: Checkpoint) -> int:
    """Bytes of the shards that will be written anew."""
    assert checkpoint.folder is not None
    return checkpoint.folder.size_bytes


def write_edited_folder(
    checkpoint: Checkpoint,
    edits: Sequence[TensorEdit | OutputEdit],
    target: Path,
    *,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> list[TensorLoss]:
    """Write the folder.

    Raises:
        ExistsError: the target is there and `overwrite` is false.
        UnsupportedError: an edited tensor that is neither F32, F16 nor BF16.
        GGUFError: a result that is not finite.
        DiskError: no room, or the system refused.
    """
    source = checkpoint.folder
    assert source is not None
    wanted = {edit.name: edit for edit in edits}
    for name in wanted:
        _require_codable(source.find_tensor(name))
    losses: list[TensorLoss] = []
    with atomic_folder(target, overwrite=overwrite, expected_bytes=source.size_bytes) as folder:
        shards = {path.name for path in source.files}
        for entry in sorted(checkpoint.path.iterdir()):
            if entry.name in shards or not entry.is_file() or entry.suffix.lower() in _LEFT_BEHIND:
                continue
            place_copy(entry.resolve(), folder / entry.name, may_hardlink=False)
        for path in source.files:
            _write_shard(source, path, folder / path.name, wanted, losses, advance)
    return losses


@contextlib.contextmanager
def atomic_folder(target: Path, *, overwrite: bool = False, expected_bytes: int = 0) -> Iterator[Path]:
    """Give an empty folder that becomes `target` only when the block ends well. What a killed process left is removed.

    Raises:
        ExistsError: the target is there and `overwrite` is false, or it is no folder that this replaces safely.
        DiskError: no room, or the system refused.
    """
    make_folder(target.parent)
    _clear_leftovers(target)
    require_free_target(target, overwrite=overwrite)
    if expected_bytes:
        require_free_space(target.parent, expected_bytes, target.name)
    temp = target.with_name(f".{target.name}.forge-folder-{os.getpid()}")
    old = temp.with_name(temp.name + _REPLACED)
    try:
        temp.mkdir()
        yield temp
        fsync_folder(temp)
        require_free_target(target, overwrite=overwrite)
        if target.exists():
            target.rename(old)
        temp.rename(target)
        fsync_folder(target.parent)
    except OSError as exc:
        if old.exists() and not target.exists():
            old.rename(target)
        raise disk_error(exc, target, "write") from exc
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def require_free_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that may not be replaced.

    Raises:
        ExistsError: it is there and `overwrite` is false, or it is no folder that this replaces safely.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExistsError(
            f"{str(target)!r} is there and is no folder",
            why="The result is a folder.",
            next="Choose another name for -o.",
        )
    if target.exists() and not overwrite and any(target.iterdir()):
        raise ExistsError(
            f"The folder {str(target)!r} exists already",
            why="Nothing is overwritten unless you ask for it.",
            next="Add --force to replace it, or choose another name.",
        )
    if target.exists() and any(target.iterdir()) and not any((target / name).is_file() for name in _MARKS):
        raise ExistsError(
            f"The folder {str(target)!r} holds something else than a model or an adapter",
            why="It would be lost.",
            next="Choose another name for -o.",
        )


def _clear_leftovers(target: Path) -> None:
    """Undo what a killed process left: half a result goes, a folder that was about to be replaced comes back."""
    pattern = re.compile(re.escape(f".{target.name}.forge-folder-") + r"(\d+)(" + re.escape(_REPLACED) + ")?")
    for entry in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if match is None or is_process_alive(int(match[1])):
            continue
        if match[2] and not target.exists():
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def _require_codable(tensor: SafetensorsTensor) -> None:
    if tensor.dtype not in SAME_BYTES:
        raise UnsupportedError(
            f"{tensor.name!r} holds {tensor.dtype} numbers, which cannot be edited",
            why="Edited tensors go back into their own type, and F32, F16 and BF16 are written.",
            next="Convert the folder to GGUF first, and edit that: ollama-forge convert FOLDER -o model.gguf",
        )


def _write_shard(
    source: SafetensorsFolder,
    path: Path,
    target: Path,
    wanted: dict[str, TensorEdit | OutputEdit],
    losses: list[TensorLoss],
    advance: Advance | None,
) -> None:
    tensors = sorted((t for t in source.tensors.values() if t.file == path), key=lambda t: (t.offset, t.nbytes))
    first = min((tensor.offset for tensor in tensors), default=path.stat().st_size)
    with atomic_output(target) as sink, path.open("rb") as stream:
        sink.write(stream.read(first))
        for tensor in tensors:
            edit = wanted.get(tensor.name)
            if edit is None:
                chunks: Iterator[Any] = source.iter_chunks(tensor.name)
            elif isinstance(edit, OutputEdit):
                chunks = _edited_outputs(source, tensor, edit, losses)
            else:
                chunks = _edited(source, tensor, edit, losses)
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                sink.write(view)
                if advance:
                    advance(len(view))


def _edited_outputs(
    source: SafetensorsFolder, tensor: SafetensorsTensor, edit: OutputEdit, losses: list[TensorLoss]
) -> Iterator[Any]:
    meter = LossMeter(tensor.name, tensor.dtype)
    view = source.read(tensor.name)
    yield from edit_outputs(view, SAME_BYTES[tensor.dtype], tensor.shape, edit, meter)
    view.release()
    source.release(tensor.name)
    losses.append(meter.result())


def _edited(
    source: SafetensorsFolder, tensor: SafetensorsTensor, edit: TensorEdit, losses: list[TensorLoss]
) -> Iterator[Any]:
    encoding: GGMLType = SAME_BYTES[tensor.dtype]
    n_columns = tensor.shape[-1] if tensor.shape else 1
    total = int(np.prod(tensor.shape[:-1], dtype=np.int64))
    stride = n_columns * (4 if encoding is GGMLType.F32 else 2)
    at_once = max(1, PIECE_ELEMENTS // max(1, n_columns))
    change = edit.open()
    meter = LossMeter(tensor.name, tensor.dtype)
    view = source.read(tensor.name)
    for first in range(0, total, at_once):
        n_rows = min(at_once, total - first)
        raw = view[first * stride : (first + n_rows) * stride]
        before = np.array(decode(raw, tensor.dtype), np.float32).reshape(n_rows, n_columns)

        def changed(rows: slice, part: Floats, first: int = first) -> Floats:
            after = np.ascontiguousarray(change(first + rows.start, part), dtype=np.float32)
            require_storable(after, encoding, tensor.name)
            return after

        if edit.is_precise and edit.inputs is not None and len(tensor.shape) > 1:
            yield store_rows(before, changed, encoding, edit.inputs(), report=meter.add_parts).reshape(-1)
            continue
        after = changed(slice(0, n_rows), before)
        encoded = quantize(after, encoding)
        stored = np.array(decode(memoryview(encoded.tobytes()), tensor.dtype), np.float32).reshape(before.shape)
        meter.add(before, after, stored)
        yield encoded.reshape(-1)
    view.release()
    source.release(tensor.name)
    losses.append(meter.result())
