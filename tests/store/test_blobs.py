"""Blobs: whole or absent, shared rather than copied, renewed when used again."""

import hashlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ollama_forge.errors import DiskError, NotFoundError, StoreError
from ollama_forge.files import free_bytes
from ollama_forge.store.blobs import HARDLINKED, REFLINKED, SHARED, WRITTEN, BlobStore
from ollama_forge.store.digest import digest_of
from ollama_forge.store.stage import STAGE_PREFIX

OLD = 1_600_000_000


def stages(models_dir: Path) -> list[Path]:
    return list(models_dir.glob(STAGE_PREFIX + "*"))


def test_bytes_land_under_their_digest_readable_by_all_and_new(models_dir: Path) -> None:
    os.umask(previous := os.umask(0o077))
    try:
        os.umask(0o077)
        digest = BlobStore(models_dir).add_bytes(b"hello")
    finally:
        os.umask(previous)
    path = models_dir / "blobs" / f"sha256-{hashlib.sha256(b'hello').hexdigest()}"
    assert path.read_bytes() == b"hello"
    assert digest.blob_filename == path.name
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert time.time() - path.stat().st_mtime < 60
    assert stages(models_dir) == []


def test_a_blob_that_is_there_is_renewed_and_not_written_again(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    digest = blobs.add_bytes(b"hello")
    os.utime(blobs.path(digest), (OLD, OLD))
    inode = blobs.path(digest).stat().st_ino
    assert blobs.put_bytes(b"hello").how == SHARED
    assert blobs.path(digest).stat().st_ino == inode
    assert blobs.path(digest).stat().st_mtime > OLD


def test_a_truncated_blob_is_replaced_by_the_whole_one(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    digest = blobs.add_bytes(b"hello")
    blobs.path(digest).write_bytes(b"hel")
    assert blobs.put_bytes(b"hello").how == WRITTEN
    assert blobs.path(digest).read_bytes() == b"hello"


def test_a_staged_blob_appears_only_when_it_is_committed(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    with blobs.stage(expected_bytes=10) as staged:
        staged.write(b"hel")
        staged.write(memoryview(b"lo"))
        assert list((models_dir / "blobs").iterdir()) == []
        assert staged.sha256 == hashlib.sha256(b"hello").hexdigest()
        staged.flush()
        assert staged.path.read_bytes() == b"hello"
        digest = staged.commit()
        assert staged.commit() == digest
    assert blobs.read_bytes(digest) == b"hello"
    assert stages(models_dir) == []


def test_a_block_that_ends_without_a_commit_leaves_nothing(models_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), BlobStore(models_dir).stage() as staged:
        staged.write(b"x" * 100)
        raise ZeroDivisionError
    assert list((models_dir / "blobs").iterdir()) == []
    assert stages(models_dir) == []


def test_a_file_of_ones_own_is_shared_not_copied(models_dir: Path, gguf: Path) -> None:
    stored = BlobStore(models_dir).put_file(gguf)
    assert stored.how in (HARDLINKED, REFLINKED)
    assert stored.written_bytes == 0
    assert stored.digest.hex == hashlib.sha256(gguf.read_bytes()).hexdigest()
    gguf.unlink()
    assert (models_dir / "blobs" / stored.digest.blob_filename).exists()


def test_a_file_is_copied_when_links_are_not_wanted(models_dir: Path, gguf: Path) -> None:
    blobs = BlobStore(models_dir)
    content = gguf.read_bytes()
    seen: list[int] = []
    stored = blobs.put_file(gguf, may_hardlink=False, advance=seen.append)
    if stored.how == WRITTEN:
        with gguf.open("r+b") as stream:
            stream.write(b"changed in place")
    assert blobs.read_bytes(stored.digest) == content
    assert sum(seen) == len(content)


def test_a_symlinked_file_is_followed_as_the_hub_cache_needs_it(models_dir: Path, gguf: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(gguf)
    stored = BlobStore(models_dir).put_file(link)
    path = models_dir / "blobs" / stored.digest.blob_filename
    assert not path.is_symlink() and path.read_bytes() == gguf.read_bytes()


def test_a_digest_known_from_writing_is_believed_and_the_file_not_read(models_dir: Path, gguf: Path) -> None:
    digest = digest_of(gguf.read_bytes())
    seen: list[int] = []
    stored = BlobStore(models_dir).put_file(gguf, digest=digest, advance=seen.append)
    assert stored.digest == digest
    assert seen == []


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_a_source_that_is_no_file_is_named(models_dir: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / kind
    if kind == "folder":
        source.mkdir()
    with pytest.raises((NotFoundError, DiskError)) as refused:
        BlobStore(models_dir).add_file(source)
    assert str(source) in refused.value.what
    assert refused.value.next


def test_a_file_that_changes_under_the_reading_is_refused(models_dir: Path, gguf: Path) -> None:
    size_bytes = gguf.stat().st_size

    def meddle(_: int) -> None:
        if gguf.stat().st_size == size_bytes:
            with gguf.open("ab") as stream:
                stream.write(b"more")

    with pytest.raises(DiskError, match="changed while it was read"):
        BlobStore(models_dir).put_file(gguf, advance=meddle)
    assert list((models_dir / "blobs").iterdir()) == []


def test_no_room_is_told_before_anything_is_written(models_dir: Path) -> None:
    too_much = free_bytes(models_dir) * 2
    with pytest.raises(DiskError, match="No room") as refused, BlobStore(models_dir).stage(too_much):
        raise AssertionError("the block must not be entered")
    assert "bytes are missing" in refused.value.why


def test_a_missing_blob_is_named(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    digest = digest_of(b"never added")
    assert not blobs.has(digest)
    for ask in (blobs.size_bytes, blobs.read_bytes, blobs.renew):
        with pytest.raises(StoreError, match=digest.hex):
            ask(digest)


def test_a_large_blob_is_not_read_as_a_text(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    digest = blobs.add_bytes(b"x" * 100)
    with pytest.raises(StoreError, match="larger"):
        blobs.read_bytes(digest, limit_bytes=99)


def test_a_blob_behind_a_link_is_used_and_both_times_are_renewed(models_dir: Path, tmp_path: Path) -> None:
    blobs = BlobStore(models_dir)
    digest = blobs.add_bytes(b"hello")
    real = tmp_path / "elsewhere"
    blobs.path(digest).rename(real)
    blobs.path(digest).symlink_to(real)
    os.utime(real, (OLD, OLD))
    os.utime(blobs.path(digest), (OLD, OLD), follow_symlinks=False)
    assert blobs.put_bytes(b"hello").how == SHARED
    assert blobs.path(digest).is_symlink()
    assert real.stat().st_mtime > OLD
    assert blobs.path(digest).lstat().st_mtime > OLD


def test_a_dangling_link_is_replaced_by_the_blob(models_dir: Path, tmp_path: Path) -> None:
    blobs = BlobStore(models_dir)
    (models_dir / "blobs").mkdir(parents=True)
    digest = digest_of(b"hello")
    blobs.path(digest).symlink_to(tmp_path / "nowhere")
    assert not blobs.has(digest)
    assert blobs.add_bytes(b"hello") == digest
    assert not blobs.path(digest).is_symlink()


def test_the_stage_of_a_dead_process_is_swept_and_a_living_ones_is_not(models_dir: Path) -> None:
    blobs = BlobStore(models_dir)
    with blobs.stage() as living:
        dead = models_dir / living.path.parent.name.replace(f"-{os.getpid()}-", "-999999999-")
        dead.mkdir()
        (dead / "blob").write_bytes(b"half")
        unrelated = models_dir / ".ollama-forge-stage-notes"
        unrelated.mkdir()
        blobs.add_bytes(b"x")
        assert living.path.exists()
    assert not dead.exists()
    assert unrelated.exists()


def test_blobs_on_another_disk_or_behind_a_link_are_staged_beside_them(tmp_path: Path) -> None:
    real = tmp_path / "big-disk" / "blobs"
    real.mkdir(parents=True)
    models_dir = tmp_path / "models"
    models_dir.mkdir()
    (models_dir / "blobs").symlink_to(real)
    digest = BlobStore(models_dir).add_bytes(b"hello")
    assert (real / digest.blob_filename).read_bytes() == b"hello"
    assert stages(models_dir) == [] and stages(real.parent) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from ollama_forge.errors import DiskError
from ollama_forge.store.blobs import BlobStore
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with BlobStore(Path(sys.argv[1])).stage() as staged:
        for _ in range(64):
            staged.write(b"x" * (1 << 16))
        staged.commit()
except DiskError as error:
    print(error)
"""


def test_a_disk_that_fills_up_on_the_way_is_told_and_leaves_nothing(models_dir: Path) -> None:
    argv = [sys.executable, "-c", FULL_DISK, str(models_dir)]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "Could not write" in told and str(models_dir) in told
    assert list((models_dir / "blobs").iterdir()) == [] and stages(models_dir) == []
