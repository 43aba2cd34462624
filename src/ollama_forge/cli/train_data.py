"""`train-data`: a sample to begin with, and a look at what the data is like to one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, store_option
from ollama_forge.cli.validate_training_data import say_warnings

if TYPE_CHECKING:
    from ollama_forge.dataset.render import RenderedExample
    from ollama_forge.dataset.statistics import DatasetStatistics

_BAR_WIDTH = 40
_SAMPLE_TOKENS = 400


@click.group(
    "train-data",
    epilog="Examples: ollama-forge train-data init -o ./data   |   ollama-forge train-data stats DATA --base llama3.2",
)
def command() -> None:
    """Begin with a sample of training data, or look at what you have."""


@command.command("init", epilog="Example: ollama-forge train-data init -o ./data --template chat")
@click.option(
    "-o",
    "--out",
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="The folder to write to.",
)
@click.option("--template", type=click.Choice(["alpaca", "chat"]), default="alpaca", show_default=True)
@click.option("--dry-run", is_flag=True, help="Say what would be written; change nothing.")
@console_options
def init(folder: Path, template: str, dry_run: bool, console: Console) -> None:
    """Write README.md and sample.jsonl to a folder. Never overwrites."""
    from ollama_forge.dataset.starter import write_starter

    paths = write_starter(folder, template, dry_run=dry_run)
    document = {"written": [str(path) for path in paths], "dry_run": dry_run}
    console.result(document, lambda: _show_written(console, paths, dry_run))
    if not dry_run:
        console.done(f"Edit {paths[0]}. Next: ollama-forge validate-training-data {folder}")


@command.command(
    "stats", epilog="Example: ollama-forge train-data stats ./data --base llama3.2 --validation held.jsonl"
)
@click.argument("data", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DATA...")
@click.option("--base", "base_ref", required=True, metavar="REF", help="The model whose tokens are counted.")
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Where training would cut.")
@click.option("--validation", type=click.Path(path_type=Path, exists=True), help="Held-out data, to find leaks.")
@click.option(
    "--loss", "learn", type=click.Choice(["assistant", "last", "all"]), default="assistant", show_default=True
)
@click.option("--example", "example_number", type=click.IntRange(1), metavar="N", help="Show the Nth example.")
@click.option("--show-private", is_flag=True, help="List where private-looking strings stand (masked).")
@click.option("--include", multiple=True, metavar="GLOB", help="More files to take from a folder: '*.json', '*.csv'.")
@click.option("--skip-invalid", is_flag=True, help="Leave out lines that cannot be used, and count them.")
@click.option("--ignore-extra-keys", is_flag=True, help="Accept Alpaca records with keys that mean nothing here.")
@store_option
@console_options
def stats(
    data: tuple[Path, ...],
    base_ref: str,
    max_length: int,
    validation: Path | None,
    learn: str,
    example_number: int | None,
    show_private: bool,
    include: tuple[str, ...],
    skip_invalid: bool,
    ignore_extra_keys: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Lengths in a model's own tokens, what would be cut, duplicates, leaks, secrets, and one example with its mask."""
    from ollama_forge.dataset.chat_format import open_chat_format
    from ollama_forge.dataset.read import find_data_files
    from ollama_forge.dataset.render import RenderOptions
    from ollama_forge.dataset.statistics import measure_dataset
    from ollama_forge.dataset.validate import read_dataset
    from ollama_forge.jobs.resolve import resolve

    model = resolve(base_ref, store_path)
    path = model.gguf_path or model.folder
    assert path is not None
    files = find_data_files(data, include)
    with console.progress("Reading", sum(file.stat().st_size for file in files)) as advance:
        dataset = read_dataset(files, ignore_extra=ignore_extra_keys, skip_invalid=skip_invalid, advance=advance)
    held = read_dataset(find_data_files([validation], include), skip_invalid=skip_invalid) if validation else None
    chat_format = open_chat_format(path)
    console.say(f"Counting tokens as {base_ref} does ...")
    statistics = measure_dataset(
        dataset.examples,
        chat_format,
        max_length=max_length,
        options=RenderOptions(learn=learn),
        validation=held.examples if held else None,
        sample_index=None if example_number is None else example_number - 1,
    )
    tokens = chat_format.tokenizer.tokens
    say_warnings(console, dataset.warnings, dataset.ignored_columns, dataset.n_skipped)
    document = {
        **_document(statistics, max_length),
        "warnings": dict(dataset.warnings),
        "ignored_columns": list(dataset.ignored_columns),
        "skipped": dataset.n_skipped,
    }
    console.result(document, lambda: _show(console, statistics, max_length, tokens, show_private=show_private))


def _show_written(console: Console, paths: tuple[Path, ...], is_dry_run: bool) -> None:
    for path in paths:
        console.line(f"{'Would write' if is_dry_run else 'Wrote'} {path}")
    if is_dry_run:
        console.line("Nothing was changed.")


