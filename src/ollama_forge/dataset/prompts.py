"""Lists of prompts: what a model is asked, without answers.

In: text files (one prompt a line), JSON lines with `prompt` or `text`, or folders of both. Out: the prompts, in order,
each once. What is asked of a model with them is the business of `train` and `jobs`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ollama_forge.errors import DatasetError, NotFoundError
from ollama_forge.files import disk_error

TEXT_ENDINGS = (".txt",)
JSON_ENDINGS = (".jsonl", ".ndjson")
KEYS = ("prompt", "text")


def read_prompts(paths: Sequence[Path], *, at_least: int = 2) -> list[str]:
    """The prompts of some files; a folder stands for the `.txt` and `.jsonl` files in it, by name.

    Empty lines are left out, and so is a prompt that was there before.

    Args:
        at_least: fewer different prompts than this are refused.

    Raises:
        NotFoundError: a path that is not there.
        DatasetError: an empty file, a line that is no prompt, bytes that are no UTF-8, or too few prompts.
        DiskError: a file cannot be read.
    """
    files = find_prompt_files(paths)
    found: dict[str, None] = {}
    for path in files:
        prompts = list(_read_file(path))
        if not prompts:
            raise DatasetError(
                f"{str(path)!r} holds no prompt",
                why="It is empty, or has empty lines only.",
                next="Write one prompt a line, or JSON lines with a 'prompt'.",
            )
        found.update(dict.fromkeys(prompts))
    if len(found) < at_least:
        names = ", ".join(repr(str(path)) for path in files)
        raise DatasetError(
            f"{names} holds {len(found)} prompt{'s' if len(found) > 1 else ''}",
            why=f"At least {at_least} different ones are needed; a mean over so few says nothing.",
            next="Add prompts, one a line; 100 or more are usual.",
        )
    return list(found)


def find_prompt_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """The files that some paths mean, each once.

    Raises:
        NotFoundError: a path that is not there.
        DatasetError: a folder without prompt files, a file of another kind, or no path at all.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise NotFoundError(f"There is no file or folder {str(path)!r}", next="Check the path.")
        if not path.is_dir():
            found[path] = None
            continue
        inside = [
            entry
            for entry in sorted(path.iterdir())
            if entry.is_file() and entry.suffix.lower() in TEXT_ENDINGS + JSON_ENDINGS
        ]
        if not inside:
            raise DatasetError(
                f"No .txt or .jsonl files in {str(path)!r}",
                why="A folder stands for the prompt files in it.",
                next="Name the files themselves.",
            )
        found.update(dict.fromkeys(inside))
    for path in found:
        if path.suffix.lower() not in TEXT_ENDINGS + JSON_ENDINGS:
            raise DatasetError(
                f"{str(path)!r} is neither .txt nor .jsonl",
                why="Prompts are one a line in a .txt file, or JSON lines with a 'prompt' or a 'text'.",
                next="Rename it, or write the prompts into such a file.",
            )
    if not found:
        raise DatasetError("No prompts were named", next="Name a .txt file with one prompt a line.")
    return tuple(found)


def _read_file(path: Path) -> Iterator[str]:
    is_json = path.suffix.lower() in JSON_ENDINGS
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        text = line.strip()
        if text:
            yield _parse_line(text, path, number) if is_json else text


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = raw.count(b"\n", 0, exc.start) + 1
        raise DatasetError(
            f"{str(path)!r} is not UTF-8 text: byte {raw[exc.start]:#04x} in line {line}",
            why="It was saved in another encoding, or is no text at all.",
            next=f"Save it as UTF-8, for example: iconv -f latin1 -t utf-8 {path} > prompts.txt",
        ) from exc


def _parse_line(text: str, path: Path, number: int) -> str:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as exc:
        raise DatasetError(
            f"Line {number} of {str(path)!r} is not JSON: {exc.msg}",
            why='Each line is one object, such as {"prompt": "..."}.',
            next="Mend the line, or use a .txt file with one prompt a line.",
        ) from exc
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(
            f"Line {number} of {str(path)!r} has no prompt: {text[:80]!r}",
            why="A 'prompt' or a 'text' that is not empty is expected.",
            next="Mend the line, or use a .txt file with one prompt a line.",
        )
    return value.strip()
