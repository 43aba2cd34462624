"""What a command prints and how: results on stdout, talk on stderr; human, json or quiet.

A command makes one `Console` and gives it one result; nothing else in the package prints.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from ollama_forge.errors import UsageError
from ollama_forge.files import Advance

Json = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Console:
    """One output sink. `as_json` prints exactly one document; `is_quiet` keeps talk and bars away."""

    as_json: bool = False
    is_quiet: bool = False

    def result(self, document: Json, human: Callable[[], None] | None = None) -> None:
        """Print the command's result: `document` as JSON, else what `human` prints."""
        if self.as_json:
            click.echo(json.dumps(document, ensure_ascii=False, indent=2))
        elif human is not None:
            human()

    def line(self, text: str = "") -> None:
        """A line of the result, for people."""
        click.echo(text)

    def say(self, text: str) -> None:
        """Talk: what is going on. Never part of the result."""
        if not (self.is_quiet or self.as_json):
            click.echo(text, err=True)

    def done(self, text: str) -> None:
        """Talk: a step that ended well."""
        if not (self.is_quiet or self.as_json):
            click.echo(click.style("✓ ", fg="green") + text, err=True)

    def warn(self, text: str) -> None:
        """A warning: always on stderr, in every mode."""
        click.echo(click.style("! ", fg="yellow") + text, err=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
        """A plain table; the columns named in `right` are aligned to the right."""
        cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        for number, row in enumerate(cells):
            parts = [
                cell.rjust(width) if column in right else cell.ljust(width)
                for cell, width, column in zip(row, widths, columns, strict=True)
            ]
            text = "  ".join(parts).rstrip()
            click.echo(click.style(text, bold=True) if number == 0 else text)

    def confirm(self, question: str, *, assume_yes: bool) -> None:
        """Ask before something is removed.

        Raises:
            UsageError: nobody is there to answer and `--yes` was not given.
            click.Abort: the answer was no.
        """
        if assume_yes:
            return
        if self.as_json or not sys.stdin.isatty():
            raise UsageError(question, why="Nobody is there to answer.", next="Add --yes to go ahead.")
        click.confirm(question, abort=True, err=True)

    @contextlib.contextmanager
    def progress(self, label: str, total_bytes: int) -> Iterator[Advance]:
        """A bar with rate and time left on stderr; silent when stderr is not a terminal."""
        if self.as_json or self.is_quiet or not sys.stderr.isatty():
            yield lambda _count: None
            return
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=RichConsole(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total_bytes)
            yield lambda count: bar.advance(task, count)


def human_bytes(size_bytes: int) -> str:
    """1_610_612_736 -> '1.6 GB' (decimal units, as `ollama list` prints them)."""
    value = float(size_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def human_time(seconds: float) -> str:
    """5_400 -> '1.5 hours'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def human_count(count: int) -> str:
    """1_100_048_384 -> '1.1B', the way model sizes are spoken."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.1f}{unit}".replace(".0", "")
    return str(count)
