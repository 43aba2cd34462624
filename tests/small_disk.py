"""A disk with little room, for tests of what happens when it is full."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size under `folder`; skips the test where one cannot be mounted."""
    folder.mkdir()
    if shutil.which("mount") is None or not _mount(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def give_room(folder: Path, size: str) -> None:
    """The disk grows."""
    assert _mount(folder, "-o", f"remount,size={size}")


def _mount(folder: Path, *words: str) -> bool:
    return subprocess.run(["mount", *words, str(folder)], capture_output=True).returncode == 0
