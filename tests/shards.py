"""A GGUF file as a set of two shards."""

from __future__ import annotations

from pathlib import Path

from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field, copy_entry, from_reader, write_gguf


def write_shards(whole: Path, folder: Path) -> list[Path]:
    """Half of the tensors each; every shard has all keys of the whole file."""
    paths = [folder / f"split-{number:05}-of-00002.gguf" for number in (1, 2)]
    with open_gguf(whole) as opened:
        names = list(opened.tensors)
        for number, path in enumerate(paths):
            part = names[: len(names) // 2] if number == 0 else names[len(names) // 2 :]
            fields = [from_reader(field) for field in opened.fields.values()]
            fields += [
                Field("split.no", ValueType.UINT16, number),
                Field("split.count", ValueType.UINT16, 2),
                Field("split.tensors.count", ValueType.INT32, len(names)),
            ]
            with atomic_output(path) as sink:
                write_gguf(sink, fields, [copy_entry(opened, name) for name in part])
    return paths
