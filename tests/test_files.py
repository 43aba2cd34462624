"""Files appear whole, with the hash of their bytes, or not at all."""

import hashlib
from pathlib import Path

import pytest

from ollama_forge.files import atomic_output, hash_file


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
