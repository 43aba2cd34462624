"""`convert-training-data-format`: Alpaca to messages and back."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, write_options
from ollama_forge.cli.prepare_training_data import report_preparation


@click.command(
    "convert-training-data-format",
    epilog="Example: ollama-forge convert-training-data-format chats.jsonl -o alpaca.jsonl --to alpaca",
)
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="INPUT...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .jsonl file to write.")
@click.option("--to", "target", type=click.Choice(["alpaca", "messages"]), default="alpaca", show_default=True)
@click.option("--keep-history", is_flag=True, help="Alpaca with 'system' and 'history', so that nothing is left out.")
@click.option("--include", multiple=True, metavar="GLOB", help="More files to take from a folder: '*.json', '*.csv'.")
@click.option("--skip-invalid", is_flag=True, help="Leave out lines that cannot be used, and count them.")
@click.option("--ignore-extra-keys", is_flag=True, help="Accept Alpaca records with keys that mean nothing here.")
@write_options
@console_options
def command(
    data: tuple[Path, ...],
    output: Path,
    target: str,
    keep_history: bool,
    include: tuple[str, ...],
    skip_invalid: bool,
    ignore_extra_keys: bool,
    force: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Write training data of any known form as Alpaca or as messages, one JSON object per line.

    Alpaca holds one question and one answer: a system prompt becomes the input, and of a longer conversation the last
    question and its answer are kept. Whatever does not fit is counted, or kept with --keep-history.
    """
    from ollama_forge.dataset.formats import line_format
    from ollama_forge.dataset.prepare import prepare_files
    from ollama_forge.dataset.read import find_data_files

    files = find_data_files(data, include)
    with console.progress("Converting", sum(path.stat().st_size for path in files)) as advance:
        done = prepare_files(
            files,
            output,
            (line_format(target, keep_history=keep_history),),
            overwrite=force,
            dry_run=dry_run,
            skip_invalid=skip_invalid,
            ignore_extra=ignore_extra_keys,
            advance=advance,
        )
    report_preparation(console, done, dry_run=dry_run)
    if not dry_run:
        console.done(f"Next: ollama-forge validate-training-data {output}")
