"""Files appear whole, with the hash of their bytes, or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from ollama_forge.errors import DiskError
from ollama_forge.files import FileSpan, atomic_output, hash_file


@pytest.mark.parametrize("sizes", [(1,), (1 << 20,), (10, 3 << 20, 0, 5, (1 << 20) - 1, 2 << 20)])
def test_the_hash_is_that_of_the_file_whatever_the_chunks(sizes: tuple[int, ...], tmp_path: Path) -> None:
    buffer = bytearray(max(sizes))
    with atomic_output(tmp_path / "file") as sink:
        for number, size in enumerate(sizes):
            buffer[:size] = bytes([number + 1]) * size
            assert sink.write(memoryview(buffer)[:size]) == size
            buffer[:size] = bytes(size)
    content = (tmp_path / "file").read_bytes()
    assert len(content) == sink.size_bytes == sum(sizes)
    assert hashlib.sha256(content).hexdigest() == sink.sha256


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="enough"), atomic_output(tmp_path / "file") as sink:
        sink.write(bytes(2 << 20))
        raise RuntimeError("enough")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_goes_to_the_disk_in_several_pieces_is_whole(tmp_path: Path) -> None:
    piece = bytes(range(256)) * (1 << 16)
    with atomic_output(tmp_path / "large", expected_bytes=10 * len(piece)) as sink:
        for _ in range(10):
            sink.write(piece)
        sink.write(b"end")
    assert (tmp_path / "large").stat().st_size == 10 * len(piece) + 3
    assert hash_file(tmp_path / "large").sha256 == sink.sha256 == hashlib.sha256(piece * 10 + b"end").hexdigest()


def test_a_file_that_is_not_hashed_is_written_the_same(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "file", is_hashed=False) as sink:
        sink.write(b"small")
        sink.write(bytes(3 << 20))
    assert (tmp_path / "file").read_bytes() == b"small" + bytes(3 << 20)
    assert sink.size_bytes == 5 + (3 << 20) and sink.sha256 == ""


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux only")
def test_bytes_of_another_file_are_taken_without_passing_through(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(content)
    target = tmp_path / "target"
    seen: list[int] = []
    with (tmp_path / "source").open("rb") as source, atomic_output(target, is_hashed=False) as sink:
        sink.write(b"before")
        assert sink.copy(FileSpan(source.fileno(), 1_000, 2_500_000), seen.append)
        sink.write(b"after")
    assert target.read_bytes() == b"before" + content[1_000:2_501_000] + b"after"
    assert sum(seen) == 2_500_000


def test_what_is_hashed_is_not_copied_behind_its_back(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    with (tmp_path / "source").open("rb") as source, atomic_output(tmp_path / "target") as sink:
        assert not sink.copy(FileSpan(source.fileno(), 0, 100))
        sink.write(b"y")
    assert (tmp_path / "target").read_bytes() == b"y"


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="Linux only")
def test_a_source_that_became_shorter_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x" * 100)
    target = tmp_path / "target"
    with (
        pytest.raises(DiskError, match="target"),
        (tmp_path / "source").open("rb") as source,
        atomic_output(target, is_hashed=False) as sink,
    ):
        sink.copy(FileSpan(source.fileno(), 50, 100))
    assert not target.exists() and [path.name for path in tmp_path.iterdir()] == ["source"]
