"""What a dataset is like to one model: lengths in its tokens, what would be cut, duplicates, leaks, secrets.

In: examples, a `ChatFormat`, a maximum length. Out: `DatasetStatistics`. It looks, and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ollama_forge.dataset.chat_format import ChatFormat
from ollama_forge.dataset.examples import Example, Source, answered_turns
from ollama_forge.dataset.private import PrivateString, find_private_strings
from ollama_forge.dataset.render import NOT_LEARNT, RenderedExample, RenderOptions, render_example
from ollama_forge.errors import TemplateError

SHORT_ANSWER_CHARS = 3
SHOWN = 5


@dataclass(frozen=True)
class Bin:
    """Examples with `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class DatasetStatistics:
    """What was seen.

    Attributes:
        n_examples: that were looked at.
        n_turns: of all examples.
        n_tokens, n_learnt: of all examples that the template takes, and of those the ones that carry loss.
        shortest, median, longest: tokens of an example.
        histogram: tokens of an example, in bins that double.
        n_truncated: examples longer than the maximum length.
        n_lost: examples of which no learnt token is left below the maximum length.
        n_duplicates: examples that an earlier one equals.
        duplicates: the first few (example, the earlier one).
        n_contradictions: examples that ask what an earlier one asks and answer otherwise.
        n_short: examples with an answer of a few characters, or none.
        n_leaks: validation examples that are in the training data too; None without validation data.
        leaks: the first few (validation example, training example).
        private: kind -> how often.
        private_places: the first few.
        refused: examples that the template refuses, and why; the first few.
        n_refused: all of them.
        notes: kind of `render.NOTES` -> how many examples.
        sample: one example in tokens.
    """

    n_examples: int
    n_turns: int
    n_tokens: int
    n_learnt: int
    shortest: int
    median: int
    longest: int
    histogram: tuple[Bin, ...]
    n_truncated: int
    n_lost: int
    n_duplicates: int
    duplicates: tuple[tuple[Source, Source], ...]
    n_contradictions: int
    n_short: int
    n_leaks: int | None
    leaks: tuple[tuple[Source, Source], ...]
    private: Mapping[str, int]
    private_places: tuple[tuple[Source, PrivateString], ...]
    refused: tuple[str, ...]
    n_refused: int
    notes: Mapping[str, int]
    sample: RenderedExample | None


def measure_dataset(
    examples: Sequence[Example],
    chat_format: ChatFormat,
    *,
    max_length: int,
    options: RenderOptions | None = None,
    validation: Sequence[Example] | None = None,
    sample_index: int | None = None,
) -> DatasetStatistics:
    """Look at every example.

    Args:
        max_length: where training would cut.
        validation: held-out examples that should not be among the others.
        sample_index: which of the examples that render is kept as the sample (the last one, where there are fewer);
            None takes the first in which nothing looks private.
    """
    rendered = _Rendered(max_length, sample_index)
    for example in examples:
        rendered.add(example, chat_format, options)
    ordered = sorted(rendered.lengths)
    seen, duplicates = _find_duplicates(examples)
    leaks = [(item.source, seen[key]) for item, key in _keyed(validation or ()) if key in seen]
    private, places = _find_private(examples)
    return DatasetStatistics(
        n_examples=len(examples),
        n_turns=sum(len(example.turns) for example in examples),
        n_tokens=sum(ordered),
        n_learnt=rendered.n_learnt,
        shortest=ordered[0] if ordered else 0,
        median=ordered[len(ordered) // 2] if ordered else 0,
        longest=ordered[-1] if ordered else 0,
        histogram=bin_lengths(ordered),
        n_truncated=sum(length > max_length for length in ordered),
        n_lost=rendered.n_lost,
        n_duplicates=len(duplicates),
        duplicates=tuple(duplicates[:SHOWN]),
        n_contradictions=_count_contradictions(examples),
        n_short=sum(_has_short_answer(example) for example in examples),
        n_leaks=None if validation is None else len(leaks),
        leaks=tuple(leaks[:SHOWN]),
        private=dict(private.most_common()),
        private_places=tuple(places),
        refused=tuple(rendered.refused),
        n_refused=rendered.n_refused,
        notes=dict(sorted(rendered.notes.items())),
        sample=rendered.sample,
    )


class _Rendered:
    """What rendering each example showed."""

    def __init__(self, max_length: int, sample_index: int | None) -> None:
        self.lengths: list[int] = []
        self.notes: Counter[str] = Counter()
        self.refused: list[str] = []
        self.sample: RenderedExample | None = None
        self.n_learnt = self.n_lost = self.n_refused = 0
        self._max_length = max_length
        self._sample_index = sample_index

    def add(self, example: Example, chat_format: ChatFormat, options: RenderOptions | None) -> None:
        try:
            rendered = render_example(chat_format, example, options, self.notes)
        except TemplateError as exc:
            self.n_refused += 1
            if len(self.refused) < SHOWN:
                self.refused.append(exc.what)
            return
        if _is_sample(self.sample, example, self._sample_index, len(self.lengths)):
            self.sample = rendered
        self.lengths.append(len(rendered.input_ids))
        self.n_learnt += rendered.n_learnt
        self.n_lost += rendered.labels[: self._max_length].count(NOT_LEARNT) == len(rendered.labels[: self._max_length])


def _is_sample(sample: RenderedExample | None, example: Example, wanted: int | None, n_rendered: int) -> bool:
    if wanted is not None:
        return n_rendered <= wanted
    return sample is None and not any(find_private_strings(turn.text) for turn in example.turns)


def bin_lengths(lengths: Iterable[int]) -> tuple[Bin, ...]:
    """Lengths counted in bins 1-32, 33-64, 65-128 and so on, without empty ones at either end."""
    counts = Counter(max(5, (length - 1).bit_length()) for length in lengths if length > 0)
    if not counts:
        return ()
    return tuple(
        Bin(1 if power == 5 else (1 << power - 1) + 1, 1 << power, counts[power])
        for power in range(min(counts), max(counts) + 1)
    )


def _keyed(examples: Iterable[Example]) -> Iterable[tuple[Example, bytes]]:
    """Examples with what makes two of them the same: who says what, blanks and case aside."""
    for example in examples:
        words = [f"{turn.role}\0{' '.join(turn.text.split()).casefold()}\0{turn.tool_calls}" for turn in example.turns]
        yield example, hashlib.sha256("\1".join(words).encode("utf-8", "surrogatepass")).digest()


def _find_duplicates(examples: Iterable[Example]) -> tuple[dict[bytes, Source], list[tuple[Source, Source]]]:
    seen: dict[bytes, Source] = {}
    duplicates = []
    for example, key in _keyed(examples):
        if key in seen:
            duplicates.append((example.source, seen[key]))
        else:
            seen[key] = example.source
    return seen, duplicates


def _count_contradictions(examples: Sequence[Example]) -> int:
    asked: dict[bytes, str] = {}
    count = 0
    for example in examples:
        answers = answered_turns(example)
        if not answers:
            continue
        asked_text = "\1".join(f"{turn.role}\0{turn.text.strip().casefold()}" for turn in example.turns[: answers[-1]])
        key = hashlib.sha256(asked_text.encode("utf-8", "surrogatepass")).digest()
        answer = example.turns[answers[-1]].text.strip().casefold()
        count += asked.setdefault(key, answer) != answer
    return count


def _has_short_answer(example: Example) -> bool:
    answers = [turn for turn in example.turns if turn.role == "assistant" and not turn.tool_calls]
    return any(len(turn.text.strip()) < SHORT_ANSWER_CHARS for turn in answers)


def _find_private(examples: Iterable[Example]) -> tuple[Counter[str], list[tuple[Source, PrivateString]]]:
    counts: Counter[str] = Counter()
    places: list[tuple[Source, PrivateString]] = []
    for example in examples:
        for turn in example.turns:
            for found in find_private_strings(turn.text):
                counts[found.kind] += 1
                if len(places) < SHOWN:
                    places.append((example.source, found))
    return counts, places
