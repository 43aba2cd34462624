"""Files that are whole or absent: temp + fsync + rename, hash while writing, free space, sharing instead of copying.

In: paths and bytes. Out: a finished file under its final name, or nothing. Every other module writes through here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ollama_forge.errors import DiskError, ExistsError, NotFoundError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

COPY_CHUNK_BYTES = 1 << 22
_OVERLAP_BYTES = 1 << 20
_SYNC_BYTES = 128 << 20
_COPY_BYTES = 64 << 20
_CANNOT_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})
_TEMP_NAME = re.compile(r"\.forge-(\d+)-[0-9a-f]{8}\.tmp$")
_FICLONE = 0x40049409  # linux/fs.h

Advance = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Called with a label and the total number of bytes; gives the `Advance` of that piece of work."""


@contextlib.contextmanager
def no_progress(_label: str, _total_bytes: int) -> Iterator[Advance]:
    """The `Progress` of somebody who does not watch."""
    yield lambda _count: None


@dataclass(frozen=True)
class WrittenFile:
    """A file that is complete on disk."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class FileSpan:
    """Bytes of an open file.

    Attributes:
        descriptor: of the file, open for reading.
    """

    descriptor: int
    offset: int
    n_bytes: int


class HashingWriter:
    """A sink that hashes what passes through it; `sha256` is known the moment the last byte is written.

    Hashing is most of the work where bytes are only copied: `is_hashed` false leaves it out.
    """

    def __init__(self, stream: BinaryIO, path: Path, *, is_hashed: bool = True) -> None:
        self._stream = stream
        self._hash = hashlib.sha256() if is_hashed else None
        self._hasher: ThreadPoolExecutor | None = None
        self._syncer: ThreadPoolExecutor | None = None
        self._syncing: Future[None] | None = None
        self._unsynced_bytes = 0
        self.path = path
        self.size_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        view = memoryview(data).cast("B")
        if self._hash is None:
            self._stream.write(view)
        elif len(view) < _OVERLAP_BYTES:
            self._hash.update(view)
            self._stream.write(view)
        else:
            # Hashing costs more than writing, and both let other threads run: do them at once. The caller may use its
            # buffer again afterwards, so neither outlives the call.
            hashed = self._hashing_thread().submit(self._hash.update, view)
            try:
                self._stream.write(view)
            finally:
                hashed.result()
        self._note_written(len(view))
        return len(view)

    def copy(self, span: FileSpan, advance: Advance | None = None) -> bool:
        """Take bytes of another file without their passing through this process, where the system can do that.

        Returns:
            False when nothing was copied and they have to be written: they are to be hashed, or the system cannot.

        Raises:
            OSError: it began, and then it failed.
        """
        copy_range = getattr(os, "copy_file_range", None)
        if self._hash is not None or copy_range is None:
            return False
        self._stream.flush()
        done = 0
        while done < span.n_bytes:
            count = min(_COPY_BYTES, span.n_bytes - done)
            try:
                copied = copy_range(span.descriptor, self._stream.fileno(), count, span.offset + done)
            except OSError as exc:
                if done == 0 and exc.errno in _CANNOT_COPY:
                    return False
                raise
            if copied == 0:
                raise OSError(errno.EIO, "the file that is copied has become shorter")
            done += copied
            self._note_written(copied)
            if advance:
                advance(copied)
        self._stream.seek(0, os.SEEK_END)  # it has not seen them
        return True

    def _note_written(self, n_bytes: int) -> None:
        self.size_bytes += n_bytes
        self._unsynced_bytes += n_bytes
        if self._unsynced_bytes >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
            self._start_syncing()

    def sync(self) -> None:
        """Return when everything written lies on the disk.

        Raises:
            OSError: the operating system refused, now or earlier.
        """
        self._stream.flush()
        if self._syncing is not None:
            self._syncing.result()
        os.fsync(self._stream.fileno())

    def _start_syncing(self) -> None:
        """Let the disk begin while the processor still computes: at the end only the rest is waited for."""
        self._stream.flush()
        self._unsynced_bytes = 0
        if self._syncer is None:
            self._syncer = _one_thread("sync")
        self._syncing = self._syncer.submit(_sync_data, self._stream.fileno())

    def _hashing_thread(self) -> ThreadPoolExecutor:
        if self._hasher is None:
            self._hasher = _one_thread("hash")
        return self._hasher

    @property
    def sha256(self) -> str:
        """64 lowercase hexadecimal digits of everything written so far; empty where it was not hashed."""
        return "" if self._hash is None else self._hash.hexdigest()


def _one_thread(name: str) -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor  # only large files need it, and importing it takes time

    return ThreadPoolExecutor(1, thread_name_prefix=name)


# macOS and Windows have no fdatasync.
_sync_data: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)


def temp_path_beside(target: Path) -> Path:
    """A hidden name in the target's folder that says which process owns it (see `sweep_temp_files`)."""
    return target.with_name(f".{target.name[:100]}.forge-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sweep_temp_files(folder: Path) -> list[Path]:
    """Remove what killed processes left in `folder`; files of processes that still run are kept."""
    swept = []
    for entry in folder.iterdir():
        match = _TEMP_NAME.search(entry.name)
        if match and not is_process_alive(int(match[1])):
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()
                swept.append(entry)
    return swept


def is_process_alive(pid: int) -> bool:
    """Whether a process of that id runs on this machine (True where it cannot be known)."""
    if sys.platform == "win32":
        return pid == os.getpid()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user may still write on the file system of `folder` (or of its nearest parent)."""
    return shutil.disk_usage(_nearest(folder)).free


def is_same_disk(one: Path, other: Path) -> bool:
    """Whether two places (or their nearest parents) lie on one file system."""
    return _nearest(one).stat().st_dev == _nearest(other).stat().st_dev


def _nearest(folder: Path) -> Path:
    probe = folder.absolute()
    while not probe.exists():
        probe = probe.parent
    return probe


def require_free_space(folder: Path, needed_bytes: int, what: str, *, next: str = "") -> None:
    """Refuse before the work starts.

    Args:
        next: what to do; by default to free some space, or to write elsewhere.

    Raises:
        DiskError: with the number of bytes that are missing.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise DiskError(
            f"No room for {what} in {str(folder)!r}: it needs {needed_bytes:,} bytes and {free:,} are free",
            why=f"{needed_bytes - free:,} bytes are missing.",
            next=next or "Free some space, or write to another disk (OLLAMA_MODELS for the store, -o for a file).",
        )


def disk_error(exc: OSError, path: Path, doing: str) -> DiskError:
    """Words for an operating-system error met while `doing` something to `path`."""
    hints = {
        errno.ENOSPC: "Free some space or choose another disk, then run the command again.",
        errno.EDQUOT: "Your quota on this disk is used up: free some space or choose another disk.",
        errno.EACCES: "Check who owns the folder and whether you may write to it (ls -ld), or choose another one.",
        errno.EPERM: "Check who owns the folder and whether you may write to it (ls -ld), or choose another one.",
        errno.EROFS: "This disk is mounted read-only: choose another folder.",
        errno.EISDIR: "It is a folder: name a file in it.",
    }
    code = exc.errno or 0
    return DiskError(
        f"Could not {doing} {str(path)!r}: {os.strerror(code) if code else exc}",
        why="" if doing == "read" else "Nothing was changed under the final name.",
        next=hints.get(code, "Run `ollama-forge check` to see the state of the disk and the store."),
    )


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents.

    Raises:
        DiskError: it cannot be created, or something that is not a folder is in the way.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise disk_error(exc, folder, "create the folder") from exc


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise `ExistsError` when `target` is there and may not be replaced; a folder is never replaced."""
    if target.is_dir():
        raise ExistsError(
            f"{str(target)!r} is a folder, not a file",
            why="The result is one file.",
            next="Name a file, for example -o " + str(target / "model.gguf"),
        )
    if target.exists() and not overwrite:
        raise ExistsError(
            f"{str(target)!r} exists already",
            why="Nothing is overwritten unless you ask for it.",
            next="Add --force to replace it, or choose another name.",
        )


@contextlib.contextmanager
def atomic_output(
    target: Path, *, overwrite: bool = False, expected_bytes: int = 0, mode: int = 0o644, is_hashed: bool = True
) -> Iterator[HashingWriter]:
    """Give a sink whose bytes appear under `target` only when the block ends well.

    Args:
        target: the final name; its folder is created.
        overwrite: replace an existing file (atomically).
        expected_bytes: checked against the free space first; 0 when unknown.
        mode: permission bits of the finished file.
        is_hashed: whether the sink's `sha256` is wanted.

    Raises:
        ExistsError: the target is there and `overwrite` is false.
        DiskError: no room, or the operating system refused.
    """
    refuse_existing(target, overwrite=overwrite)
    make_folder(target.parent)
    sweep_temp_files(target.parent)
    if expected_bytes:
        require_free_space(target.parent, expected_bytes, target.name)
    temp = temp_path_beside(target)
    try:
        try:
            with temp.open("xb", buffering=1 << 20) as stream:
                sink = HashingWriter(stream, target, is_hashed=is_hashed)
                yield sink
                sink.sync()
            temp.chmod(mode)
            refuse_existing(target, overwrite=overwrite)
            temp.replace(target)
            fsync_folder(target.parent)
        except OSError as exc:
            raise disk_error(exc, target, "write") from exc
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes, *, overwrite: bool = False, mode: int = 0o644) -> WrittenFile:
    """Write a small file, whole or not at all."""
    with atomic_output(target, overwrite=overwrite, mode=mode) as sink:
        sink.write(data)
    return WrittenFile(target, sink.size_bytes, sink.sha256)


def hash_file(path: Path, advance: Advance | None = None) -> WrittenFile:
    """SHA-256 and size of a file, in bounded memory.

    Raises:
        NotFoundError: no such file.
        DiskError: it cannot be read.
    """
    digest = hashlib.sha256()
    size_bytes = 0
    buffer = bytearray(COPY_CHUNK_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(view[:count])
                size_bytes += count
                if advance:
                    advance(count)
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    return WrittenFile(path, size_bytes, digest.hexdigest())


def reflink(source: Path, target: Path) -> bool:
    """Share the blocks of `source` under the new name `target`; False where the file system cannot (Linux only)."""
    if not sys.platform.startswith("linux"):
        return False
    import fcntl

    with source.open("rb") as src, target.open("xb") as dst:
        try:
            fcntl.ioctl(dst.fileno(), _FICLONE, src.fileno())
        except OSError:
            pass
        else:
            return True
    target.unlink()
    return False


def place_copy(source: Path, target: Path, *, overwrite: bool = False, may_hardlink: bool = True) -> str:
    """Put the content of `source` under `target` as cheaply as the file system allows, atomically.

    A hard link shares later in-place edits; it is only for content that nobody modifies (a blob).

    Returns:
        How it was done: `"reflink"`, `"hardlink"` or `"copy"`.
    """
    refuse_existing(target, overwrite=overwrite)
    make_folder(target.parent)
    sweep_temp_files(target.parent)
    temp = temp_path_beside(target)
    try:
        if reflink(source, temp):
            how = "reflink"
        elif may_hardlink and _hardlink(source, temp):
            how = "hardlink"
        else:
            require_free_space(target.parent, source.stat().st_size, target.name)
            shutil.copyfile(source, temp)
            with temp.open("rb+") as stream:
                os.fsync(stream.fileno())
            how = "copy"
        temp.replace(target)
        fsync_folder(target.parent)
    except OSError as exc:
        raise disk_error(exc, target, "write") from exc
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
    return how


def _hardlink(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
