"""From examples to rows of tokens for a trainer: split, shortened or left out by rule, and every loss counted.

In: examples and a `ChatFormat`. Out: `TokenizedDataset`. Nothing is cut or dropped without being counted, and a row
from which nothing can be learnt is never handed on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ollama_forge.dataset.chat_format import ChatFormat
from ollama_forge.dataset.examples import Example, Source, answered_turns
from ollama_forge.dataset.render import NOT_LEARNT, RenderedExample, RenderOptions, render_example
from ollama_forge.errors import DatasetError, TemplateError, UsageError

OVERLONG = ("truncate", "drop")
SHOWN_REFUSALS = 5

DROPPED = {
    "too long": "longer than the maximum length",
    "cut before the answer": "so long that nothing of an answer was left",
    "no answer": "without an answer that may be learnt",
    "refused": "refused by the chat template",
}
"""Why an example became no row."""


@dataclass(frozen=True)
class Tokenized:
    """One row: labels are ids where there is loss, -100 elsewhere; not shifted."""

    input_ids: array[int]
    labels: array[int]
    source: Source


@dataclass(frozen=True)
class TokenizedDataset:
    """Rows and what was lost on the way.

    Attributes:
        rows: in the order of the examples.
        n_truncated: rows that were cut at the maximum length.
        dropped: kind of `DROPPED` -> how many examples.
        notes: kind of `render.NOTES` -> how many examples.
        n_tokens: of all rows.
        n_learnt: of those that carry loss.
        longest: tokens of the longest example before any cut.
        refusals: the first few words of templates that refused, each with its example.
    """

    rows: tuple[Tokenized, ...]
    n_truncated: int
    dropped: Mapping[str, int]
    notes: Mapping[str, int]
    n_tokens: int
    n_learnt: int
    longest: int
    refusals: tuple[str, ...] = ()


def tokenize_examples(
    examples: Iterable[Example],
    chat_format: ChatFormat,
    *,
    max_length: int,
    options: RenderOptions | None = None,
    overlong: str = "truncate",
    skip_refused: bool = False,
    on_example: Callable[[RenderedExample], None] | None = None,
) -> TokenizedDataset:
    """Render, cut and count.

    Args:
        max_length: tokens of a row.
        overlong: `truncate` cuts the end of a longer one off, `drop` leaves it out.
        skip_refused: leave out what the template refuses; else the first refusal is raised.
        on_example: told of each, before it is cut.

    Raises:
        DatasetError: no row is left from which something can be learnt; the error says why.
        TemplateError: the template refuses an example, or hides where its answer stands.
        UsageError: `overlong` or `max_length` makes no sense.
    """
    if overlong not in OVERLONG or max_length < 2:
        raise UsageError(
            f"max_length {max_length!r} and overlong {overlong!r} do not go together",
            next=f"A length of at least 2, and one of: {', '.join(OVERLONG)}",
        )
    notes: Counter[str] = Counter()
    rows = _Rows(max_length, overlong)
    for example in examples:
        rows.n_examples += 1
        if not answered_turns(example):
            rows.dropped["no answer"] += 1
            continue
        try:
            rendered = render_example(chat_format, example, options, notes)
        except TemplateError as exc:
            if not skip_refused:
                raise
            rows.refuse(exc)
            continue
        if on_example:
            on_example(rendered)
        rows.add(rendered)
    if not rows.kept:
        raise rows.nothing_left()
    return TokenizedDataset(
        tuple(rows.kept),
        rows.n_truncated,
        dict(sorted(rows.dropped.items())),
        dict(sorted(notes.items())),
        sum(len(row.input_ids) for row in rows.kept),
        sum(_count_learnt(row) for row in rows.kept),
        rows.longest,
        tuple(rows.refusals),
    )


class _Rows:
    """Rows that are kept, and why others are not."""

    def __init__(self, max_length: int, overlong: str) -> None:
        self.kept: list[Tokenized] = []
        self.dropped: Counter[str] = Counter()
        self.refusals: list[str] = []
        self.n_examples = self.n_truncated = self.longest = 0
        self._max_length = max_length
        self._overlong = overlong

    def refuse(self, exc: TemplateError) -> None:
        self.dropped["refused"] += 1
        if len(self.refusals) < SHOWN_REFUSALS:
            self.refusals.append(exc.what)

    def add(self, rendered: RenderedExample) -> None:
        n_tokens = len(rendered.input_ids)
        self.longest = max(self.longest, n_tokens)
        is_long = n_tokens > self._max_length
        if is_long and self._overlong == "drop":
            self.dropped["too long"] += 1
            return
        row = Tokenized(rendered.input_ids[: self._max_length], rendered.labels[: self._max_length], rendered.source)
        if _count_learnt(row) == 0:
            self.dropped["cut before the answer" if is_long else "no answer"] += 1
            return
        self.n_truncated += is_long
        self.kept.append(row)

    def nothing_left(self) -> DatasetError:
        if not self.n_examples:
            return DatasetError(
                "No training example was given",
                next="See what a line looks like: ollama-forge validate-training-data --schema",
            )
        reasons = "; ".join(f"{count:,} {DROPPED[kind]}" for kind, count in sorted(self.dropped.items()))
        next_step = "See what the data holds: ollama-forge train-data stats DATA --base REF"
        if self.dropped["too long"] or self.dropped["cut before the answer"]:
            next_step = (
                f"The longest has {self.longest:,} tokens: raise --max-length above {self._max_length:,}, "
                "or shorten the data."
            )
        elif self.refusals:
            next_step = f"Change the conversations: {self.refusals[0]}"
        return DatasetError(
            f"None of the {self.n_examples:,} examples has a token to learn from", why=f"{reasons}.", next=next_step
        )


def split_examples(
    examples: Sequence[Example], validation: float, seed: int = 0
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(training, validation), each in the original order.

    Which example goes where depends on its content and the seed only: not on its place, its file or the others. Equal
    examples stay together, so that nothing of the validation part is trained on.

    Args:
        validation: the share to hold back, 0 to below 1; at least one example is held back for more than 0, and at
            least one kept.

    Raises:
        UsageError: a share that is not in that range.
    """
    if not 0 <= validation < 1:
        raise UsageError(f"A validation share of {validation!r}", next="Give a number from 0 to below 1, such as 0.1")
    wanted = max(1, round(len(examples) * validation)) if validation else 0
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        key = hashlib.sha256(f"{seed}\n".encode() + example.canonical()).digest()
        groups.setdefault(key, []).append(index)
    held: set[int] = set()
    for key in sorted(groups)[: len(groups) - 1]:
        if len(held) >= wanted:
            break
        held.update(groups[key])
    return (
        tuple(example for index, example in enumerate(examples) if index not in held),
        tuple(example for index, example in enumerate(examples) if index in held),
    )


def _count_learnt(row: Tokenized) -> int:
    """Labels that carry loss: the first position of a row is never predicted."""
    labels = row.labels[1:]
    return len(labels) - labels.count(NOT_LEARNT)
