"""The layout of the Hugging Face cache, as huggingface_hub and transformers keep it, written and read without them.

`models--ORG--NAME/blobs/HASH` holds bytes, `snapshots/COMMIT/PATH` links to them, `refs/BRANCH` names a commit.
In: a repo and its files. Out: paths. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ollama_forge.errors import HubError
from ollama_forge.files import disk_error, make_folder, place_copy, write_bytes
from ollama_forge.source.hub_files import HubFile

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REF = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHORTEST_COMMIT = 7
_MAX_REF_BYTES = 64


def find_hub_cache(environment: Mapping[str, str] | None = None) -> Path:
    """The folder in which huggingface_hub keeps what it downloads, by its own rules (`constants.py`)."""
    values = os.environ if environment is None else environment
    named = values.get("HF_HUB_CACHE") or values.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(os.path.expandvars(named)).expanduser()
    home = values.get("HF_HOME")
    if home:
        return Path(os.path.expandvars(home)).expanduser() / "hub"
    cache = values.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "huggingface" / "hub"


def repo_folder(cache: Path, repo: str) -> Path:
    """Where a model repo lies in the cache."""
    return cache / ("models--" + repo.replace("/", "--"))


def cached_blob(folder: Path, file: HubFile) -> Path | None:
    """The bytes of a file, when the cache has something of its hash and size (not read here)."""
    path = folder / "blobs" / file.etag
    with contextlib.suppress(OSError):
        if path.stat().st_size == file.size_bytes:
            return path
    return None


def read_snapshot(cache: Path, repo: str, revision: str) -> tuple[str, tuple[HubFile, ...]] | None:
    """What the cache holds of a revision: its commit and files. None when it has nothing of it."""
    folder = repo_folder(cache, repo)
    commit = _cached_commit(folder, revision)
    if commit is None:
        return None
    snapshot = folder / "snapshots" / commit
    files = []
    for path in sorted(snapshot.rglob("*")):
        if not path.is_file():
            continue
        name = path.resolve().name
        if _HASH.fullmatch(name):
            sha256, git_sha1 = (name, "") if len(name) == 64 else ("", name)
            files.append(HubFile(path.relative_to(snapshot).as_posix(), path.stat().st_size, sha256, git_sha1))
    return (commit, tuple(files)) if files else None


def _cached_commit(folder: Path, revision: str) -> str | None:
    commit = revision
    if not _COMMIT.fullmatch(revision) and _REF.fullmatch(revision):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            path = folder / "refs" / revision
            if path.stat().st_size <= _MAX_REF_BYTES:
                commit = path.read_text(encoding="ascii").strip()
    if _COMMIT.fullmatch(commit):
        return commit if (folder / "snapshots" / commit).is_dir() else None
    if len(revision) < _SHORTEST_COMMIT or not re.fullmatch(r"[0-9a-f]+", revision):
        return None
    found = [path.name for path in (folder / "snapshots").glob(revision + "*") if _COMMIT.fullmatch(path.name)]
    return found[0] if len(found) == 1 else None


def validate_unchanged(folder: Path, commit: str, file: HubFile) -> None:
    """Refuse a file that had another hash when the same commit was downloaded before.

    Raises:
        HubError: the commit is not what it was.
    """
    link = folder / "snapshots" / commit / file.path
    if not link.is_symlink():
        return
    known = link.readlink().name
    if _HASH.fullmatch(known) and len(known) == len(file.etag) and known != file.etag:
        raise HubError(
            f"{file.path!r} of commit {commit[:12]} is not the file that it was",
            why=f"A commit never changes; this one had {known[:12]} before and has {file.etag[:12]} now.",
            next="Do not use what this server sends. To begin anew: ollama-forge hf-cache rm " + _repo_of(folder),
        )


def _repo_of(folder: Path) -> str:
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def place_in_snapshot(folder: Path, commit: str, file: HubFile) -> Path:
    """Let a commit's snapshot name a blob that is complete.

    Raises:
        DiskError: the cache cannot be written.
    """
    link = folder / "snapshots" / commit / file.path
    blob = folder / "blobs" / file.etag
    make_folder(link.parent)
    if link.exists():
        return link
    temp = link.with_name(f".{os.getpid()}-{file.etag[:16]}.link")
    try:
        temp.unlink(missing_ok=True)
        temp.symlink_to(os.path.relpath(blob, link.parent))
        temp.replace(link)
    except OSError as exc:
        with contextlib.suppress(OSError):
            temp.unlink()
        if os.name != "nt":
            raise disk_error(exc, link, "write") from exc
        place_copy(blob, link, overwrite=True)  # Windows lets only some accounts make links
    return link


def write_ref(folder: Path, revision: str, commit: str) -> None:
    """Remember which commit a branch or tag meant, for the next time without a network.

    Raises:
        DiskError: the cache cannot be written.
    """
    if _COMMIT.fullmatch(revision) or not _REF.fullmatch(revision) or revision.endswith(".lock"):
        return
    path = folder / "refs" / revision
    with contextlib.suppress(OSError):
        if path.read_bytes() == commit.encode():
            return
    write_bytes(path, commit.encode(), overwrite=True)
