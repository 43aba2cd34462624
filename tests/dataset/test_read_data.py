"""Files of training data: every kind is read alike, and no line can hide, forge or break another."""

from __future__ import annotations

import gzip
import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from ollama_forge.dataset.read import MAX_LINE_BYTES, find_data_files, read_batches
from ollama_forge.errors import DatasetError, FormatError, NotFoundError

GOOD = {"instruction": "a", "input": "", "output": "b"}


def read(path: Path) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    values, problems = [], []
    for batch in read_batches(path):
        values += list(zip(batch.lines, batch.values, strict=True))
        problems += batch.problems
    return values, problems


def read_bytes(folder: Path, data: bytes, name: str = "d.jsonl") -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
    path = folder / name
    path.write_bytes(data)
    return read(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


LINES = st.one_of(
    st.binary(max_size=12).filter(lambda line: b"\n" not in line),
    st.sampled_from(
        [
            b"",
            b" \t",
            b"{}",
            b'{"a":1}',
            b'{"a":1}\r',
            b'{"a":1},{"b":2}',
            b'{"a":1},0,{"b":2}',
            b'{"m":[{}',
            b"{}]}",
            b"]",
            b"[",
            b'"',
            b'"x',
            b"NaN",
            b'{"a":NaN}',
            b'{"a":1e999}',
            b'{"a":Infinity}',
            b"1" * 5000,
            b"[" * 3000,
            b"[" * 3000 + b"]" * 3000,
            b'{"a":"\\ud800"}',
            b'{"a":"\xff"}',
            b'{"a":"\x00"}',
            b"null",
            b"\xef\xbb\xbf{}",
            b'{"a":"\xe2\x80\xa8"}',
        ]
    ),
)


@given(st.lists(LINES, max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_read_together_are_what_they_are_alone(folder: Path, lines: list[bytes]) -> None:
    values, problems = read_bytes(folder, b"\n".join([b'{"first":0}', *lines]))
    expected, bad = [(1, {"first": 0})], []
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            expected.append((number, from_json(line, allow_inf_nan=False)))
        except ValueError:
            bad.append(number)
    assert values == expected
    assert [number for number, _ in problems] == bad


def test_lines_that_would_be_whole_only_together_are_both_refused(folder: Path) -> None:
    data = b'{"x":1},{"y":2}\n{"messages":[{}\n{}]}\n' + json.dumps(GOOD).encode()
    values, problems = read_bytes(folder, data)
    assert values == [(4, GOOD)]
    assert [number for number, _ in problems] == [1, 2, 3]


def test_byte_order_mark_and_windows_line_ends_are_no_matter(folder: Path) -> None:
    line = json.dumps(GOOD).encode()
    assert read_bytes(folder, b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n") == ([(1, GOOD), (3, GOOD)], [])


def test_line_numbers_count_empty_lines(folder: Path) -> None:
    line = json.dumps(GOOD).encode()
    values, problems = read_bytes(folder, b"\n\n" + line + b"\n\noops\n" + line)
    assert [number for number, _ in values] == [3, 6]
    assert problems[0][0] == 5 and "not JSON" in problems[0][1]


def test_line_numbers_hold_over_many_blocks(folder: Path) -> None:
    lines = [json.dumps({"instruction": "x" * (number * 37 % 4000), "output": str(number)}) for number in range(400)]
    lines[57] = lines[311] = "broken"
    values, problems = read_bytes(folder, "\n".join(lines).encode())
    assert [number for number, _ in problems] == [58, 312]
    assert all(value["output"] == str(number - 1) for number, value in values) and len(values) == 398


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n" + b'{"a":1}'])
def test_a_line_of_ten_megabytes_is_read(folder: Path, ending: bytes) -> None:
    long = {"instruction": "x" * (10 << 20), "output": "y"}
    values, problems = read_bytes(folder, b'{"a":0}\n' + json.dumps(long).encode() + ending)
    assert not problems
    assert values[1] == (2, long) and len(values) == 2 + ending.count(b"{")


def test_a_line_longer_than_the_limit_is_passed_over(folder: Path) -> None:
    data = b'{"a":1}\n"' + b"x" * (MAX_LINE_BYTES + 1) + b'"\n{"a":3}\n'
    values, problems = read_bytes(folder, data)
    assert [number for number, _ in values] == [1, 3]
    assert [number for number, _ in problems] == [2] and "longer than" in problems[0][1]


def test_gzip_is_unpacked_and_a_broken_one_is_named(folder: Path) -> None:
    packed = gzip.compress(json.dumps(GOOD).encode() + b"\n" + secrets.token_bytes(100).hex().encode())
    values, problems = read_bytes(folder, packed, "d.jsonl.gz")
    assert values == [(1, GOOD)] and len(problems) == 1
    for broken in (packed[:-20], b"not gzip", packed[:20] + b"\0\0\0" + packed[23:]):
        with pytest.raises(FormatError, match=r"gzip"):
            read_bytes(folder, broken, "e.jsonl.gz")


VALUES = st.lists(
    st.recursive(
        st.integers() | st.text(st.characters(exclude_categories=["Cs"])) | st.booleans() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
        max_leaves=8,
    ),
    max_size=8,
)


@given(VALUES, st.sampled_from([None, 2]), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_array_gives_its_items(folder: Path, values: list[Any], indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=is_ascii)
    found, problems = read_bytes(folder, text.encode(), "d.json")
    assert not problems
    assert found == list(enumerate(values, 1))


def test_a_large_array_and_json_lines_named_json_are_read(folder: Path) -> None:
    items = [{"instruction": "é" * (number * 997 % 50000), "output": str(number)} for number in range(60)]
    for text in (json.dumps(items, ensure_ascii=False), "\n".join(json.dumps(item, indent=1) for item in items)):
        found, problems = read_bytes(folder, text.encode(), "d.json")
        assert not problems and [value for _, value in found] == items


@pytest.mark.parametrize("data", [b'[{"a":1}, {"a":', b'[{"a":1} oops]', b'[{"a":1}, NaN]', b'[{"a":1}, "\xff"]'])
def test_an_array_that_breaks_off_says_where(folder: Path, data: bytes) -> None:
    values, problems = read_bytes(folder, data, "d.json")
    assert values in ([(1, {"a": 1})], [])
    assert len(problems) == 1 and "not JSON" in problems[0][1]


def test_an_array_that_nests_too_deeply_is_a_problem(folder: Path) -> None:
    assert len(read_bytes(folder, b"[" * 100_000, "d.json")[1]) == 1


def test_csv_rows_are_records_and_unknown_columns_are_told(folder: Path) -> None:
    path = folder / "d.csv"
    path.write_text('id,instruction,input,output\n1,"Say ""a"",\nplease",,b\n2,x,y\n3,c,d,e\n', encoding="utf-8-sig")
    batches = list(read_batches(path))
    assert [value for batch in batches for value in batch.values] == [
        {"instruction": 'Say "a",\nplease', "output": "b"},
        {"instruction": "c", "input": "d", "output": "e"},
    ]
    assert {name for batch in batches for name in batch.ignored} == {"id"}
    assert [problem for batch in batches for problem in batch.problems] == [(3, "3 cells, and the header has 4")]


@pytest.mark.parametrize("data", [b"a,b\n1,2\n", b"", b"instruction,output\n\xff,x\n", b'instruction,output\n"x,y\n'])
def test_a_csv_that_cannot_be_read_is_a_problem(folder: Path, data: bytes) -> None:
    values, problems = read_bytes(folder, data, "d.csv")
    assert not values and len(problems) == 1


def test_parquet_rows_are_records(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    table = pyarrow.table({"messages": [messages, messages], "id": [1, 2]})
    path = folder / "d.parquet"
    parquet.write_table(table, path)
    batches = list(read_batches(path))
    assert [(batch.values, list(batch.lines), batch.ignored) for batch in batches] == [
        ([{"messages": messages}] * 2, [1, 2], ("id",))
    ]
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match=r"not a Parquet file"):
        list(read_batches(path))


def test_a_folder_stands_for_its_jsonl_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.json", "d.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "deep.jsonl").mkdir()
    names = [path.name for path in find_data_files([tmp_path, tmp_path / "a.jsonl"])]
    assert names == ["a.jsonl", "b.jsonl"]
    assert [path.name for path in find_data_files([tmp_path], ["*.json"])] == ["a.jsonl", "b.jsonl", "c.json"]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nowhere"):
        find_data_files([tmp_path / "nowhere.jsonl"])
    with pytest.raises(DatasetError, match=r"No \.jsonl"):
        find_data_files([tmp_path])
    with pytest.raises(DatasetError, match=r"pattern"):
        find_data_files([tmp_path], ["/etc/*"])
    with pytest.raises(DatasetError, match=r"No training data"):
        find_data_files([])
