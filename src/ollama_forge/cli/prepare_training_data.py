"""`prepare-training-data`: training data in the form that another trainer takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, write_options
from ollama_forge.cli.validate_training_data import say_warnings
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.dataset.prepare import Preparation


@click.command(
    "prepare-training-data",
    epilog="Example: ollama-forge prepare-training-data train.jsonl -o train_prepared.txt --format llama.cpp",
)
@click.argument("data", nargs=-1, type=click.Path(path_type=Path), metavar="DATA...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write.")
@click.option(
    "--format",
    "format_names",
    default="llama.cpp",
    show_default=True,
    metavar="NAME[,NAME]",
    help="llama.cpp, axolotl, unsloth, chatml or alpaca. With several, each gets its own file: OUTPUT.NAME.ENDING.",
)
@click.option("--list-formats", is_flag=True, help="List the formats, and stop.")
@click.option("--include", multiple=True, metavar="GLOB", help="More files to take from a folder: '*.json', '*.csv'.")
@click.option("--skip-invalid", is_flag=True, help="Leave out lines that cannot be used, and count them.")
@click.option("--ignore-extra-keys", is_flag=True, help="Accept Alpaca records with keys that mean nothing here.")
@write_options
@console_options
def command(
    data: tuple[Path, ...],
    output: Path | None,
    format_names: str,
    list_formats: bool,
    include: tuple[str, ...],
    skip_invalid: bool,
    ignore_extra_keys: bool,
    force: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Write training data (files, or folders of .jsonl) in the form that another trainer takes.

    llama.cpp gets plain text, one block per example: ### Instruction, ### Input, ### Response.
    """
    from ollama_forge.dataset.formats import FORMATS, parse_formats
    from ollama_forge.dataset.prepare import prepare_files
    from ollama_forge.dataset.read import find_data_files

    if list_formats:
        rows = [(row.name, row.ending, row.words) for row in FORMATS.values()]
        console.result(
            {"formats": [{"name": name, "ending": ending, "for": words} for name, ending, words in rows]},
            lambda: console.table(("FORMAT", "FILE", "FOR"), rows),
        )
        return
    formats = parse_formats(format_names)
    if not data or output is None:
        raise UsageError(
            "No training data was named" if not data else "No output file was named",
            next="ollama-forge prepare-training-data ./data -o train_prepared.txt",
        )
    files = find_data_files(data, include)
    with console.progress("Preparing", sum(path.stat().st_size for path in files)) as advance:
        done = prepare_files(
            files,
            output,
            formats,
            overwrite=force,
            dry_run=dry_run,
            skip_invalid=skip_invalid,
            ignore_extra=ignore_extra_keys,
            advance=advance,
        )
    report_preparation(console, done, dry_run=dry_run)
    if not dry_run and not console.as_json:
        console.line(f"Prepared {done.written[0].n_samples:,} samples. Next: {_next_step(done)}")


def report_preparation(console: Console, done: Preparation, *, dry_run: bool) -> None:
    """Print what was written: JSON, or a line for each file; and every loss."""
    say_warnings(console, done.warnings, done.ignored_columns, done.n_skipped)
    say_losses(console, done)
    console.result(_document(done, dry_run), lambda: _show(console, done, dry_run))


def say_losses(console: Console, done: Preparation) -> None:
    """What the form could not hold, in words."""
    from ollama_forge.dataset.formats import LOSSES

    for written in done.written:
        for kind, count in written.losses.items():
            console.warn(f"{written.format}: {count:,} examples: {LOSSES[kind]}")


def _document(done: Preparation, dry_run: bool) -> dict[str, Any]:
    return {
        "written": [
            {
                "format": item.format,
                "path": str(item.path),
                "samples": item.n_samples,
                "bytes": item.size_bytes,
                "sha256": item.sha256,
                "losses": dict(item.losses),
            }
            for item in done.written
        ],
        "warnings": dict(done.warnings),
        "ignored_columns": list(done.ignored_columns),
        "skipped": done.n_skipped,
        "dry_run": dry_run,
    }


def _show(console: Console, done: Preparation, dry_run: bool) -> None:
    for item in done.written:
        verb = "Would write" if dry_run else "Wrote"
        console.line(f"{verb} {item.path} ({item.size_bytes:,} bytes, {item.n_samples:,} samples, {item.format})")


def _next_step(done: Preparation) -> str:
    first = done.written[0]
    if first.format == "llama.cpp":
        return (
            f"run your trainer (llama.cpp: finetune --train-data {first.path} --sample-start '### Instruction' ...) "
            "or let train-run do it all: ollama-forge train-run --data DATA --base llama3.2 --name my-model"
        )
    return "run your trainer, then: ollama-forge retrain --base llama3.2 --adapter ADAPTER --name my-model"
