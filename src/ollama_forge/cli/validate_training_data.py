"""`validate-training-data`: is every line fit to train on?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.dataset.validate import Problem, ValidationReport


@click.command(
    "validate-training-data",
    epilog="Example: ollama-forge validate-training-data train.jsonl   (or a folder: ./data)",
)
@click.argument("data", nargs=-1, type=click.Path(path_type=Path), metavar="[DATA]...")
@click.option("--schema", is_flag=True, help="Show what a line may look like, and stop.")
@click.option("--include", multiple=True, metavar="GLOB", help="More files to take from a folder: '*.json', '*.csv'.")
@click.option("--ignore-extra-keys", is_flag=True, help="Accept Alpaca records with keys that mean nothing here.")
@click.option("--max-errors", type=click.IntRange(0), metavar="N", help="Show the first N problems and count the rest.")
@console_options
def command(
    data: tuple[Path, ...],
    schema: bool,
    include: tuple[str, ...],
    ignore_extra_keys: bool,
    max_errors: int | None,
    console: Console,
) -> int:
    """Check training data, line by line: files, or folders of .jsonl. Exit 1 if a line cannot be used.

    Each line is one JSON object with instruction and output (and optional input), or with messages of user and
    assistant; also ShareGPT conversations, prompt and completion, JSON arrays, CSV and Parquet.
    """
    from ollama_forge.dataset.read import find_data_files
    from ollama_forge.dataset.records import SCHEMA
    from ollama_forge.dataset.validate import validate_files

    if schema:
        console.result({"schema": SCHEMA}, lambda: console.line(SCHEMA.rstrip()))
        return 0
    if not data:
        raise UsageError("No training data was named", next="ollama-forge validate-training-data ./data")
    files = find_data_files(data, include)
    shown: list[Problem] = []
    n_seen = 0

    def on_problem(problem: Problem) -> None:
        nonlocal n_seen
        n_seen += 1
        if max_errors is not None and n_seen > max_errors:
            return
        if console.as_json:
            shown.append(problem)
        else:
            console.line(str(problem))

    with console.progress("Checking", sum(path.stat().st_size for path in files)) as advance:
        report = validate_files(files, ignore_extra=ignore_extra_keys, on_problem=on_problem, advance=advance)
    console.result(_document(report, shown), lambda: _show(console, report, max_errors))
    return 0 if report.n_valid and not report.n_invalid else 1


def _document(report: ValidationReport, shown: list[Problem]) -> dict[str, object]:
    return {
        "ok": bool(report.n_valid) and not report.n_invalid,
        "valid": report.n_valid,
        "invalid": report.n_invalid,
        "files": [str(path) for path in report.files],
        "errors": [{"file": str(item.source.path), "line": item.source.line, "reason": item.reason} for item in shown],
        "warnings": dict(report.warnings),
        "ignored_columns": list(report.ignored_columns),
    }


def _show(console: Console, report: ValidationReport, max_errors: int | None) -> None:
    unseen = 0 if max_errors is None else report.n_invalid - max_errors
    if unseen > 0:
        console.line(f"... and {unseen:,} more")
    say_warnings(console, report.warnings, report.ignored_columns)
    if report.n_invalid:
        console.line(f"{report.n_invalid:,} invalid line(s), {report.n_valid:,} valid line(s)")
        console.say("  next: mend these lines; --schema shows what a line may look like.")
    elif not report.n_valid:
        console.line("No training example in these files")
        console.say("  next: ollama-forge validate-training-data --schema shows what a line may look like.")
    else:
        console.line(f"OK: {report.n_valid:,} valid line(s)")


def say_warnings(console: Console, warnings: object, ignored_columns: tuple[str, ...], n_skipped: int = 0) -> None:
    """Warnings that a reader of training data counted, in words."""
    from ollama_forge.dataset.records import WARNINGS

    counts: dict[str, int] = dict(warnings) if isinstance(warnings, dict) else {}
    for kind, count in counts.items():
        console.warn(f"{count:,} with a warning ({kind}): {WARNINGS[kind]}")
    if ignored_columns:
        console.warn(f"Columns that mean nothing here were ignored: {', '.join(ignored_columns)}")
    if n_skipped:
        console.warn(f"{n_skipped:,} invalid line(s) were left out")
