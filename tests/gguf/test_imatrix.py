"""Importance matrices in llama.cpp's two formats, and files that lie about them."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import quantize_sources as sources
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.errors import ExistsError, ForgeError, FormatError, NotFoundError
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry, read_imatrix, write_imatrix


def legacy_bytes(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    content = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        content += struct.pack(f"<{len(values)}f", *values)
    return content + tail


def write_gguf_imatrix(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_gguf_format_gives_means_per_expert_and_ones_for_the_unseen(tmp_path: Path) -> None:
    sums = np.array([[2, 4], [0, 0], [9, 3]], dtype=np.float32)
    counts = np.array([[2], [0], [3]], dtype=np.float32)
    path = write_gguf_imatrix(tmp_path / "i.gguf", {"a.weight.in_sum2": sums, "a.weight.counts": counts})
    assert read_imatrix(path).weights("a.weight").tolist() == [1, 2, 1, 1, 3, 1]


def test_the_gguf_format_tells_where_it_came_from(tmp_path: Path) -> None:
    imatrix = read_imatrix(sources.write_source_imatrix(tmp_path / "i.gguf", "qwen3"))
    assert imatrix.datasets == ("calibration.txt", "more.txt")
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.file_name) == (3, 512, "i.gguf")
    assert len(imatrix.entries) == 8 * 7
    assert not imatrix.is_legacy


def test_the_older_format_is_read_with_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    tail = struct.pack("<ii", 7, 8) + b"wiki.txt"
    path.write_bytes(legacy_bytes({"a.weight": (2, [4.0, 1.0]), "b.weight": (0, [5.0])}, tail))
    imatrix = read_imatrix(path)
    assert imatrix.weights("a.weight").tolist() == [2, 0.5]
    assert imatrix.weights("b.weight").tolist() == [5]
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.is_legacy) == (("wiki.txt",), 7, True)


def test_the_older_format_may_end_after_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(legacy_bytes({"a.weight": (1, [1.0])}))
    assert read_imatrix(path).chunk_count == 0


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20),
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        min_size=1,
        max_size=4,
    ),
    datasets=st.lists(st.text(max_size=12), max_size=3),
    chunk_count=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_again(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], datasets: list[str], chunk_count: int
) -> None:
    entries = {
        name: ImatrixEntry(
            np.arange(rows * columns, dtype=np.float32).reshape(rows, columns), np.arange(rows, dtype=np.int64)
        )
        for name, (rows, columns) in shapes.items()
    }
    path = tmp_path / "w.gguf"
    write_imatrix(path, Imatrix(entries, tuple(datasets), chunk_count, 512), overwrite=True)
    again = read_imatrix(path)
    assert (again.datasets, again.chunk_count, again.chunk_size) == (tuple(datasets), chunk_count, 512)
    assert set(again.entries) == set(entries)
    for name, entry in entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)


def test_the_written_file_is_laid_out_as_llama_imatrix_does_it(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    entry = ImatrixEntry(np.ones((2, 3), np.float32), np.array([4, 5]))
    plain = ImatrixEntry(np.ones((1, 3), np.float32), np.array([4]))
    write_imatrix(path, Imatrix({"b": entry, "a": plain}, ("text",), 1, 512))
    reader = gguf.GGUFReader(path)
    assert [(tensor.name, tensor.shape.tolist()) for tensor in reader.tensors] == [
        ("a.in_sum2", [3]),
        ("a.counts", [1]),
        ("b.in_sum2", [3, 2]),
        ("b.counts", [1, 2]),
    ]
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    with pytest.raises(ExistsError):
        write_imatrix(path, Imatrix({"a": entry}))


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    sums = np.array([[1, np.nan]], dtype=np.float32)
    counts = np.ones((1, 1), np.float32)
    path = write_gguf_imatrix(tmp_path / "i.gguf", {"a.weight.in_sum2": sums, "a.weight.counts": counts})
    with pytest.raises(FormatError, match=r"'a\.weight'"):
        read_imatrix(path).weights("a.weight")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a.in_sum2": np.ones((1, 4), np.float32)}, "'a.counts' is missing"),
        ({"a.counts": np.ones((1, 1), np.float32)}, "'a.in_sum2' is missing"),
        ({"a.in_sum2": np.ones((1, 4), np.float16), "a.counts": np.ones((1, 1), np.float32)}, "F16, not F32"),
        ({"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones((3, 1), np.float32)}, "4 sums for 3 counts"),
        ({"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.full((1, 1), np.inf, np.float32)}, "whole number"),
        ({"token_embd.weight": np.ones((1, 4), np.float32)}, "may be a model"),
    ],
)
def test_a_gguf_that_is_no_importance_matrix_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], said: str
) -> None:
    path = write_gguf_imatrix(tmp_path / "i.gguf", tensors)
    with pytest.raises(FormatError) as caught:
        read_imatrix(path)
    assert said in caught.value.why


WHOLE = legacy_bytes({"a.weight": (2, [4.0, 1.0]), "b.weight": (1, [5.0])}, struct.pack("<ii", 7, 4) + b"text")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the number of entries at offset 0 takes 4 bytes and 0 are left"),
        (struct.pack("<i", 0) + bytes(40), "announces 0 entries"),
        (struct.pack("<i", -5) + bytes(40), "announces -5 entries"),
        (struct.pack("<i", 2**31 - 1) + bytes(40), "announces 2147483647 entries"),
        (struct.pack("<ii", 1, 2**31 - 1) + bytes(40), "2,147,483,647 bytes and 40 are left"),
        (struct.pack("<ii", 1, -1) + bytes(40), "-1 bytes"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**30) + bytes(8), "4,294,967,296 bytes"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0) + bytes(8), "announces 0 values"),
        (struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<ii", 1, 1) + bytes(8), "is not text"),
    ],
)
def test_a_lie_in_the_older_format_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        read_imatrix(path)
    assert said in caught.value.why


def test_the_older_format_cut_anywhere_is_refused_or_lacks_only_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    end_of_entries = len(WHOLE) - 12
    for length in range(len(WHOLE)):
        path.write_bytes(WHOLE[:length])
        if length in (end_of_entries, end_of_entries + 4):
            assert set(read_imatrix(path).entries) == {"a.weight", "b.weight"}
            continue
        with pytest.raises(FormatError):
            read_imatrix(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_random_bytes_never_crash_the_reader(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(content)
    try:
        read_imatrix(path)
    except ForgeError as exc:
        assert exc.what


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.gguf"):
        read_imatrix(tmp_path / "none.gguf")