def _document(seen: DatasetStatistics, max_length: int) -> dict[str, Any]:
    return {
        "examples": seen.n_examples,
        "turns": seen.n_turns,
        "tokens": seen.n_tokens,
        "learnt_tokens": seen.n_learnt,
        "shortest": seen.shortest,
        "median": seen.median,
        "longest": seen.longest,
        "histogram": [{"low": item.low, "high": item.high, "count": item.count} for item in seen.histogram],
        "max_length": max_length,
        "truncated": seen.n_truncated,
        "lost": seen.n_lost,
        "duplicates": seen.n_duplicates,
        "duplicate_places": [[str(later), str(earlier)] for later, earlier in seen.duplicates],
        "contradictions": seen.n_contradictions,
        "short_answers": seen.n_short,
        "leaks": seen.n_leaks,
        "leak_places": [[str(held), str(trained)] for held, trained in seen.leaks],
        "private": dict(seen.private),
        "private_places": [
            {"place": str(place), "kind": item.kind, "text": item.masked} for place, item in seen.private_places
        ],
        "refused": seen.n_refused,
        "refusals": list(seen.refused),
        "notes": dict(seen.notes),
        "sample": None if seen.sample is None else _sample_document(seen.sample),
    }


def _sample_document(sample: RenderedExample) -> dict[str, Any]:
    return {
        "source": str(sample.source),
        "text": sample.text,
        "input_ids": list(sample.input_ids),
        "labels": list(sample.labels),
    }


def _show(
    console: Console, seen: DatasetStatistics, max_length: int, tokens: tuple[str, ...], *, show_private: bool
) -> None:
    from ollama_forge.dataset.render import NOTES

    share = seen.n_learnt / seen.n_tokens if seen.n_tokens else 0.0
    console.line(f"{seen.n_examples:,} examples, {seen.n_turns:,} turns, {seen.n_tokens:,} tokens")
    console.line(f"{seen.n_learnt:,} tokens are learnt ({share:.0%})")
    console.line(f"An example has {seen.shortest:,} to {seen.longest:,} tokens, the middle one {seen.median:,}")
    _show_histogram(console, seen)
    console.line()
    findings = (
        (seen.n_truncated, f"longer than {max_length:,} tokens: cut, or left out (--max-length)"),
        (seen.n_lost, f"without a learnt token in the first {max_length:,}: of no use"),
        (seen.n_duplicates, "duplicates of earlier examples" + _places(seen.duplicates)),
        (seen.n_contradictions, "ask what an earlier example asks, and answer otherwise"),
        (seen.n_short, "with an answer of one or two characters, or none"),
        (seen.n_leaks or 0, "validation examples that are trained on too" + _places(seen.leaks)),
        (seen.n_refused, "refused by the chat template"),
        *((count, NOTES[kind]) for kind, count in seen.notes.items()),
    )
    for count, words in findings:
        if count:
            console.line(f"{count:>8,}  {words}")
    for refusal in seen.refused:
        console.line(f"          {refusal}")
    if not any(count for count, _ in findings):
        console.line("No truncation, no duplicate, no empty answer" + ("" if seen.n_leaks is None else ", no leak"))
    _show_private(console, seen, in_places=show_private)
    if seen.sample:
        _show_sample(console, seen.sample, tokens)


def _places(pairs: tuple[tuple[object, object], ...]) -> str:
    return f" (first: {pairs[0][0]}, as {pairs[0][1]})" if pairs else ""


def _show_histogram(console: Console, seen: DatasetStatistics) -> None:
    most = max((item.count for item in seen.histogram), default=1)
    for item in seen.histogram:
        bar = "█" * max(1 if item.count else 0, round(_BAR_WIDTH * item.count / most))
        console.line(f"{item.low:>8,}-{item.high:<7,} {bar} {item.count:,}")


def _show_private(console: Console, seen: DatasetStatistics, *, in_places: bool) -> None:
    if not seen.private:
        return
    console.line()
    console.line("Looks private (a trained model repeats what it was shown, to anybody):")
    for kind, count in seen.private.items():
        console.line(f"{count:>8,}  {kind}")
    if not in_places:
        console.line("          --show-private lists the first places")
        return
    for place, item in seen.private_places:
        console.line(f"          {place}: {item.kind} {item.masked}")


def _show_sample(console: Console, sample: RenderedExample, tokens: tuple[str, ...]) -> None:
    """The example as the model sees it: what is learnt in green (between « and » where there is no colour)."""
    console.line()
    console.line(
        f"{sample.source} as the model reads it, {sample.n_learnt} of {len(sample.input_ids)} tokens learnt (« »):"
    )
    pieces: list[str] = []
    covered = 0
    is_learning = False
    for index, (start, end) in enumerate(sample.offsets[:_SAMPLE_TOKENS]):
        is_learnt = sample.labels[index] >= 0
        if is_learnt != is_learning:
            pieces.append("«" if is_learnt else "»")
            is_learning = is_learnt
        text = sample.text[max(start, covered) : end]
        covered = max(covered, end)
        if start == end and index in (0, len(sample.offsets) - 1):
            text = tokens[sample.input_ids[index]]
        pieces.append(click.style(text, fg="green", bold=True) if is_learnt else click.style(text, dim=True))
    if is_learning:
        pieces.append("»")
    if len(sample.offsets) > _SAMPLE_TOKENS:
        pieces.append(f" ... {len(sample.offsets) - _SAMPLE_TOKENS:,} more tokens")
    console.line("".join(pieces))
