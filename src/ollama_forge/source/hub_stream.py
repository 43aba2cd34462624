"""A repo's safetensors as a folder that looks whole, of which only a few shards hold their bytes at any time.

In: a `RepoListing` and the files of a model. Out: a folder under the cache that can be opened like any other; each
shard has its header, and gets its bytes when `need` is called with it. It is given up again when others are needed, so
that a model can be converted on a disk that could not hold both it and the result.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ollama_forge.errors import HubError, SafetensorsError
from ollama_forge.files import disk_error, is_process_alive, make_folder, require_free_space
from ollama_forge.source.hub import fetch_files, hub_endpoint
from ollama_forge.source.hub_cache import find_hub_cache, place_in_snapshot, repo_folder
from ollama_forge.source.hub_download import fetch_beginning, fill_in_place
from ollama_forge.source.hub_files import HubFile, RepoListing, is_model_weights

MAX_SHARDS = 2
_SCRATCH = ".ollama-forge-import-"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


class ShardStream:
    """The folder, and which of its shards are here.

    Attributes:
        folder: looks like the cache's snapshot of the commit.
        downloaded_bytes: what came over the wire so far.
        most_resident: the largest number of shards that were here at once.
    """

    def __init__(self, listing: RepoListing, files: Sequence[HubFile], scratch: Path) -> None:
        self._listing = listing
        self._endpoint = hub_endpoint()
        self._repo = repo_folder(scratch, listing.repo)
        self._shards = {file.name: file for file in files if is_model_weights(file)}
        self._headers: dict[str, bytes] = {}
        self._resident: list[str] = []
        self._in_use: set[str] = set()
        self._lock = threading.Lock()
        self.downloaded_bytes = 0
        self.most_resident = 0
        beside = [file for file in files if not is_model_weights(file)]
        largest = max((file.size_bytes for file in self._shards.values()), default=0)
        require_free_space(scratch.parent, MAX_SHARDS * largest, f"{MAX_SHARDS} shards of {listing.repo}")
        fetched = fetch_files(listing, beside, cache=scratch)
        self.downloaded_bytes += fetched.downloaded_bytes
        self.folder = fetched.folder
        for file in self._shards.values():
            self._begin(file)

    def need(self, path: Path) -> None:
        """Have the bytes of a shard here before it is read. Several threads may ask.

        Raises:
            HubError, DiskError: as `source.hub`.
        """
        with self._lock:
            name = path.name
            self._in_use.add(name)
            if name in self._resident:
                self._resident.remove(name)
                self._resident.append(name)
                return
            for other in [shard for shard in self._resident if shard not in self._in_use]:
                if len(self._resident) >= MAX_SHARDS:
                    self._give_up(other)
            file = self._shards[name]
            self.downloaded_bytes += fill_in_place(self._listing, file, self._blob(file), self._endpoint)
            self._require_same_header(file)
            self._resident.append(name)
            self.most_resident = max(self.most_resident, len(self._resident))

    def watched(
        self, chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]
    ) -> Iterator[bytes | bytearray | memoryview]:
        """The chunks of one tensor; what it reads stays here until it ends."""
        with self._lock:
            self._in_use.clear()
        yield from chunks()

    def _begin(self, file: HubFile) -> None:
        length = int.from_bytes(fetch_beginning(self._listing, file, 8, self._endpoint), "little")
        if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
            raise SafetensorsError(
                f"{file.path!r} of {self._listing.repo!r} has a header of {length:,} bytes",
                why="The file is shorter, or nobody needs so much.",
                next="Do not use this repo.",
            )
        header = fetch_beginning(self._listing, file, 8 + length, self._endpoint)
        self._headers[file.name] = header
        self.downloaded_bytes += len(header)
        blob = self._blob(file)
        make_folder(blob.parent)
        try:
            with blob.open("xb") as stream:
                stream.write(header)
                stream.truncate(file.size_bytes)
        except FileExistsError:
            pass  # two shards of the same bytes
        except OSError as exc:
            raise disk_error(exc, blob, "write") from exc
        place_in_snapshot(self._repo, self._listing.commit, file)

    def _give_up(self, name: str) -> None:
        """Free a shard's blocks. The file keeps its length: it is mapped, and reading behind an end would kill us."""
        blob = self._blob(self._shards[name])
        with contextlib.suppress(OSError):  # where a mapped file cannot be cut, it stays until the end
            os.truncate(blob, 0)
            os.truncate(blob, self._shards[name].size_bytes)
            self._resident.remove(name)

    def _require_same_header(self, file: HubFile) -> None:
        begun = self._headers[file.name]
        with self._blob(file).open("rb") as stream:
            if stream.read(len(begun)) != begun:
                raise HubError(
                    f"{file.path!r} of {self._listing.repo!r} began with another header before",
                    why="The conversion was planned with that one, and the file's hash fits this one.",
                    next="Run the command again; if it happens again, a proxy or a mirror (HF_ENDPOINT) changes files.",
                )

    def _blob(self, file: HubFile) -> Path:
        return self._repo / "blobs" / file.etag


@contextlib.contextmanager
def open_stream(listing: RepoListing, files: Sequence[HubFile], cache: Path | None = None) -> Iterator[ShardStream]:
    """A model's folder whose shards come and go; nothing of it is left behind.

    Raises:
        HubError, DiskError: as `source.hub`.
        SafetensorsError: a shard whose header cannot be.
    """
    home = cache or find_hub_cache()
    make_folder(home)
    _sweep(home)
    scratch = home / f"{_SCRATCH}{os.getpid()}-{secrets.token_hex(4)}"
    make_folder(scratch)
    try:
        yield ShardStream(listing, files, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(home: Path) -> None:
    """Remove what killed imports left."""
    for path in home.glob(f"{_SCRATCH}*"):
        pid = path.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdigit() and not is_process_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
