"""Write data files in another form: whole or not at all, in bounded memory, with every loss counted.

In: data files and a form. Out: the finished files and what was lost on the way. One invalid line, and nothing is
written, unless the caller says that such lines may be left out.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.dataset.examples import Example
from ollama_forge.dataset.formats import PreparedFormat
from ollama_forge.dataset.validate import Problem, ProblemList, Tally, iter_examples, require_examples
from ollama_forge.files import Advance, HashingWriter, atomic_output, refuse_existing


@dataclass(frozen=True)
class PreparedFile:
    """A file in one form.

    Attributes:
        format: its name.
        path: where it is (or would be).
        n_samples: how many examples it holds.
        size_bytes: of the file.
        sha256: of the file; empty on a dry run.
        losses: kind of `formats.LOSSES` -> how many examples.
    """

    format: str
    path: Path
    n_samples: int
    size_bytes: int
    sha256: str
    losses: Mapping[str, int]


@dataclass(frozen=True)
class Preparation:
    """What `prepare_files` did.

    Attributes:
        written: one for each form.
        warnings: kind of `records.WARNINGS` -> how many records.
        ignored_columns: of tables.
        n_skipped: invalid records that were left out.
    """

    written: tuple[PreparedFile, ...]
    warnings: Mapping[str, int]
    ignored_columns: tuple[str, ...]
    n_skipped: int


def output_paths(output: Path, formats: Sequence[PreparedFormat]) -> tuple[Path, ...]:
    """Where each form goes: to `output` itself, or, when there are several, to names with the form in them."""
    if len(formats) == 1:
        return (output,)
    return tuple(output.with_name(f"{output.stem}.{row.name}{row.ending}") for row in formats)


def prepare_files(
    files: Sequence[Path],
    output: Path,
    formats: Sequence[PreparedFormat],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    skip_invalid: bool = False,
    ignore_extra: bool = False,
    advance: Advance | None = None,
) -> Preparation:
    """Read every example once and write it in each form.

    Args:
        output: see `output_paths`.
        overwrite: replace what is there.
        dry_run: count and measure, write nothing.
        skip_invalid: leave out records that cannot be used, and count them.

    Raises:
        DatasetError: records that cannot be used, or no example at all.
        ExistsError: a target is there and `overwrite` is false.
        FormatError, MissingExtraError, DiskError: as `read.read_batches`.
    """
    paths = output_paths(output, formats)
    tally, problems = Tally.empty(), ProblemList()
    n_examples = 0
    with contextlib.ExitStack() as stack:
        pens = [
            _Pen(row, path, _open_sink(stack, path, overwrite=overwrite, dry_run=dry_run))
            for row, path in zip(formats, paths, strict=True)
        ]
        for item in iter_examples(files, tally, ignore_extra=ignore_extra, advance=advance):
            if isinstance(item, Problem):
                problems.add(item)
            elif not problems.count or skip_invalid:
                n_examples += 1
                for pen in pens:
                    pen.write(item)
        if problems.count and not skip_invalid:
            raise problems.error()
        require_examples(min(n_examples, *(pen.n_samples for pen in pens)), files)
        for pen in pens:
            pen.flush()
    return Preparation(
        tuple(pen.result() for pen in pens),
        dict(sorted(tally.warnings.items())),
        tuple(tally.ignored_columns),
        problems.count,
    )


def _open_sink(stack: contextlib.ExitStack, path: Path, *, overwrite: bool, dry_run: bool) -> HashingWriter | None:
    refuse_existing(path, overwrite=overwrite)
    return None if dry_run else stack.enter_context(atomic_output(path, overwrite=overwrite))


class _Pen:
    """One output file: examples in, counted bytes out."""

    def __init__(self, row: PreparedFormat, path: Path, sink: HashingWriter | None) -> None:
        self.n_samples = 0
        self._row = row
        self._path = path
        self._sink = sink
        self._losses: Counter[str] = Counter()
        self._size_bytes = 0
        self._pending: list[bytes] = []
        self._render: Callable[[Example, Counter[str]], bytes | None] = row.render

    def write(self, example: Example) -> None:
        text = self._render(example, self._losses)
        if text is None:
            return
        if self.n_samples and self._row.separator:
            text = self._row.separator + text
        self.n_samples += 1
        self._size_bytes += len(text)
        if self._sink:
            self._pending.append(text)
            if len(self._pending) >= 1000:
                self.flush()

    def flush(self) -> None:
        if self._sink and self._pending:
            self._sink.write(b"".join(self._pending))
            self._pending.clear()

    def result(self) -> PreparedFile:
        return PreparedFile(
            self._row.name,
            self._path,
            self.n_samples,
            self._size_bytes,
            self._sink.sha256 if self._sink else "",
            dict(sorted(self._losses.items())),
        )
