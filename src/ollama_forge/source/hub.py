"""The Hugging Face Hub: what a repo holds at a commit, and its files in this machine's cache, resumed and verified.

In: a repo, a revision, chosen files. Out: a `RepoListing`, and a folder of the Hugging Face cache, where other tools
find the files too. The only user of huggingface_hub, which is imported when something is asked of the Hub. HF_ENDPOINT,
HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are read when it is asked. Which files are needed is `source.hub_files`'.

huggingface_hub 2 begins a cut download anew (`file_download._download_to_tmp_and_move`), so bytes are fetched here:
into `blobs/HASH.incomplete`, continued by Range requests, renamed once their hash is the one that the Hub listed.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ollama_forge.errors import HubError
from ollama_forge.files import Progress, no_progress
from ollama_forge.source.hub_cache import (
    cached_blob,
    find_hub_cache,
    place_in_snapshot,
    read_snapshot,
    repo_folder,
    write_ref,
)
from ollama_forge.source.hub_download import plan_download, run_download
from ollama_forge.source.hub_errors import hub_error, is_out_of_reach, status_of
from ollama_forge.source.hub_files import HubFile, RepoListing, validate_path

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_REVISION = "main"
DEFAULT_ENDPOINT = "https://huggingface.co"
_WAITS_SECONDS = (0.2, 1.0)
_watcher: ContextVar[Progress] = ContextVar("hub_progress", default=no_progress)
_Answer = TypeVar("_Answer")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fetched:
    """Files of a repo on this disk.

    Attributes:
        folder: the cache's snapshot of the commit; each file lies there under its path in the repo.
        downloaded_bytes: what came over the wire; the rest was here already.
    """

    listing: RepoListing
    folder: Path
    files: tuple[HubFile, ...]
    downloaded_bytes: int

    def path(self, file: HubFile) -> Path:
        return self.folder / file.path


@dataclass(frozen=True)
class FoundRepo:
    """A repo that a search found; all of it is what the Hub's index says.

    Attributes:
        files: names only.
    """

    repo: str
    tags: tuple[str, ...]
    files: tuple[str, ...]
    downloads: int
    likes: int
    is_gated: bool


def hub_endpoint(environment: Mapping[str, str] | None = None) -> str:
    """Where the Hub is: HF_ENDPOINT or huggingface.co."""
    values = os.environ if environment is None else environment
    return (values.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def list_repo(repo: str, revision: str = "", *, cache: Path | None = None) -> RepoListing:
    """What a repo holds, pinned to a commit; from the cache when the Hub is out of reach.

    Raises:
        HubError: gated, missing, no such revision, refused, or out of reach and not in the cache.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    wanted = revision or DEFAULT_REVISION
    folder = cache or find_hub_cache()
    try:
        info = _patiently(lambda: _api().model_info(repo, revision=wanted, files_metadata=True, timeout=30))
    except (HTTPError, OfflineModeIsEnabled, OSError) as exc:
        error = hub_error(exc, repo, wanted)
        if is_out_of_reach(exc):
            cached = _list_cached(folder, repo, wanted, error.what)
            if cached is not None:
                return cached
        raise error from exc
    except ValueError as exc:
        raise HubError(
            f"The Hub's answer about {repo!r} could not be read", why=type(exc).__name__, next="Try again later."
        ) from exc
    return _listing(info, repo, wanted)


