"""What is written is what the safetensors library and our own reader read, laid out by a plan that was exact before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ollama_forge.errors import ExistsError, SafetensorsError, UsageError
from ollama_forge.weights.safetensors import INDEX_NAME, open_safetensors
from ollama_forge.weights.safetensors_writer import SafetensorsEntry, parse_shard_size, plan_shards, write_shards

NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "u1"}
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")


def entry_of(name: str, values: np.ndarray, dtype: str = "F32") -> SafetensorsEntry:
    content = values.tobytes()
    return SafetensorsEntry(name, values.shape, dtype, lambda: [content[:5], content[5:]])


def numbers(shape: tuple[int, ...], dtype: str = "F32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(NUMPY[dtype])


def bytes_of(content: bytes) -> Callable[[], list[bytes]]:
    return lambda: [content]


@settings(max_examples=60, deadline=None)
@given(tensors=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(sorted(NUMPY))), min_size=1, max_size=6))
def test_any_tensors_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    folder = tmp_path_factory.mktemp("written")
    values = {name: numbers(shape, dtype, len(name)) for name, (shape, dtype) in tensors.items()}
    plan = plan_shards([entry_of(name, values[name], dtype) for name, (_, dtype) in tensors.items()])
    (written,) = write_shards(plan, folder)
    assert written.size_bytes == plan.size_bytes == (folder / "model.safetensors").stat().st_size
    read = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(read) == set(values)
    for name, expected in values.items():
        assert read[name].dtype == expected.dtype and np.array_equal(read[name], expected)
    with open_safetensors(folder) as opened:
        assert {name: bytes(opened.read(name)) for name in opened.tensors} == {
            name: value.tobytes() for name, value in values.items()
        }


def test_bytes_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    values = {f"layer.{n}.weight": numbers((3, n + 1), "F16" if n % 2 else "F32", n) for n in range(12)}
    dtypes = {name: "F32" if value.dtype == np.float32 else "F16" for name, value in values.items()}
    safetensors.numpy.save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_shards(plan_shards([entry_of(name, value, dtypes[name]) for name, value in values.items()]), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_large_models_become_numbered_files_with_an_index(tmp_path: Path) -> None:
    values = {f"t{n}": numbers((10,), seed=n) for n in range(7)}
    plan = plan_shards([entry_of(name, value) for name, value in values.items()], max_shard_bytes=100)
    write_shards(plan, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert (
        files == sorted(plan.filenames) == [*(f"model-0000{n}-of-00004.safetensors" for n in range(1, 5)), INDEX_NAME]
    )
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == plan.size_bytes
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 280} and list(index["weight_map"]) == sorted(values)
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / shard, "numpy") as opened:
            assert np.array_equal(opened.get_tensor(name), values[name])
    with open_safetensors(tmp_path) as folder:
        assert set(folder.tensors) == set(values)


def test_a_tensor_larger_than_a_file_has_one_for_itself() -> None:
    plan = plan_shards([entry_of(name, numbers((size,))) for name, size in (("a", 1), ("b", 99), ("c", 1))], 40)
    assert [[entry.name for entry in shard.entries] for shard in plan.shards] == [["a"], ["b"], ["c"]]


def test_the_order_of_entries_does_not_change_a_file(tmp_path: Path) -> None:
    entries = [entry_of(f"t{n}", numbers((n,), seed=n)) for n in range(5)]
    for name, order in (("one", entries), ("two", entries[::-1])):
        (tmp_path / name).mkdir()
        write_shards(plan_shards(order), tmp_path / name)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


@pytest.mark.parametrize("given_bytes", [b"", b"1234567", b"123456789"])
def test_an_entry_that_gives_other_bytes_than_announced_leaves_no_file(tmp_path: Path, given_bytes: bytes) -> None:
    plan = plan_shards([SafetensorsEntry("a", (2,), "F32", bytes_of(given_bytes))])
    with pytest.raises(SafetensorsError, match="announced 8"):
        write_shards(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    plan = plan_shards([entry_of(f"t{n}", numbers((10,), seed=n)) for n in range(3)], 50)
    counts: list[int] = []
    write_shards(plan, tmp_path, counts.append)
    assert sum(counts) == plan.size_bytes


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    plan = plan_shards([entry_of("a", numbers((2,)))])
    write_shards(plan, tmp_path)
    with pytest.raises(ExistsError):
        write_shards(plan, tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry_of("a", numbers((1,))), entry_of("a", numbers((1,)))],
        [entry_of("__metadata__", numbers((1,)))],
        [entry_of("", numbers((1,)))],
        [SafetensorsEntry("a", (1,), "Q4_K", bytes_of(b""))],
    ],
)
def test_entries_that_no_reader_would_take_are_refused(entries: list[SafetensorsEntry]) -> None:
    with pytest.raises(SafetensorsError):
        plan_shards(entries)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2 GiB", 2 << 30), ("1.5KB", 1500), ("77", 77)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_shard_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-5GB", "5XB", "1.2.3MB", "5 GB please", "."])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_shard_size(text)
