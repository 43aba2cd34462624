"""What a recipe's steps read, by the hash of its content: files, folders, adapters of the Hub.

In: paths and repos. Out: `label -> hash` maps, which become the keys under which a step's result is kept, and lines of
the lock. Hashing gigabytes at every build would be waste: a file of the same size and time keeps its hash, unless the
build is a locked one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.errors import NotFoundError
from ollama_forge.files import Progress, hash_file, no_progress, write_bytes
from ollama_forge.jobs.hub_local import fetch_adapter_files
from ollama_forge.recipe.places import locate
from ollama_forge.source.gguf_names import pick_gguf
from ollama_forge.source.hub import list_repo
from ollama_forge.source.hub_files import HubFile, RepoName, choose_adapter_files, parse_repo

_HASH_NAME = re.compile(r"(?:sha256-)?([0-9a-f]{64})")
_LEFT_OUT = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lock")
_WATCHED_BYTES = 64 << 20


@dataclass
class Fingerprints:
    """Hashes of files, remembered in `memo_path` by size and time.

    Attributes:
        trusts_memo: take a remembered hash; otherwise everything is read again.
    """

    memo_path: Path
    trusts_memo: bool = True
    progress: Progress = no_progress
    _known: dict[str, list[Any]] = field(init=False)
    _is_changed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._known = {}
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.memo_path.read_bytes())
            if isinstance(found, dict):
                self._known = {str(path): row for path, row in found.items() if isinstance(row, list) and len(row) == 3}

    def file(self, path: Path) -> str:
        """SHA-256 of a file; that of a blob is its name.

        Raises:
            NotFoundError: it is not there.
        """
        resolved = path.resolve()
        named = _HASH_NAME.fullmatch(resolved.name) if resolved.parent.name == "blobs" else None
        if named and self.trusts_memo:
            return named[1]
        try:
            status = resolved.stat()
        except OSError as exc:
            raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
        row = self._known.get(str(resolved))
        if self.trusts_memo and row and row[:2] == [status.st_size, status.st_mtime_ns]:
            return str(row[2])
        watch = self.progress if status.st_size > _WATCHED_BYTES else no_progress
        with watch(f"Hashing {path.name}", status.st_size) as advance:
            sha256 = hash_file(resolved, advance).sha256
        news = [status.st_size, status.st_mtime_ns, sha256]
        self._is_changed |= news != row
        self._known[str(resolved)] = news
        return sha256

    def files(self, paths: Sequence[Path], label: str) -> dict[str, str]:
        """Several files, or everything in one folder that a model or an adapter consists of."""
        found = {}
        for path in paths:
            if path.is_dir():
                for entry in sorted(path.iterdir()):
                    if entry.is_file() and entry.suffix.lower() not in _LEFT_OUT and not entry.name.startswith("."):
                        found[f"{label}/{entry.name}"] = self.file(entry)
            else:
                found[label if len(paths) == 1 else f"{label}/{path.name}"] = self.file(path)
        return found

    def save(self) -> None:
        """Remember what was hashed; nothing is written when nothing was."""
        if self._is_changed:
            live = {path: row for path, row in sorted(self._known.items()) if Path(path).exists()}
            write_bytes(self.memo_path, (json.dumps(live, indent=0) + "\n").encode(), overwrite=True)
            self._is_changed = False


@dataclass(frozen=True)
class AdapterInput:
    """An adapter that a step reads.

    Attributes:
        label: as the recipe names it.
        path: on this disk; None for one of the Hub that is still to be fetched.
        repo: pinned to a commit.
        hashes: of its files.
    """

    label: str
    hashes: Mapping[str, str]
    path: Path | None = None
    repo: RepoName | None = None

    @property
    def commit(self) -> str:
        return self.repo.revision if self.repo else ""

    def fetch(self) -> Path:
        """Its path, downloaded where it must be."""
        if self.path is not None:
            return self.path
        assert self.repo is not None
        return fetch_adapter_files(self.repo)[1]


def find_adapter_input(
    text: str, folder: Path, fingerprints: Fingerprints, *, revision: str = "", file: str = ""
) -> AdapterInput:
    """An adapter as a recipe names it: a path from the recipe's folder, or `hf:org/name`.

    Raises:
        NotFoundError: nothing is there.
        HubError: as `source.hub`.
    """
    if not text.startswith("hf:"):
        path = locate(folder, text)
        if not path.exists():
            raise NotFoundError(f"There is no adapter {text!r}", why=f"Looked for {path}.", next="Check the path.")
        hashes = fingerprints.files([path], text)
        if path.is_dir() and not hashes:
            hashes = fingerprints.files(sorted(path.glob("*.gguf")) + sorted(path.glob("*.bin")), text)
        return AdapterInput(text, hashes, path)
    named = parse_repo(text)
    listing = list_repo(named.repo, revision or named.revision)
    wanted = file or named.file
    files: Sequence[HubFile]
    if wanted:
        files = pick_gguf(listing, file=wanted).choice.files[:1]
    else:
        files = choose_adapter_files(listing)
    pinned = RepoName(named.repo, listing.commit, wanted)
    return AdapterInput(text, {f"{text}/{item.path}": item.etag for item in files}, None, pinned)


def hash_of(value: Any) -> str:
    """One hash over plain values: same values, same hash."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
