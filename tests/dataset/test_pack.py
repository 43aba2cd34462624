"""Which examples share a row."""

from __future__ import annotations

from array import array
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.dataset.examples import Source
from ollama_forge.dataset.pack import pack_rows
from ollama_forge.dataset.tokenize import Tokenized


def rows_of(lengths: list[int]) -> list[Tokenized]:
    return [
        Tokenized(array("q", [number] * length), array("q", [number] * length), Source(Path("data.jsonl"), number))
        for number, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 40))
def test_every_row_is_in_one_group_whole_and_no_group_has_more_than_the_room(lengths: list[int], room: int) -> None:
    rows = rows_of(lengths)
    groups = pack_rows(rows, room)
    assert sorted(row.source.line for group in groups for row in group) == list(range(len(rows)))
    for group in groups:
        assert len(group) == 1 or sum(len(row.input_ids) for row in group) <= room
    assert groups == pack_rows(rows, room)


def test_a_gap_is_filled_with_what_fits_best() -> None:
    groups = pack_rows(rows_of([6, 3, 7, 4, 2, 1]), 10)
    assert [[row.source.line for row in group] for group in groups] == [[0, 3], [1, 2], [4, 5]]


def test_without_room_each_row_stays_alone() -> None:
    rows = rows_of([1, 2])
    assert pack_rows(rows, 0) == ((rows[0],), (rows[1],))