def fetch_files(
    listing: RepoListing,
    files: Sequence[HubFile],
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Bring files of a listed repo into the cache: what is missing is downloaded, everything is verified by its hash.

    A download that was cut continues where it ended. One bar for all files: `progress`, or that of `watched_by`.

    Raises:
        HubError: refused, out of reach, or not what the listing promised (a commit's files never change).
        DiskError: no room, or the cache cannot be written.
    """
    folder = repo_folder(cache or find_hub_cache(), listing.repo)
    plan = plan_download(listing, files, folder)
    total = sum(file.size_bytes for file in files)
    with (progress or _watcher.get())(f"Getting {listing.repo}", total) as advance:
        downloaded = run_download(plan, hub_endpoint(), advance)
    snapshot = folder / "snapshots" / listing.commit
    if not listing.is_offline:
        for file in files:
            place_in_snapshot(folder, listing.commit, file)
        write_ref(folder, listing.revision, listing.commit)
    return Fetched(listing, snapshot, tuple(files), downloaded)


@contextlib.contextmanager
def watched_by(progress: Progress) -> Iterator[None]:
    """Whatever is downloaded inside the block shows its bar there: a model argument may lie on the Hub, and nobody
    between the command and the download has to know."""
    token = _watcher.set(progress)
    try:
        yield
    finally:
        _watcher.reset(token)


def missing_bytes(listing: RepoListing, files: Iterable[HubFile], *, cache: Path | None = None) -> int:
    """What of `files` would come over the wire, as far as names and sizes tell."""
    folder = repo_folder(cache or find_hub_cache(), listing.repo)
    return sum(file.size_bytes for file in files if cached_blob(folder, file) is None)


def search_repos(query: str, *, tags: Sequence[str] = (), limit: int = 20) -> list[FoundRepo]:
    """Models whose name has the words of `query` and which carry all `tags`, the most downloaded first.

    Raises:
        HubError: refused or out of reach.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        found = list(
            _api().list_models(
                search=query or None, filter=list(tags) or None, sort="downloads", limit=limit, full=True
            )
        )
    except (HTTPError, OfflineModeIsEnabled, OSError) as exc:
        raise hub_error(exc, "", "") from exc
    return [
        FoundRepo(
            repo=info.id,
            tags=tuple(info.tags or ()),
            files=tuple(item.rfilename for item in info.siblings or ()),
            downloads=info.downloads or 0,
            likes=info.likes or 0,
            is_gated=bool(info.gated),
        )
        for info in found
    ]


def _patiently(ask: Callable[[], _Answer]) -> _Answer:
    """Ask again when the Hub is busy or ill; it mostly is for a moment."""
    from huggingface_hub.errors import HTTPError

    for wait in _WAITS_SECONDS:
        try:
            return ask()
        except HTTPError as exc:
            if status_of(exc) not in (408, 429) and status_of(exc) < 500:
                raise
            time.sleep(wait)
    return ask()


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub_endpoint(), library_name="ollama-forge")


def _listing(info: Any, repo: str, revision: str) -> RepoListing:
    """The Hub's answer as a value; everything in it is checked before it becomes a path."""
    commit = info.sha or ""
    if not _COMMIT.fullmatch(commit):
        raise _ill_answer(repo, f"The commit is {commit!r}.")
    if _COMMIT.fullmatch(revision) and revision != commit:
        raise _ill_answer(repo, f"Commit {revision} was asked for and {commit} was given.")
    files = []
    for item in info.siblings or ():
        validate_path(item.rfilename)
        sha256 = item.lfs.sha256 if item.lfs else ""
        git_sha1 = "" if item.lfs else (item.blob_id or "")
        size = item.lfs.size if item.lfs else item.size
        is_hash = _SHA256.fullmatch(sha256) if item.lfs else _COMMIT.fullmatch(git_sha1)
        if not is_hash or not isinstance(size, int) or size < 0:
            raise _ill_answer(repo, f"The hash or the size of {item.rfilename!r} is not given.")
        files.append(HubFile(item.rfilename, size, sha256, git_sha1))
    tags = tuple(info.tags or ())
    return RepoListing(
        repo=repo,
        revision=revision,
        commit=commit,
        files=tuple(files),
        tags=tags,
        licence=next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), ""),
        base_models=base_models(tags),
    )


def base_models(tags: Iterable[str]) -> tuple[str, ...]:
    """The repos that `base_model:` tags name; `base_model:adapter:org/name` names org/name."""
    found = []
    for tag in tags:
        if tag.startswith("base_model:"):
            name = tag.rsplit(":", 1)[1]
            if name not in found:
                found.append(name)
    return tuple(found)


def _list_cached(cache: Path, repo: str, revision: str, why: str) -> RepoListing | None:
    found = read_snapshot(cache, repo, revision)
    if found is None:
        return None
    commit, files = found
    return RepoListing(repo, revision, commit, files, is_offline=True, why_offline=why)


def _ill_answer(repo: str, why: str) -> HubError:
    return HubError(
        f"What {hub_endpoint()} says about {repo!r} makes no sense",
        why=why,
        next="If HF_ENDPOINT is set, check that it is a Hugging Face Hub.",
    )
