"""Bytes from the Hub into the cache: continued where they were cut, and renamed only when their hash is right.

In: a `RepoListing`, files of it, and the cache's folder of the repo. Out: complete blobs. Part of `source.hub`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urljoin, urlsplit

from ollama_forge.errors import HubError
from ollama_forge.files import COPY_CHUNK_BYTES, Advance, disk_error, make_folder, require_free_space
from ollama_forge.source.hub_cache import cached_blob, validate_unchanged
from ollama_forge.source.hub_errors import hub_error, status_of
from ollama_forge.source.hub_files import HubFile, RepoListing

if TYPE_CHECKING:
    from typing import BinaryIO

_WAITS_SECONDS = (0.2, 1.0, 3.0, 6.0)
_TIMEOUT_SECONDS = 30
_AUTHORIZATION = "authorization"


class _Hash(Protocol):
    def update(self, data: bytes | bytearray | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class DownloadPlan:
    """What is to come and what is here.

    Attributes:
        folder: the cache's folder of the repo.
        here: files whose bytes seem to be in the cache; they are verified.
        missing: the others.
    """

    listing: RepoListing
    folder: Path
    here: tuple[HubFile, ...]
    missing: tuple[HubFile, ...]


def plan_download(listing: RepoListing, files: Sequence[HubFile], folder: Path) -> DownloadPlan:
    """Look at the cache; nothing is changed.

    Raises:
        HubError: a file had another hash when this commit was downloaded before.
    """
    here: list[HubFile] = []
    missing: list[HubFile] = []
    for file in files:
        validate_unchanged(folder, listing.commit, file)
        (missing if cached_blob(folder, file) is None else here).append(file)
    return DownloadPlan(listing, folder, tuple(here), tuple(missing))


def run_download(plan: DownloadPlan, endpoint: str, advance: Advance) -> int:
    """Verify what is here, fetch what is not. Returns the bytes that came over the wire.

    Raises:
        HubError: refused, out of reach, or other bytes than the listing promised.
        DiskError: no room, or the cache cannot be written.
    """
    missing = list(plan.missing)
    for file in plan.here:
        blob = plan.folder / "blobs" / file.etag
        if _hash_blob(blob, file) == file.etag:
            advance(file.size_bytes)
        elif plan.listing.is_offline:
            raise HubError(
                f"{file.path!r} of {plan.listing.repo!r} is damaged in the cache: {str(blob)!r}",
                why=f"Its hash is not {file.etag[:12]}, and the Hub is out of reach.",
                next="Run the command again with a network: it is then downloaded anew.",
            )
        else:
            _remove(blob)
            missing.append(file)
    if not missing:
        return 0
    blobs = plan.folder / "blobs"
    make_folder(blobs)
    begun = sum(min(_size(_incomplete(blobs, file)), file.size_bytes) for file in missing)
    require_free_space(blobs, sum(file.size_bytes for file in missing) - begun, f"the files of {plan.listing.repo}")
    return sum(_fetch(plan, file, endpoint, advance) for file in missing)


def _fetch(plan: DownloadPlan, file: HubFile, endpoint: str, advance: Advance) -> int:
    from huggingface_hub.utils import WeakFileLock

    blob = plan.folder / "blobs" / file.etag
    lock = plan.folder.parent / ".locks" / plan.folder.name / f"{file.etag}.lock"
    make_folder(lock.parent)
    with WeakFileLock(lock):
        if cached_blob(plan.folder, file) is not None:  # another process fetched it while this one waited
            advance(file.size_bytes)
            return 0
        part = _Part(_incomplete(blob.parent, file), file, advance)
        try:
            came = _fill(part, plan.listing, file, endpoint)
            part.finish(blob)
        finally:
            part.close()
    return came


def _fill(part: _Part, listing: RepoListing, file: HubFile, endpoint: str) -> int:
    """Bring a part to its full length, with patience for a network that comes and goes."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    came = failures = 0
    while True:
        before = part.size_bytes
        try:
            came += _stream(part, listing, file, endpoint)
            if part.is_right():
                return came
            if part.size_bytes == file.size_bytes:
                if not part.was_resumed:
                    raise _wrong_bytes(listing, file)
                part.restart()  # what an earlier run left was wrong
            cause = _cut(listing, file)
        except OfflineModeIsEnabled as exc:
            raise hub_error(exc, listing.repo, listing.revision) from exc
        except (HTTPError, ConnectionError) as exc:
            status = status_of(exc)
            cause = hub_error(exc, listing.repo, listing.revision)
            if status and status not in (408, 429) and status < 500:
                raise cause from exc
        failures = 1 if part.size_bytes > before else failures + 1
        if failures > len(_WAITS_SECONDS):
            raise cause
        time.sleep(_WAITS_SECONDS[failures - 1])


