"""The blobs of a store: files named by their SHA-256, added whole or not at all.

In: bytes, or a file. Out: a `Digest` under which `blobs/` holds them. Which blobs a model needs belongs to `land`.

A file on the same disk is reflinked where the file system can; otherwise hardlinked, because a model may be as large
as the room that is left. A hard link shares its bytes with the file it came from: a tool that edits that file *in
place* would change the blob too. Nothing of this package edits in place, `verify` finds it if something else did, and
`may_hardlink=False` copies.
Files of another account are copied, never linked: their owner and mode are not ours to change.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ollama_forge.errors import DiskError, NotFoundError, StoreError
from ollama_forge.files import (
    COPY_CHUNK_BYTES,
    Advance,
    HashingWriter,
    fsync_folder,
    hash_file,
    reflink,
    require_free_space,
)
from ollama_forge.store.digest import Digest, digest_of
from ollama_forge.store.stage import (
    Owner,
    find_owner,
    give_to_owner,
    make_store_folder,
    open_stage,
    store_error,
)

WRITTEN = "written"
REFLINKED = "reflink"
HARDLINKED = "hardlink"
SHARED = "shared"
_BLOB_MODE = 0o644


@dataclass(frozen=True)
class StoredBlob:
    """A blob that is in the store now.

    Attributes:
        how: `written`, `reflink`, `hardlink`, or `shared` when it was there before.
        warnings: what could not be done to it and does not stop the work.
    """

    digest: Digest
    size_bytes: int
    how: str
    warnings: tuple[str, ...] = ()

    @property
    def written_bytes(self) -> int:
        """Bytes of disk that it took."""
        return self.size_bytes if self.how == WRITTEN else 0


class StagedBlob:
    """A blob in the making: a sink like `files.HashingWriter`, then `commit`.

    Attributes:
        path: the file outside `blobs/` that holds the bytes until `commit`.
        stored: how it went, once committed.
    """

    def __init__(
        self, blobs: BlobStore, path: Path, *, how: str = WRITTEN, known: tuple[Digest, int] | None = None
    ) -> None:
        self.path = path
        self.stored: StoredBlob | None = None
        self._blobs = blobs
        self._how = how
        self._known = known
        # A known file is opened too: its bytes may still be in flight when its link gets a blob's name.
        self._stream: BinaryIO = path.open("rb") if known else path.open("xb", buffering=1 << 20)
        self._writer = HashingWriter(self._stream, path)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes.

        Raises:
            DiskError: the disk refused.
        """
        try:
            return self._writer.write(data)
        except OSError as exc:
            raise store_error(exc, self.path, "write") from exc

    def flush(self) -> None:
        """Hand everything written so far to the system, so that `path` can be opened and read."""
        try:
            self._stream.flush()
        except OSError as exc:
            raise store_error(exc, self.path, "write") from exc

    @property
    def digest(self) -> Digest:
        """The digest of the bytes so far."""
        return self._known[0] if self._known else Digest(self._writer.sha256)

    @property
    def sha256(self) -> str:
        """64 lowercase hexadecimal digits of the bytes so far."""
        return self.digest.hex

    @property
    def size_bytes(self) -> int:
        """Bytes so far."""
        return self._known[1] if self._known else self._writer.size_bytes

    def commit(self) -> Digest:
        """Put the blob under its name in `blobs/`: durable, 0644, the store's owner, its time now.

        Raises:
            DiskError: the store cannot be written.
        """
        if self.stored is None:
            try:
                if sys.platform != "win32" or not self._known:
                    self._writer.sync()
                self._stream.close()
            except OSError as exc:
                raise store_error(exc, self.path, "write") from exc
            self.stored = self._blobs.publish(self.path, self.digest, self.size_bytes, self._how)
        return self.stored.digest

    def close(self) -> None:
        """Give the file back; what was not committed is lost with its stage."""
        with contextlib.suppress(OSError):
            self._stream.close()


