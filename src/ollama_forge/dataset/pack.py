"""Several short examples in one row: which ones share a row, so that few rows have little room left.

In: rows of tokens and the tokens that a row may have. Out: groups of rows; none is split and none left out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from ollama_forge.dataset.tokenize import Tokenized


def pack_rows(rows: Sequence[Tokenized], room: int) -> tuple[tuple[Tokenized, ...], ...]:
    """Best fit, longest first (the `bfd` of TRL); 0: each row stays alone. A row longer than `room` stays alone, too.

    Groups and what is in them are in the order of the rows, so the same rows give the same groups.
    """
    if not room:
        return tuple((row,) for row in rows)
    lengths = [len(row.input_ids) for row in rows]
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # tokens that a group has left, and its number; ascending
    for number in sorted(range(len(rows)), key=lambda number: -lengths[number]):
        place = bisect_left(free, (lengths[number], 0))
        if place < len(free):
            left, group = free.pop(place)
        else:
            left, group = room, len(groups)
            groups.append([])
        groups[group].append(number)
        if left > lengths[number]:
            insort(free, (left - lengths[number], group))
    ordered = sorted(sorted(group) for group in groups)
    return tuple(tuple(rows[number] for number in group) for group in ordered)
