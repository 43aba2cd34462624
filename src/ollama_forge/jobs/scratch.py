"""Folders for what is needed during a command only; what a killed command left there goes when the next one begins.

Each holds a file that its process keeps locked (flock), so it is known which are in use however a process ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ollama_forge.registry.registry_file import lock_descriptor

_PREFIX = "ollama-forge-"
_IN_USE = "in-use"


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """Inside the block: an empty folder that goes with all that is in it.

    Args:
        parent: where it is made, for what is too large for the system's place for such folders.
    """
    _remove_abandoned(Path(tempfile.gettempdir() if parent is None else parent))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        work = Path(name) / "work"
        work.mkdir()
        coming = Path(name) / "coming"
        descriptor = os.open(coming, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            lock_descriptor(descriptor)
            if os.name != "nt":  # Windows renames no open file: there nothing is taken for abandoned
                coming.rename(Path(name) / _IN_USE)  # only now that it is locked may others see it
            yield work
        finally:
            os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Take away the folders of commands that have ended; whatever cannot be removed stays."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{_PREFIX}*"):
            if _is_own_folder(folder):
                _remove_unless_used(folder)


def _is_own_folder(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and (os.name == "nt" or status.st_uid == os.getuid())


def _remove_unless_used(folder: Path) -> None:
    try:
        descriptor = os.open(folder / _IN_USE, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return  # on its way, or none of these folders
    try:
        if lock_descriptor(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)
