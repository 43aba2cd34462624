"""Is this data fit to train on? Every record judged, in seconds for a million of them.

In: files. Out: a `ValidationReport`; each problem is told as it is found. The common, faultless record is recognised
without being taken apart; any other goes through `records.py`, so there is one judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.dataset.examples import Example, Source
from ollama_forge.dataset.read import read_batches
from ollama_forge.dataset.records import extra_keys, parse_record, record_warnings
from ollama_forge.errors import DatasetError
from ollama_forge.files import Advance

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used, and why."""

    source: Source
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass(frozen=True)
class ValidationReport:
    """What a look at every record found.

    Attributes:
        files: that were read.
        n_valid: records that can be used.
        n_invalid: records that cannot.
        warnings: kind of `records.WARNINGS` -> how many records.
        ignored_columns: of tables, that mean nothing here.
    """

    files: tuple[Path, ...]
    n_valid: int
    n_invalid: int
    warnings: Mapping[str, int]
    ignored_columns: tuple[str, ...]


@dataclass
class Tally:
    """What a reader of examples found on its way: warnings by kind, columns that were passed over."""

    warnings: Counter[str]
    ignored_columns: dict[str, None]

    @classmethod
    def empty(cls) -> Tally:
        """A tally of nothing yet."""
        return cls(Counter(), {})


def validate_files(
    files: Sequence[Path],
    *,
    ignore_extra: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
    advance: Advance | None = None,
) -> ValidationReport:
    """Judge every record of some files.

    Args:
        ignore_extra: accept Alpaca records with unknown keys, and count them.
        on_problem: told of each record that cannot be used.

    Raises:
        FormatError, MissingExtraError, DiskError: as `read.read_batches`.
    """
    tally = Tally.empty()
    n_valid = n_invalid = 0
    for path in files:
        for batch in read_batches(path, advance):
            tally.ignored_columns.update(dict.fromkeys(batch.ignored))
            problems = [Problem(Source(path, line), reason) for line, reason in batch.problems]
            for value, line in zip(batch.values, batch.lines, strict=True):
                if _is_faultless(value):
                    n_valid += 1
                    continue
                judged = _judge(value, Source(path, line), tally, ignore_extra=ignore_extra)
                if isinstance(judged, Problem):
                    problems.append(judged)
                else:
                    n_valid += 1
            n_invalid += len(problems)
            if on_problem:
                for problem in sorted(problems, key=lambda problem: problem.source.line):
                    on_problem(problem)
    return ValidationReport(
        tuple(files), n_valid, n_invalid, dict(sorted(tally.warnings.items())), tuple(tally.ignored_columns)
    )


def iter_examples(
    files: Sequence[Path], tally: Tally, *, ignore_extra: bool = False, advance: Advance | None = None
) -> Iterator[Example | Problem]:
    """Examples in the order of the files, with what cannot be used in between; nothing is held."""
    for path in files:
        for batch in read_batches(path, advance):
            tally.ignored_columns.update(dict.fromkeys(batch.ignored))
            for line, reason in batch.problems:
                yield Problem(Source(path, line), reason)
            for value, line in zip(batch.values, batch.lines, strict=True):
                yield _judge(value, Source(path, line), tally, ignore_extra=ignore_extra)


@dataclass(frozen=True)
class Dataset:
    """Examples that were read whole.

    Attributes:
        examples: in order.
        files: where they came from.
        warnings: kind of `records.WARNINGS` -> how many.
        ignored_columns: of tables.
        n_skipped: records that could not be used and were left out because the caller allowed it.
    """

    examples: tuple[Example, ...]
    files: tuple[Path, ...]
    warnings: Mapping[str, int]
    ignored_columns: tuple[str, ...] = ()
    n_skipped: int = 0


class ProblemList:
    """The first few problems and the number of all."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problem: Problem) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(problem)

    def error(self) -> DatasetError:
        """The error that shows the first few and counts the rest."""
        shown = "\n        ".join(map(str, self.first))
        rest = self.count - len(self.first)
        paths = list(dict.fromkeys(str(problem.source.path) for problem in self.first))
        return DatasetError(
            f"{self.count:,} invalid line(s) in the training data",
            why=shown + (f"\n        ... and {rest:,} more" if rest else ""),
            next=f"Run for the full list: ollama-forge validate-training-data {' '.join(paths)}",
        )


def read_dataset(
    files: Sequence[Path],
    *,
    ignore_extra: bool = False,
    skip_invalid: bool = False,
    advance: Advance | None = None,
) -> Dataset:
    """Read every example into memory.

    Raises:
        DatasetError: some records cannot be used (unless `skip_invalid`), or none is left.
        FormatError, MissingExtraError, DiskError: as `read.read_batches`.
    """
    tally, problems = Tally.empty(), ProblemList()
    examples = []
    for item in iter_examples(files, tally, ignore_extra=ignore_extra, advance=advance):
        if isinstance(item, Problem):
            problems.add(item)
        else:
            examples.append(item)
    if problems.count and not skip_invalid:
        raise problems.error()
    require_examples(len(examples), files)
    warnings = dict(sorted(tally.warnings.items()))
    return Dataset(tuple(examples), tuple(files), warnings, tuple(tally.ignored_columns), problems.count)


def require_examples(count: int, files: Sequence[Path]) -> None:
    """Refuse data without a single example.

    Raises:
        DatasetError: `count` is zero.
    """
    if not count:
        named = ", ".join(repr(str(path)) for path in files[:3])
        raise DatasetError(
            f"No training example in {named}",
            why="Every line is empty or cannot be used.",
            next="See what a line looks like: ollama-forge validate-training-data --schema",
        )


def _judge(value: Any, source: Source, tally: Tally, *, ignore_extra: bool) -> Example | Problem:
    try:
        example = parse_record(value, source, ignore_extra=ignore_extra)
    except DatasetError as exc:
        return Problem(source, exc.what)
    tally.warnings.update(record_warnings(example))
    if ignore_extra and extra_keys(value):
        tally.warnings["unknown keys"] += 1
    return example


def _is_faultless(value: Any) -> bool:
    """Whether a record is certainly good and earns no warning; False means: look closer."""
    if type(value) is not dict:
        return False
    n_keys = len(value)
    try:
        if n_keys == 1:
            if "messages" in value:
                return _are_faultless(value["messages"], "role", "content", "user", "assistant")
            return _are_faultless(value["conversations"], "from", "value", "human", "gpt")
        if "instruction" in value:
            question, answer = value["instruction"], value["output"]
            if n_keys != 2 and (n_keys != 3 or type(value["input"]) is not str):
                return False
        else:
            question, answer = value["prompt"], value["completion"]
            if n_keys != 2:
                return False
    except KeyError:
        return False
    return _says_something(question) and _says_something(answer)


def _says_something(text: Any) -> bool:
    return type(text) is str and bool(text) and not text.isspace()


def _are_faultless(messages: Any, role_key: str, text_key: str, asking: str, answering: str) -> bool:
    if type(messages) is not list or len(messages) < 2:
        return False
    expected = asking
    for index, message in enumerate(messages):
        if type(message) is not dict or len(message) != 2:
            return False
        text = message[text_key]
        if type(text) is not str or not text or text.isspace():
            return False
        role = message[role_key]
        if role == expected:
            expected = answering if role == asking else asking
        elif index or role != "system":
            return False
    return expected == asking
