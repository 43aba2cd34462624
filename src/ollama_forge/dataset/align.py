"""Where two tokenizers stand at the same letter of the same answer, so that what comes next can be compared.

In: the same examples as rows of tokens of two models. Out: the first model's rows with labels only where the second one
also begins a token there, and which of its tokens that is. Each model keeps its own template; only answers count.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ollama_forge.dataset.render import NOT_LEARNT
from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.tokenizer.decode import token_bytes
from ollama_forge.tokenizer.encode import GGUFTokenizer


@dataclass(frozen=True)
class AlignedRow:
    """One example as two models read it.

    Attributes:
        student: with labels at the common places only.
        teacher_ids: the whole row of the other model.
        places: for each label of `student`, in order, the place in `teacher_ids` at which the other model writes the
            same text; both have read the same part of the answer before it.
    """

    student: Tokenized
    teacher_ids: array[int]
    places: tuple[int, ...]


def align_rows(
    students: Sequence[Tokenized], teachers: Sequence[Tokenized], student: GGUFTokenizer, teacher: GGUFTokenizer
) -> list[AlignedRow]:
    """Rows of the same example (by its source) side by side; those without a common place are left out."""
    others = {row.source: row for row in teachers}
    aligned = []
    for row in students:
        other = others.get(row.source)
        pairs = [] if other is None else _common_places(row, other, student, teacher)
        if other is None or not pairs:
            continue
        labels = array("i", [NOT_LEARNT] * len(row.labels))
        for place, _ in pairs:
            labels[place] = row.labels[place]
        places = tuple(place for _, place in pairs)
        aligned.append(AlignedRow(replace(row, labels=labels), other.input_ids, places))
    return aligned


def _common_places(
    row: Tokenized, other: Tokenized, student: GGUFTokenizer, teacher: GGUFTokenizer
) -> list[tuple[int, int]]:
    """(place in `row`, place in `other`) of tokens that begin after the same letters of the same answer."""
    found = []
    for ours, theirs in zip(_answers(row), _answers(other), strict=False):
        text, begins = _spell(student, row.input_ids[ours.start : ours.stop])
        other_text, other_begins = _spell(teacher, other.input_ids[theirs.start : theirs.stop])
        by_begin = {begin: theirs.start + number for number, begin in reversed(list(enumerate(other_begins)))}
        for number, begin in enumerate(begins):
            place = by_begin.get(begin)
            if place and ours.start + number and text[:begin] == other_text[:begin]:
                found.append((ours.start + number, place))
                del by_begin[begin]
    return found


def _answers(row: Tokenized) -> Iterator[range]:
    """Stretches of tokens with a label."""
    start = None
    for place, label in enumerate([*row.labels, NOT_LEARNT]):
        if label != NOT_LEARNT and start is None:
            start = place
        elif label == NOT_LEARNT and start is not None:
            yield range(start, place)
            start = None


def _spell(tokenizer: GGUFTokenizer, ids: Sequence[int]) -> tuple[bytes, list[int]]:
    """(the answer's bytes, where each token begins); a blank that a tokenizer puts in front does not count."""
    text, begins = b"", []
    for token_id in ids:
        begins.append(len(text))
        piece = token_bytes(tokenizer, token_id)
        text += piece if text else piece.lstrip(b" ")
    return text, begins