class BlobStore:
    """`blobs/` of one store. Nothing is created before something is added.

    Args:
        models_dir: the store; `blobs/` lies in it.
    """

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir
        self.blobs_dir = models_dir / "blobs"

    def path(self, digest: Digest) -> Path:
        """Where the blob lies, or would."""
        return self.blobs_dir / digest.blob_filename

    def has(self, digest: Digest) -> bool:
        """Whether the blob is there (not whether it is whole: see `verify`).

        Raises:
            DiskError: `blobs/` may not be entered.
        """
        try:
            return self.path(digest).is_file()
        except OSError as exc:
            raise store_error(exc, self.blobs_dir, "look into") from exc

    def size_bytes(self, digest: Digest) -> int:
        """The size of the blob's file.

        Raises:
            StoreError: it is missing.
        """
        try:
            return self.path(digest).stat().st_size
        except OSError as exc:
            raise self.missing(digest) from exc

    def read_bytes(self, digest: Digest, limit_bytes: int = 64 << 20) -> bytes:
        """The content of a small blob.

        Raises:
            StoreError: it is missing, unreadable, or larger than `limit_bytes`.
        """
        path = self.path(digest)
        try:
            with path.open("rb") as stream:
                content = stream.read(limit_bytes + 1)
        except FileNotFoundError as exc:
            raise self.missing(digest) from exc
        except OSError as exc:
            raise store_error(exc, path, "read the blob") from exc
        if len(content) > limit_bytes:
            raise StoreError(
                f"The blob {str(path)!r} is larger than {limit_bytes:,} bytes", why="A text of a model is small."
            )
        return content

    def missing(self, digest: Digest) -> StoreError:
        """The error for a blob that is not there."""
        return StoreError(
            f"The blob {str(digest)!r} is missing from {str(self.blobs_dir)!r}",
            why="Something removed it while a model still needs it.",
            next="Run `ollama-forge verify` to see what is missing, then `ollama pull` the model again.",
        )

    @contextlib.contextmanager
    def stage(self, expected_bytes: int = 0) -> Iterator[StagedBlob]:
        """A sink for a new blob; without a `commit` inside the block nothing of it stays.

        Raises:
            DiskError: no room for `expected_bytes`, or the store cannot be written.
        """
        with self._stage_folder() as folder:
            if expected_bytes:
                require_free_space(folder, expected_bytes, "the model")
            with self._staged(folder / "blob") as staged:
                yield staged

    @contextlib.contextmanager
    def stage_file(
        self, source: Path, *, digest: Digest | None = None, advance: Advance | None = None, may_hardlink: bool = True
    ) -> Iterator[StagedBlob]:
        """A file on its way into the store: shared or copied, hashed with one read, not yet under its name.

        Args:
            source: the file; it stays where it is.
            digest: of its bytes, when the caller hashed them while writing; the file is then not read again.

        Raises:
            NotFoundError: no such file.
            DiskError: no room, no permission, or the file changed while it was read.
        """
        try:
            before = source.stat()
            source = source.resolve(strict=True)
        except FileNotFoundError as exc:
            raise NotFoundError(f"There is no file {str(source)!r}", next="Check the path.") from exc
        except OSError as exc:
            raise store_error(exc, source, "read") from exc
        if not stat.S_ISREG(before.st_mode):
            raise DiskError(f"{str(source)!r} is not a file", next="Name a .gguf file.")
        with self._stage_folder() as folder:
            temp = folder / "blob"
            how, copied = self._share_or_copy(source, before, temp, advance, may_hardlink)
            known = copied or digest or Digest(hash_file(temp, advance).sha256)
            if _has_changed(source, before, known):
                raise DiskError(
                    f"{str(source)!r} changed while it was read",
                    why="Another program writes to it.",
                    next="Wait until that program is done, then run the command again.",
                )
            with self._staged(temp, how=how, known=(known, before.st_size)) as staged:
                yield staged

    def put_bytes(self, content: bytes) -> StoredBlob:
        """Add a small blob.

        Raises:
            DiskError: the store cannot be written.
        """
        digest = digest_of(content)
        if self.has(digest) and self.size_bytes(digest) == len(content):
            return StoredBlob(digest, len(content), SHARED, self.renew(digest))
        with self.stage(len(content)) as staged:
            staged.write(content)
            staged.commit()
        return _stored(staged)

    def put_file(
        self, source: Path, *, digest: Digest | None = None, advance: Advance | None = None, may_hardlink: bool = True
    ) -> StoredBlob:
        """Add a file as a blob; see `stage_file`."""
        with self.stage_file(source, digest=digest, advance=advance, may_hardlink=may_hardlink) as staged:
            staged.commit()
        return _stored(staged)

    def add_bytes(self, content: bytes) -> Digest:
        """`put_bytes`, for who only needs the digest."""
        return self.put_bytes(content).digest

    def add_file(self, source: Path, *, advance: Advance | None = None) -> Digest:
        """`put_file`, for who only needs the digest."""
        return self.put_file(source, advance=advance).digest

    def publish(self, temp: Path, digest: Digest, size_bytes: int, how: str) -> StoredBlob:
        """Rename a complete, durable file into `blobs/`, or drop it where the blob is there already.

        Raises:
            DiskError: the store cannot be written.
        """
        target = self.path(digest)
        owner = self.owner()
        make_store_folder(self.blobs_dir, owner)
        if self.has(digest) and self.size_bytes(digest) == size_bytes:
            warnings = self.renew(digest)
            with contextlib.suppress(OSError):
                temp.unlink()
            return StoredBlob(digest, size_bytes, SHARED, warnings)
        try:
            if how != HARDLINKED:
                temp.chmod(_BLOB_MODE)
                give_to_owner(temp, owner)
            os.utime(temp)
            temp.replace(target)
            fsync_folder(self.blobs_dir)
        except OSError as exc:
            raise store_error(exc, target, "write the blob") from exc
        return StoredBlob(digest, size_bytes, how, self._ownership_warnings(owner))

    def renew(self, digest: Digest) -> tuple[str, ...]:
        """Set the blob's time to now, so that a starting server takes it for new and keeps it.

        Returns:
            A warning where another account's file refuses; the blob is usable all the same.

        Raises:
            StoreError: it is missing.
        """
        path = self.path(digest)
        try:
            os.utime(path)
            if path.is_symlink() and os.utime in os.supports_follow_symlinks:
                os.utime(path, follow_symlinks=False)
            if path.stat().st_nlink == 1 and not path.is_symlink():
                give_to_owner(path, self.owner())
        except FileNotFoundError as exc:
            raise self.missing(digest) from exc
        except PermissionError:
            return (
                f"The blob {str(path)!r} belongs to another account and its time could not be renewed; if Ollama "
                "removes it as unused, land the model again.",
            )
        except OSError as exc:
            raise store_error(exc, path, "renew the blob's time") from exc
        return ()

    def owner(self) -> Owner:
        """The account that this store's files belong to."""
        return find_owner(self.models_dir)

    @contextlib.contextmanager
    def _stage_folder(self) -> Iterator[Path]:
        with open_stage(self.models_dir, self.blobs_dir, self.owner()) as folder:
            yield folder

    @contextlib.contextmanager
    def _staged(
        self, path: Path, *, how: str = WRITTEN, known: tuple[Digest, int] | None = None
    ) -> Iterator[StagedBlob]:
        try:
            staged = StagedBlob(self, path, how=how, known=known)
        except OSError as exc:
            raise store_error(exc, path, "write") from exc
        try:
            yield staged
        finally:
            staged.close()

    def _share_or_copy(
        self, source: Path, status: os.stat_result, temp: Path, advance: Advance | None, may_hardlink: bool
    ) -> tuple[str, Digest | None]:
        """Put the bytes of `source` into `temp`; a copy is hashed on its way."""
        try:
            if reflink(source, temp):
                return REFLINKED, None
            if may_hardlink and self._may_link(status):
                with contextlib.suppress(OSError):  # another disk, or one without links: copy
                    os.link(source, temp)
                    return HARDLINKED, None
            require_free_space(temp.parent, status.st_size, source.name)
            with source.open("rb", buffering=0) as reading, temp.open("xb", buffering=1 << 20) as writing:
                sink = HashingWriter(writing, temp)
                while chunk := reading.read(COPY_CHUNK_BYTES):
                    sink.write(chunk)
                    if advance:
                        advance(len(chunk))
                sink.sync()
            return WRITTEN, Digest(sink.sha256)
        except OSError as exc:
            raise store_error(exc, source, "bring into the store") from exc

    def _may_link(self, status: os.stat_result) -> bool:
        if sys.platform == "win32":
            return True
        owner = self.owner()
        wanted = owner.uid if os.geteuid() == 0 and owner.uid is not None else os.geteuid()
        return status.st_uid == wanted and bool(status.st_mode & stat.S_IRUSR)

    def _ownership_warnings(self, owner: Owner) -> tuple[str, ...]:
        if sys.platform == "win32" or owner.uid is None or os.geteuid() in (0, owner.uid):
            return ()
        return (
            f"The store {str(self.models_dir)!r} belongs to another account than yours, and Ollama's server may refuse "
            f"to use these blobs again. Mend it: sudo chown -R --reference={self.blobs_dir} {self.models_dir}",
        )


def _has_changed(source: Path, before: os.stat_result, digest: Digest) -> bool:
    after = source.stat()
    if after.st_size != before.st_size:
        return True
    # A new time alone proves nothing: another landing of the same file renews it through its own link.
    return after.st_mtime_ns != before.st_mtime_ns and hash_file(source).sha256 != digest.hex


def _stored(staged: StagedBlob) -> StoredBlob:
    if staged.stored is None:
        raise StoreError(f"{str(staged.path)!r} was not committed")
    return staged.stored