def _stream(part: _Part, listing: RepoListing, file: HubFile, endpoint: str) -> int:
    """One request for what is missing of a part. Returns the bytes that came; they may be fewer than asked for."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    if part.size_bytes == file.size_bytes:
        return 0
    url, headers = _locate(listing, file, endpoint)
    if part.size_bytes:
        headers["Range"] = f"bytes={part.size_bytes}-"
    came = 0
    with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
        if response.status_code == 416:
            part.restart()
            return 0
        hf_raise_for_status(response)
        if part.size_bytes and not _continues(response.headers, response.status_code, part.size_bytes):
            part.restart()
        for chunk in response.iter_bytes():
            part.write(chunk)
            came += len(chunk)
    return came


def _continues(headers: Mapping[str, str], status: int, offset: int) -> bool:
    return status == 206 and headers.get("Content-Range", "").startswith(f"bytes {offset}-")


def _locate(listing: RepoListing, file: HubFile, endpoint: str) -> tuple[str, dict[str, str]]:
    """Where the bytes of a file lie now, and the headers to ask with; the token goes to the Hub only.

    Raises:
        HubError: the Hub names another commit or another hash than it listed.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=endpoint)
    facts = get_hf_file_metadata(url, timeout=_TIMEOUT_SECONDS, endpoint=endpoint, library_name="ollama-forge")
    if facts.etag != file.etag or (facts.commit_hash or listing.commit) != listing.commit:
        raise HubError(
            f"{file.path!r} of commit {listing.commit[:12]} changed while it was read",
            why=f"The list says {file.etag[:12]}, the file itself {str(facts.etag)[:12]}. A commit never changes.",
            next="Do not use what this server sends.",
        )
    location = urljoin(url, facts.location)
    headers: dict[str, str] = dict(build_hf_headers(library_name="ollama-forge"))
    if urlsplit(location)[:2] != urlsplit(endpoint)[:2]:
        headers = {name: value for name, value in headers.items() if name.lower() != _AUTHORIZATION}
    headers["Accept-Encoding"] = "identity"
    return location, headers


def _cut(listing: RepoListing, file: HubFile) -> HubError:
    return HubError(
        f"The connection ended again and again while {file.path!r} of {listing.repo!r} came",
        next="Run the same command again; what came so far is kept.",
    )


def _wrong_bytes(listing: RepoListing, file: HubFile) -> HubError:
    return HubError(
        f"What came for {file.path!r} of {listing.repo!r} is not what the Hub listed",
        why=f"Its hash is not {file.etag[:16]}...; it was thrown away.",
        next="Run the command again; if it happens again, a proxy or a mirror (HF_ENDPOINT) changes files.",
    )


