"""Where the registry lies, and how it is read and changed: one writer at a time, whole or not at all.

In: a path and a function from `Document` to `Document`. Out: the new document, with the last version beside it as
`<name>.bak`. The lock is the operating system's (flock), so it ends with its process however that ends; the empty file
that carries it means nothing by itself. Readers need no lock, because the file is replaced in one step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ollama_forge.errors import RegistryError
from ollama_forge.files import disk_error, make_folder, place_copy, sweep_temp_files, write_bytes
from ollama_forge.registry.document import Document, parse_document, render_document

FILE_NAME = "model_registry.json"
LOCK_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.01


def forge_home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder for what this tool keeps: `OLLAMA_FORGE_HOME`, else `~/.ollama-forge`."""
    named = (os.environ if environ is None else environ).get("OLLAMA_FORGE_HOME", "").strip()
    return Path(named).expanduser().absolute() if named else Path.home() / ".ollama-forge"


def find_registry(path: Path | None = None, environ: Mapping[str, str] | None = None) -> Path:
    """The registry's file: as named, else `OLLAMA_FORGE_REGISTRY`, else `model_registry.json` in `forge_home`."""
    if path is not None:
        return path.expanduser().absolute()
    named = (os.environ if environ is None else environ).get("OLLAMA_FORGE_REGISTRY", "").strip()
    return Path(named).expanduser().absolute() if named else forge_home(environ) / FILE_NAME


def backup_path(path: Path) -> Path:
    """Where the version before the last change lies."""
    return path.with_name(path.name + ".bak")


def read_registry(path: Path) -> Document:
    """The registry as it is now; a missing file is an empty one.

    Raises:
        RegistryError: it cannot be understood.
        DiskError: it cannot be read.
    """
    raw = _read(path)
    return Document() if raw is None else parse_document(raw, repr(str(path)))


def update_registry(path: Path, change: Callable[[Document], Document]) -> Document:
    """Read, change and write while nobody else does; nothing is written when the bytes would be the same.

    Raises:
        RegistryError: the file cannot be understood, or another process holds it for a minute.
        DiskError: it cannot be written.
    """
    with lock_registry(path):
        sweep_temp_files(path.parent)
        before = _read(path)
        document = change(Document() if before is None else parse_document(before, repr(str(path))))
        after = render_document(document)
        if after != before:
            if before is not None:
                # Not a hard link: whoever edits the registry in place would edit its last version too.
                place_copy(path, backup_path(path), overwrite=True, may_hardlink=False)
            write_bytes(path, after, overwrite=True)
    return document


def restore_backup(path: Path) -> Document:
    """Exchange the registry with its last version: doing it twice changes nothing.

    Raises:
        RegistryError: there is no last version, or it cannot be understood.
    """
    with lock_registry(path):
        backup = backup_path(path)
        raw = _read(backup)
        if raw is None:
            raise RegistryError(
                f"There is no last version beside {str(path)!r}",
                why=f"{str(backup)!r} is written when the registry is changed.",
                next="See what is there: ollama-forge registry list",
            )
        document = parse_document(raw, repr(str(backup)))
        current = _read(path)
        write_bytes(path, raw, overwrite=True)
        if current is not None:
            write_bytes(backup, current, overwrite=True)
    return document


@contextlib.contextmanager
def lock_registry(path: Path, timeout_seconds: float = LOCK_TIMEOUT_SECONDS) -> Iterator[None]:
    """Keep other processes from changing the registry.

    Raises:
        RegistryError: another process has held it for `timeout_seconds`.
        DiskError: the folder cannot be written.
    """
    make_folder(path.parent)
    lock_path = path.with_name(f".{path.name}.lock")
    deadline = time.monotonic() + timeout_seconds
    while (descriptor := _try_lock(lock_path)) is None:
        if time.monotonic() > deadline:
            raise RegistryError(
                f"Another command is changing {str(path)!r}",
                why=f"It has held the registry for {timeout_seconds:.0f} seconds.",
                next="Wait for it to end, or end it; then run this command again.",
            )
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        # Removed while it is still held: whoever opened it before sees that its file is no longer the one of this name.
        with contextlib.suppress(OSError):
            lock_path.unlink()
        os.close(descriptor)
        if sys.platform == "win32":
            with contextlib.suppress(OSError):
                lock_path.unlink()


def _try_lock(lock_path: Path) -> int | None:
    """An open descriptor that holds the lock, or None when somebody else does."""
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except PermissionError as exc:
        if sys.platform == "win32":
            return None  # being removed by the one who held it
        raise disk_error(exc, lock_path, "lock") from exc
    except OSError as exc:
        raise disk_error(exc, lock_path, "lock") from exc
    is_mine = False
    try:
        is_mine = lock_descriptor(descriptor) and _is_at(descriptor, lock_path)
    finally:
        if not is_mine:
            os.close(descriptor)
    return descriptor if is_mine else None


def lock_descriptor(descriptor: int) -> bool:
    """Lock an open file for as long as it is open; False when another process holds it, or where there are no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of that name: its last holder may just have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise disk_error(exc, path, "read the registry") from exc
