"""What `ollama list` prints, read: JSON where the program can, else its plain table.

In: text, or the program on PATH. Out: `ListedModel` rows, and the lines that were not understood.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from ollama_forge.errors import ServerError

LINE = re.compile(
    r"^(?P<name>\S+)\s+(?P<id>[0-9a-f]{6,})\s+(?P<size_val>\d+(?:\.\d+)?)\s+(?P<size_unit>[KMGTP]B)\s+(?P<modified>.+)$"
)
# What the strategy's expression leaves out: models of a few bytes, and those in Ollama's cloud, which have no size.
_LINE_WITHOUT_UNIT = re.compile(r"^(?P<name>\S+)\s+(?P<id>[0-9a-f]{6,})\s+(?:(?P<bytes>\d+) B|-)\s+(?P<modified>.+)$")
_SIZE = re.compile(r"(?P<size_val>\d+(?:\.\d+)?)\s*(?P<size_unit>[KMGTP]?B)", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15}
_TIMEOUT_SECONDS = 30
_ENVIRONMENT = ("PATH", "HOME", "USERPROFILE", "SYSTEMROOT", "TMPDIR", "TEMP", "OLLAMA_HOST", "LANG")


@dataclass(frozen=True)
class ListedModel:
    """A row. `id` is the start of the manifest's digest, or all of it; `size_bytes` is rounded in the plain table."""

    name: str
    id: str
    size_bytes: int | None


@dataclass(frozen=True)
class Listing:
    """What was printed. `form` is `json` or `text`."""

    form: str
    models: tuple[ListedModel, ...]
    strange_lines: tuple[str, ...] = ()


def parse_size(text: str) -> int | None:
    """`4.7 GB` -> 4_700_000_000 (decimal units, as Ollama prints them); None when it is no size."""
    match = _SIZE.fullmatch(text.strip())
    return _bytes(match["size_val"], match["size_unit"]) if match else None


def parse_plain_listing(text: str) -> Listing:
    """The table that `ollama list` prints for people; its head line and empty lines are passed over."""
    models, strange = [], []
    for line in text.splitlines():
        line = line.strip()
        if not line or line.split()[:2] == ["NAME", "ID"]:
            continue
        if match := LINE.match(line):
            models.append(ListedModel(match["name"], match["id"], _bytes(match["size_val"], match["size_unit"])))
        elif match := _LINE_WITHOUT_UNIT.match(line):
            models.append(ListedModel(match["name"], match["id"], int(match["bytes"]) if match["bytes"] else None))
        else:
            strange.append(line[:200])
    return Listing("text", tuple(models), tuple(strange))


def parse_json_listing(text: str) -> Listing | None:
    """`ollama list --format json`: a list, an object with `models`, or one object per line; None when it is no JSON."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        try:
            document = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            return None
    rows = document.get("models") if isinstance(document, dict) and "models" in document else document
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or (not rows and not text.strip()):
        return None
    models, strange = [], []
    for row in rows:
        name = (row.get("name") or row.get("model")) if isinstance(row, dict) else None
        if not isinstance(name, str):
            strange.append(json.dumps(row)[:200])
            continue
        digest, size = row.get("digest") or row.get("id") or row.get("ID"), row.get("size")
        size_bytes = parse_size(size) if isinstance(size, str) else size if isinstance(size, int) else None
        models.append(ListedModel(name, digest.removeprefix("sha256:") if isinstance(digest, str) else "", size_bytes))
    return Listing("json", tuple(models), tuple(strange))


def read_listing() -> Listing:
    """Ask the `ollama` program: JSON first, its plain table where it has no JSON.

    Raises:
        ServerError: it is not on PATH, or it failed.
    """
    program = shutil.which("ollama")
    if program is None:
        raise ServerError(
            "There is no Ollama to list: no store, no server that answers, and no `ollama` on PATH",
            next="Name the models folder: ollama-forge registry import --store DIR",
        )
    in_json = _run([program, "list", "--format", "json"])
    listing = parse_json_listing(in_json.stdout) if in_json.returncode == 0 else None
    if listing is not None:
        return listing
    plain = _run([program, "list"])
    if plain.returncode:
        raise ServerError(
            f"`ollama list` failed with exit code {plain.returncode}",
            why=plain.stderr.strip()[-300:],
            next="Start it with `ollama serve`, or name the models folder: ollama-forge registry import --store DIR",
        )
    return parse_plain_listing(plain.stdout)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        return subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ServerError(f"`{' '.join(command)}` did not end well: {exc}", next="Try it by hand.") from exc


def _bytes(value: str, unit: str) -> int:
    whole, _, fraction = value.partition(".")
    scale = _UNITS[unit.upper()]
    return int(whole) * scale + (int(fraction) * scale // 10 ** len(fraction) if fraction else 0)
