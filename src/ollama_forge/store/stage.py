"""Folders beside `blobs/` and `manifests/` in which files are made before they get their names.

Ollama's server walks both trees at any time: a foreign file in `manifests/` stops its clean-up, one that vanishes
from `blobs/` can stop its start (server/fixblobs.go of v0.33). The models folder itself it never lists. A stage lies
on the file system of what it is for, so that the last step is a rename; stages of dead processes are removed by the
next one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import DiskError
from ollama_forge.files import disk_error, is_process_alive

STAGE_PREFIX = ".ollama-forge-stage-"
FOREIGN_STAGE_SECONDS = 7 * 24 * 3600
_STAGE_NAME = re.compile(re.escape(STAGE_PREFIX) + r"([0-9a-f]{8})-(\d+)-[0-9a-f]{8}")
_open_stages: set[str] = set()


@dataclass(frozen=True)
class Owner:
    """The account that a store's files belong to; None where the system has no such thing."""

    uid: int | None
    gid: int | None


def find_owner(models_dir: Path) -> Owner:
    """The owner of the store, or of the nearest folder that is there."""
    if sys.platform == "win32":
        return Owner(None, None)
    for folder in (models_dir / "blobs", models_dir, *models_dir.absolute().parents):
        with contextlib.suppress(OSError):
            status = folder.stat()
            return Owner(status.st_uid, status.st_gid)
    return Owner(None, None)


def give_to_owner(path: Path, owner: Owner) -> None:
    """When run as root inside another account's store, leave files that this account's server may renew and delete."""
    if sys.platform != "win32" and os.geteuid() == 0 and owner.uid and owner.gid is not None:
        os.chown(path, owner.uid, owner.gid, follow_symlinks=False)


def make_store_folder(folder: Path, owner: Owner) -> None:
    """Create a folder of the store and what is missing above it: 0755, the store's owner.

    Raises:
        DiskError: with who owns the place and what to type.
    """
    try:
        missing = []
        probe = folder
        while not probe.is_dir() and probe != probe.parent:
            missing.append(probe)
            probe = probe.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                path.chmod(0o755)
                give_to_owner(path, owner)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    except OSError as exc:
        raise store_error(exc, folder, "create the folder") from exc


@contextlib.contextmanager
def open_stage(models_dir: Path, final_dir: Path, owner: Owner) -> Iterator[Path]:
    """A fresh folder for files that will be renamed into `final_dir`; what is left in it goes when the block ends.

    Raises:
        DiskError: the store cannot be written.
    """
    make_store_folder(final_dir, owner)
    home = _stage_home(models_dir, final_dir)
    sweep_stages(home)
    folder = home / f"{STAGE_PREFIX}{_host_tag()}-{os.getpid()}-{secrets.token_hex(4)}"
    _open_stages.add(folder.name)
    try:
        try:
            folder.mkdir(mode=0o700)
        except OSError as exc:
            raise store_error(exc, folder, "create the folder") from exc
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _open_stages.discard(folder.name)


def sweep_stages(home: Path) -> list[Path]:
    """Remove the stages of dead processes in `home`."""
    swept = []
    for folder in find_stages(home):
        if is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(folder)
    return swept


def find_stages(home: Path) -> list[Path]:
    """Every stage in `home`, in use or not."""
    try:
        return sorted(entry for entry in home.iterdir() if _STAGE_NAME.fullmatch(entry.name) and not entry.is_symlink())
    except OSError:
        return []


def is_stale(stage: Path) -> bool:
    """Whether its process is gone; a stage of another machine (a shared disk) only counts as such after a week."""
    match = _STAGE_NAME.fullmatch(stage.name)
    if not match:
        return False
    if match[1] != _host_tag():
        try:
            return time.time() - stage.stat().st_mtime > FOREIGN_STAGE_SECONDS
        except OSError:
            return False
    pid = int(match[2])
    return stage.name not in _open_stages if pid == os.getpid() else not is_process_alive(pid)


def stage_homes(models_dir: Path) -> list[Path]:
    """The folders in which stages of this store can lie."""
    homes = [models_dir]
    for name in ("blobs", "manifests"):
        folder = models_dir / name
        if folder.is_dir():
            homes += [home for home in (folder.resolve().parent, folder) if home not in homes]
    return homes


def store_error(exc: OSError, path: Path, doing: str) -> DiskError:
    """Words for an operating-system error inside a store, with the store's owner where that is the cause."""
    plain = disk_error(exc, path, doing)
    if exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return plain
    own = "OLLAMA_MODELS=~/.ollama/models"
    if exc.errno == errno.EROFS:
        return DiskError(plain.what, why="That disk is mounted read-only.", next=f"Use a store of your own: {own}")
    return DiskError(
        plain.what,
        why=f"It belongs to {_account_at(path)}, and you are {_account_name(_effective_uid())}.",
        next=f"Run the command as that account (sudo -u {_account_at(path)} ...), or use a store of your own: {own}",
    )


def _stage_home(models_dir: Path, final_dir: Path) -> Path:
    device = final_dir.stat().st_dev
    for home in (models_dir, final_dir.resolve().parent):
        if home.is_dir() and home.stat().st_dev == device:
            return home
    return final_dir


def _host_tag() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _effective_uid() -> int | None:
    return None if sys.platform == "win32" else os.geteuid()


def _account_at(path: Path) -> str:
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            return _account_name(folder.stat().st_uid)
    return "another account"


def _account_name(uid: int | None) -> str:
    if uid is None or sys.platform == "win32":
        return "another account"
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
