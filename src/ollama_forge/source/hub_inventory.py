"""What the Hugging Face cache of this machine holds, and how to make room in it: revision by revision.

In: the cache. Out: `CachedRepo`s, and a `Removal` that is shown before it is done. A model and a dataset of one name
are two things; so are two repos with one commit (a copy of a repo keeps its history).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import NotFoundError, UsageError
from ollama_forge.files import disk_error
from ollama_forge.source.hub_cache import find_hub_cache

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo

KINDS = ("model", "dataset", "space")
_SHORTEST_COMMIT = 7


@dataclass(frozen=True)
class CachedRevision:
    """One commit of a repo.

    Attributes:
        refs: the branches and tags that meant it when it was downloaded.
        size_bytes: of its files, also of those that other revisions share.
    """

    commit: str
    refs: tuple[str, ...]
    size_bytes: int
    files: int
    folder: Path

    def is_meant_by(self, revision: str) -> bool:
        """Whether a branch, a tag or the beginning of a commit means this one."""
        return revision in self.refs or (len(revision) >= _SHORTEST_COMMIT and self.commit.startswith(revision))


@dataclass(frozen=True)
class CachedRepo:
    """A repo in the cache.

    Attributes:
        kind: `model`, `dataset` or `space`.
        size_bytes: on the disk, each file counted once.
        unfinished_bytes: of downloads that were cut.
    """

    kind: str
    repo: str
    folder: Path
    size_bytes: int
    unfinished_bytes: int
    last_used: float
    revisions: tuple[CachedRevision, ...]

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "kind": self.kind,
            "repo": self.repo,
            "folder": str(self.folder),
            "size": self.size_bytes,
            "unfinished": self.unfinished_bytes,
            "revisions": [
                {
                    "commit": revision.commit,
                    "refs": list(revision.refs),
                    "size": revision.size_bytes,
                    "files": revision.files,
                    "folder": str(revision.folder),
                }
                for revision in self.revisions
            ],
        }


@dataclass(frozen=True)
class Removal:
    """Revisions to remove from one repo; all of them means the whole repo, with what was cut.

    Attributes:
        freed_bytes: what no remaining revision needs.
    """

    repo: CachedRepo
    revisions: tuple[CachedRevision, ...]
    freed_bytes: int

    @property
    def is_whole(self) -> bool:
        return len(self.revisions) == len(self.repo.revisions)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "kind": self.repo.kind,
            "repo": self.repo.repo,
            "revisions": [revision.commit for revision in self.revisions],
            "whole": self.is_whole,
            "freed_bytes": self.freed_bytes,
        }


def read_inventory(cache: Path | None = None) -> list[CachedRepo]:
    """Everything in the cache, the largest first. A cache that does not exist is an empty one."""
    folder = cache or find_hub_cache()
    if not folder.is_dir():
        return []
    found = [_repo(entry) for entry in _scan(folder).repos]
    known = {repo.folder for repo in found}
    for path in sorted(folder.iterdir()):
        kind, sign, name = path.name.partition("--")
        if path.is_dir() and sign and kind.removesuffix("s") in KINDS and path not in known:
            unfinished = _unfinished_bytes(path)
            if unfinished:
                repo = name.replace("--", "/", 1)
                found.append(CachedRepo(kind.removesuffix("s"), repo, path, 0, unfinished, 0.0, ()))
    return sorted(found, key=lambda repo: (-repo.size_bytes - repo.unfinished_bytes, repo.kind, repo.repo))


def plan_removal(
    repos: Sequence[CachedRepo], name: str, revisions: Sequence[str] = (), *, kind: str = "model"
) -> Removal:
    """What removing a repo, or some revisions of it, would do.

    Raises:
        NotFoundError: no such repo of that kind, or no such revision, in the cache.
        UsageError: a revision's beginning means several.
    """
    repo = next((repo for repo in repos if (repo.kind, repo.repo) == (kind, name)), None)
    if repo is None:
        others = [other.kind for other in repos if other.repo == name]
        raise NotFoundError(
            f"The cache has no {kind} {name!r}",
            why=f"It has a {others[0]} of that name." if others else "",
            next=f"Add --type {others[0]} if you mean that." if others else "See what it has: ollama-forge hf-cache ls",
        )
    chosen = _chosen(repo, revisions)
    if len(chosen) == len(repo.revisions):
        return Removal(repo, chosen, repo.size_bytes + repo.unfinished_bytes)
    return Removal(repo, chosen, _strategy(repo, chosen).expected_freed_size)


def apply_removal(removal: Removal) -> None:
    """Do it.

    Raises:
        DiskError: the cache cannot be written.
    """
    repo = removal.repo
    try:
        if removal.is_whole:
            shutil.rmtree(repo.folder)
        else:
            _strategy(repo, removal.revisions).execute()
    except OSError as exc:
        raise disk_error(exc, repo.folder, "remove") from exc


def _chosen(repo: CachedRepo, revisions: Sequence[str]) -> tuple[CachedRevision, ...]:
    if not revisions:
        return repo.revisions
    chosen: dict[str, CachedRevision] = {}
    for wanted in revisions:
        found = [revision for revision in repo.revisions if revision.is_meant_by(wanted)]
        if not found:
            here = ", ".join("/".join((revision.commit[:12], *revision.refs)) for revision in repo.revisions)
            raise NotFoundError(
                f"The cache has no revision {wanted!r} of {repo.repo!r}",
                why=f"It has {here}.",
                next="See all: ollama-forge hf-cache ls --revisions",
            )
        if len(found) > 1:
            raise UsageError(
                f"{wanted!r} means {len(found)} revisions of {repo.repo!r}",
                next="Give more of its digits: " + ", ".join(revision.commit[:16] for revision in found),
            )
        chosen[found[0].commit] = found[0]
    return tuple(chosen.values())


def _strategy(repo: CachedRepo, revisions: Sequence[CachedRevision]) -> Any:
    """huggingface_hub's own plan, seen from this repo alone: it goes by commits, which copies of a repo share."""
    info = _scan(repo.folder.parent)
    alone = replace(info, repos=frozenset(entry for entry in info.repos if entry.repo_path == repo.folder))
    return alone.delete_revisions(*(revision.commit for revision in revisions))


def _scan(cache: Path) -> HFCacheInfo:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(cache.resolve())


def _repo(entry: Any) -> CachedRepo:
    revisions = sorted(entry.revisions, key=lambda revision: (-revision.last_modified, revision.commit_hash))
    return CachedRepo(
        kind=entry.repo_type,
        repo=entry.repo_id,
        folder=entry.repo_path,
        size_bytes=entry.size_on_disk,
        unfinished_bytes=_unfinished_bytes(entry.repo_path),
        last_used=entry.last_accessed,
        revisions=tuple(
            CachedRevision(
                commit=revision.commit_hash,
                refs=tuple(sorted(revision.refs)),
                size_bytes=revision.size_on_disk,
                files=len(revision.files),
                folder=revision.snapshot_path,
            )
            for revision in revisions
        ),
    )


def _unfinished_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "blobs").glob("*.incomplete") if path.is_file())
