"""Stores that belong to somebody else: clear words, nothing changed, and as root the owner's account is kept.

Root may write anywhere, so as root the commands run in a child under another account.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf
from tiny_store import install_model, snapshot

from ollama_forge.store.catalog import Store
from ollama_forge.store.land import land
from ollama_forge.store.modelfile import Modelfile

IS_ROOT = os.geteuid() == 0
NOBODY = 65534
COMMAND = """
import fcntl, os, pwd, sys
from pathlib import Path
from ollama_forge.errors import ForgeError
from ollama_forge.store.catalog import Store
from ollama_forge.store.discard import remove_model
from ollama_forge.store.land import land
from ollama_forge.store.modelfile import Modelfile
if os.geteuid() == 0:  # only now: root's Python may lie where nobody else can read
    os.setgid({nobody}); os.setuid({nobody})
store = Store(Path(sys.argv[1]))
try:
    result = {expression}
except ForgeError as error:
    print(type(error).__name__, str(error), sep="\\n")
else:
    print("done", *getattr(result, "warnings", ()), sep="\\n")
"""


@pytest.fixture
def world() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="store-permissions-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_other(expression: str, models_dir: Path) -> str:
    code = COMMAND.format(nobody=NOBODY, expression=expression)
    done = subprocess.run(
        [sys.executable, "-c", code, str(models_dir)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def lock(folder: Path, mode: int) -> None:
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(mode)


@pytest.mark.parametrize(
    "expression",
    [
        'land(store, "new", model=store.find("tiny"), modelfile=Modelfile(system="s"))',
        'store.blobs.add_bytes(b"x")',
        'remove_model(store, "tiny")',
    ],
)
def test_a_store_that_may_not_be_written_is_told_with_its_owner_and_a_way_out(world: Path, expression: str) -> None:
    models_dir = world / "models"
    land(Store(models_dir), "tiny", model=write_tiny_gguf(world / "t.gguf"))
    lock(models_dir, 0o555)
    before = snapshot(models_dir)
    told = as_other(expression, models_dir)
    assert told.startswith("DiskError")
    assert str(models_dir) in told and "OLLAMA_MODELS" in told and "belongs to" in told
    assert snapshot(models_dir) == before


def test_a_store_that_may_not_be_read_is_told(world: Path) -> None:
    models_dir = world / "models"
    land(Store(models_dir), "tiny", model=write_tiny_gguf(world / "t.gguf"))
    (models_dir / "manifests").chmod(0o000)
    for expression in ("store.models()", 'store.find("tiny")'):
        told = as_other(expression, models_dir)
        assert told.startswith("DiskError") and str(models_dir) in told


def test_a_blob_of_another_account_is_used_and_the_trouble_is_told(world: Path) -> None:
    models_dir = world / "models"
    install_model(models_dir, "tiny", write_tiny_gguf(world / "t.gguf").read_bytes())
    if not IS_ROOT:
        return  # one account cannot make files of another
    lock(models_dir, 0o777)
    told = as_other('land(store, "mine", model=store.find("tiny"), modelfile=Modelfile(system="s"))', models_dir)
    assert told.startswith("done")
    assert "belongs to another account" in told
    assert Store(models_dir).find("mine").system == "s"


def test_root_leaves_files_that_the_stores_owner_can_use(world: Path) -> None:
    models_dir = world / "models"
    gguf = write_tiny_gguf(world / "t.gguf")
    models_dir.mkdir()
    if not IS_ROOT:
        return  # only root can give files away
    os.chown(models_dir, NOBODY, NOBODY)
    land(Store(models_dir), "bob/tiny", model=gguf, modelfile=Modelfile(system="s"))
    for path in models_dir.rglob("*"):
        status = path.stat()
        assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY), path
        assert stat.S_IMODE(status.st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert gguf.stat().st_uid == 0, "the file that was landed stays its owner's"


def test_a_file_of_another_account_is_copied_not_linked(world: Path) -> None:
    gguf = write_tiny_gguf(world / "t.gguf")
    gguf.chmod(0o644)
    models_dir = world / "models"
    models_dir.mkdir()
    models_dir.chmod(0o777)
    if not IS_ROOT:
        return  # one account cannot make files of another
    told = as_other(f'land(store, "tiny", model=Path({str(gguf)!r}))', models_dir)
    assert told.startswith("done")
    blob = Store(models_dir).find("tiny").model_path
    assert blob and blob.stat().st_ino != gguf.stat().st_ino and blob.stat().st_uid == NOBODY
    assert gguf.stat().st_nlink == 1