class _Part:
    """A file that grows in the cache and is hashed as it does."""

    def __init__(self, path: Path, file: HubFile, advance: Advance) -> None:
        self.path = path
        self.was_resumed = False
        self.size_bytes = 0
        self._file = file
        self._advance = advance
        self._hash = _new_hash(file)
        with _disk(path):
            self._stream: BinaryIO = path.open("r+b" if path.exists() else "x+b")
            self._read_what_is_there()

    def _read_what_is_there(self) -> None:
        buffer = memoryview(bytearray(COPY_CHUNK_BYTES))
        while count := self._stream.readinto(buffer):  # type: ignore[attr-defined]
            self._hash.update(buffer[:count])
            self.size_bytes += count
        if self.size_bytes > self._file.size_bytes:
            self._truncate()
        self.was_resumed = self.size_bytes > 0
        self._advance(self.size_bytes)

    def write(self, chunk: bytes) -> None:
        if self.size_bytes + len(chunk) > self._file.size_bytes:
            raise HubError(
                f"More bytes came for {self._file.path!r} than the Hub listed",
                next="Run the command again; if it happens again, a proxy or a mirror (HF_ENDPOINT) changes files.",
            )
        with _disk(self.path):
            self._stream.write(chunk)
        self._hash.update(chunk)
        self.size_bytes += len(chunk)
        self._advance(len(chunk))

    def restart(self) -> None:
        """Begin from the first byte."""
        self._advance(-self.size_bytes)
        self._truncate()
        self.was_resumed = False

    def _truncate(self) -> None:
        with _disk(self.path):
            self._stream.seek(0)
            self._stream.truncate()
        self._hash = _new_hash(self._file)
        self.size_bytes = 0

    def is_right(self) -> bool:
        return self.size_bytes == self._file.size_bytes and self._hash.hexdigest() == self._file.etag

    def finish(self, blob: Path) -> None:
        """Give the part its final name."""
        with _disk(blob):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self.path.replace(blob)

    def close(self) -> None:
        """Leave what came for the next time; what is as long as the file and is not it is of no use."""
        with contextlib.suppress(OSError):
            self._stream.close()
        if self.size_bytes == self._file.size_bytes and not self.is_right():
            _remove(self.path)


class _InPlacePart(_Part):
    """A part inside a file that has its full length already and that others look at while it is filled."""

    def _read_what_is_there(self) -> None:
        pass

    def _truncate(self) -> None:
        self._stream.seek(0)
        self._hash = _new_hash(self._file)
        self.size_bytes = 0

    def close(self) -> None:
        self._stream.close()


def fill_in_place(listing: RepoListing, file: HubFile, path: Path, endpoint: str) -> int:
    """Download a whole file over one of the same length, and verify it. Returns the bytes that came.

    Raises:
        HubError, DiskError: as `run_download`.
    """
    part = _InPlacePart(path, file, lambda _count: None)
    try:
        return _fill(part, listing, file, endpoint)
    finally:
        with _disk(path):
            part.close()


def fetch_beginning(listing: RepoListing, file: HubFile, n_bytes: int, endpoint: str) -> bytes:
    """The first bytes of a file; they are not verified, since a hash is of a whole file.

    Raises:
        HubError: refused, out of reach, or fewer bytes than asked for.
    """
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import get_session, hf_raise_for_status

    for wait in (*_WAITS_SECONDS, None):
        try:
            url, headers = _locate(listing, file, endpoint)
            headers["Range"] = f"bytes=0-{n_bytes - 1}"
            begun = bytearray()
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():
                    begun += chunk
                    if len(begun) >= n_bytes:
                        return bytes(begun[:n_bytes])
            error = _cut(listing, file)
        except (HTTPError, OfflineModeIsEnabled, ConnectionError) as exc:
            error = hub_error(exc, listing.repo, listing.revision)
            if 400 <= status_of(exc) < 500 and status_of(exc) not in (408, 429):
                raise error from exc
        if wait is not None:
            time.sleep(wait)
    raise error


def _new_hash(file: HubFile) -> _Hash:
    if file.sha256:
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)  # git's own hash of a blob
    digest.update(b"blob %d\0" % file.size_bytes)
    return digest


def _hash_blob(path: Path, file: HubFile) -> str:
    digest = _new_hash(file)
    buffer = memoryview(bytearray(COPY_CHUNK_BYTES))
    with _disk(path), path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _incomplete(blobs: Path, file: HubFile) -> Path:
    return blobs / f"{file.etag}.incomplete"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise disk_error(exc, path, "write") from exc
