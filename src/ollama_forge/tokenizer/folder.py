"""The files beside a model that say how it reads text, parsed once and bounded.

In: a Hugging Face folder. Out: `TokenizerFolder`, whose mappings other modules of this package turn into values.
Nothing here is executed: `auto_map` and Python files are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import NotFoundError, TokenizerError
from ollama_forge.files import disk_error

MAX_JSON_BYTES = 256 << 20
MAX_TEMPLATE_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerFolder:
    """What the folder holds; absent files are None or empty.

    Attributes:
        folder: where it is.
        tokenizer: `tokenizer.json`.
        settings: `tokenizer_config.json`.
        special: `special_tokens_map.json`, token texts by role.
        added: `added_tokens.json`, ids by text.
        generation: `generation_config.json`.
        has_sentencepiece: whether `tokenizer.model` is there.
        template: what `chat_template.jinja` (or `chat_template.json`) says; with more names from
            `additional_chat_templates/`, in the order of their names.
    """

    folder: Path
    tokenizer: Mapping[str, Any] | None
    settings: Mapping[str, Any]
    special: Mapping[str, Any]
    added: Mapping[str, int]
    generation: Mapping[str, Any]
    has_sentencepiece: bool
    template: tuple[tuple[str, str], ...]

    @property
    def sentencepiece_path(self) -> Path:
        return self.folder / "tokenizer.model"


def read_tokenizer_folder(folder: Path) -> TokenizerFolder:
    """Read the tokenizer's files of a folder.

    Raises:
        NotFoundError: no such folder.
        TokenizerError: a file is too large, or is not JSON of the expected kind.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {str(folder)!r}", next="Check the path.")
    added = _read_object(folder / "added_tokens.json")
    return TokenizerFolder(
        folder=folder,
        tokenizer=_read_object(folder / "tokenizer.json") or None,
        settings=_read_object(folder / "tokenizer_config.json"),
        special=_read_object(folder / "special_tokens_map.json"),
        added={text: token_id for text, token_id in added.items() if is_token_id(token_id)},
        generation=_read_object(folder / "generation_config.json"),
        has_sentencepiece=(folder / "tokenizer.model").is_file(),
        template=_read_template_files(folder),
    )


def is_token_id(value: Any) -> bool:
    """Whether a JSON value can be a token's id (true and false are numbers in Python, not here)."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def token_text(entry: Any) -> str | None:
    """The text of a special token, which configuration files spell as a string or as an object with `content`."""
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def read_limited(path: Path, limit: int) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        NotFoundError: no such file.
        TokenizerError: it is larger.
        DiskError: it cannot be read.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > limit:
            raise TokenizerError(
                f"{str(path)!r} has {size_bytes:,} bytes, and {limit:,} are allowed",
                why="No tokenizer is as large as that.",
                next="Check that the file is what its name says.",
            )
        return path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def _read_object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_limited(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as exc:
        raise TokenizerError(
            f"{str(path)!r} is not JSON", why=str(exc), next="Download the file again, or mend it by hand."
        ) from exc
    if not isinstance(value, dict):
        raise TokenizerError(
            f"{str(path)!r} holds a {type(value).__name__}, and an object is expected",
            next="Download the file again, or mend it by hand.",
        )
    return value


def _read_text(path: Path) -> str:
    try:
        return read_limited(path, MAX_TEMPLATE_BYTES).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as exc:
        raise TokenizerError(f"{str(path)!r} is not UTF-8", why=str(exc), next="Save it as UTF-8.") from exc


def _read_template_files(folder: Path) -> tuple[tuple[str, str], ...]:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        old = _read_object(folder / "chat_template.json").get("chat_template")
        return (("default", old),) if isinstance(old, str) else ()
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return (("default", _read_text(path)), *((entry.stem, _read_text(entry)) for entry in more))
