"""The Hugging Face cache of this machine, read as plain folders: which models it holds, and whether they are whole.

In: the environment (`HF_HUB_CACHE`, `HF_HOME`) or a folder. Out: `CachedModel`s. Nothing is downloaded or changed.
Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache (`models--ORG--NAME/snapshots/REVISION`, whose
files are links into `blobs`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.source.hub_cache import find_hub_cache as find_hf_cache
from ollama_forge.weights.safetensors import open_safetensors

_FOLDER = re.compile(r"models--([A-Za-z0-9][\w.-]{0,95}?)--([A-Za-z0-9][\w.-]{0,95})")
_REVISION = re.compile(r"[0-9a-f]{40}")
_SHORTEST_COMMIT = 7
_MAX_REF_BYTES = 64
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class CachedModel:
    """One revision of a repository in the cache.

    Attributes:
        repo: `organization/name`.
        revision: the commit, 40 digits.
        folder: its files, as transformers loads them.
        refs: branches and tags that meant this revision when it was downloaded.
    """

    repo: str
    revision: str
    folder: Path
    refs: tuple[str, ...] = ()

    def is_at(self, revision: str) -> bool:
        """Whether a branch, a tag or the beginning of a commit means this one; empty means any."""
        is_commit = len(revision) >= _SHORTEST_COMMIT and self.revision.startswith(revision)
        return not revision or revision in self.refs or is_commit

    @property
    def size_bytes(self) -> int:
        """What its files take; files that several names share count once."""
        sizes = {}
        for path in self.folder.rglob("*"):
            if path.is_file():
                real = path.resolve()
                sizes[real] = real.stat().st_size
        return sum(sizes.values())

    def missing(self) -> tuple[str, ...]:
        """What a whole model would have and this one has not, in words; empty when it is whole."""
        found = []
        if not (self.folder / "config.json").is_file():
            found.append("config.json")
        if not any((self.folder / name).is_file() for name in _TOKENIZERS):
            found.append("the tokenizer")
        try:
            open_safetensors(self.folder).close()
        except ForgeError as error:
            found.append(f"the weights: {error.what}")
        return tuple(found)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        missing = self.missing()
        return {
            "revision": self.revision,
            "folder": str(self.folder),
            "complete": not missing,
            "missing": list(missing),
            "size": self.size_bytes,
        }


def read_hf_cache(cache: Path | None = None) -> list[CachedModel]:
    """The models of the cache, one entry for each revision, by name. A cache that cannot be read is an empty one."""
    folder = find_hf_cache() if cache is None else cache
    try:
        repositories = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []
    found = []
    for repository in repositories:
        match = _FOLDER.fullmatch(repository.name)
        snapshots = repository / "snapshots"
        if match is None or not snapshots.is_dir():
            continue
        refs = _read_refs(repository / "refs")
        revisions = [path for path in sorted(snapshots.iterdir()) if path.is_dir() and _REVISION.fullmatch(path.name)]
        revisions.sort(key=lambda path: path.name != refs.get("main"))
        for path in revisions:
            names = tuple(ref for ref, revision in refs.items() if revision == path.name)
            found.append(CachedModel(f"{match[1]}/{match[2]}", path.name, path, names))
    return found


def _read_refs(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        try:
            if path.is_file() and path.stat().st_size <= _MAX_REF_BYTES:
                found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
    return found
