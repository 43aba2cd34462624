"""The JSON files of a model folder, read without believing them.

In: a folder. Out: mappings. What the keys mean belongs to `arch.config` and `tokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.errors import FormatError, NotFoundError
from ollama_forge.files import disk_error
from ollama_forge.weights.header import parse_json
from ollama_forge.weights.safetensors import resolve_member

_MAX_CONFIG_BYTES = 16 << 20


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a model folder.

    Raises:
        NotFoundError: no such folder, or no config.json in it.
        FormatError: it is not a JSON object, or too large.
        UnsafeFileError: it is a link that leads out of the folder.
        DiskError: it cannot be read.
    """
    if not folder.is_dir():
        raise NotFoundError(
            f"There is no folder {str(folder)!r}",
            next="Check the path; a model on the Hub is named hf:organization/repository.",
        )
    if not (folder / "config.json").exists():
        raise NotFoundError(
            f"{str(folder)!r} has no config.json",
            why="It says what kind of model the folder holds; without it the weights cannot be understood.",
            next="Take config.json from the model's original repository, or name the right folder.",
        )
    path = resolve_member(folder, "config.json")
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    if len(text) > _MAX_CONFIG_BYTES:
        raise FormatError(f"{str(path)!r} has more than {_MAX_CONFIG_BYTES:,} bytes", why="It is no configuration.")
    return parse_json(text, path)
