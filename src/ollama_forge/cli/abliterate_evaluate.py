"""`abliterate evaluate`: how often a model refuses, in full answers, and what that cost it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, store_option
from ollama_forge.cli.prompt_options import StepLine, prompt_options, read_prompt_files
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.cli.prompt_options import PromptPaths
    from ollama_forge.jobs.refusals import RefusalReport


@click.command(
    "evaluate",
    epilog="Example: ollama-forge abliterate evaluate my-model --harmful harmful.txt --harmless harmless.txt "
    "--against llama3.2 --html report.html",
)
@click.argument("ref", required=False)
@click.option("--checkpoint", "--model", "model", metavar="REF", help="The same as REF.")
@prompt_options
@click.option("--against", metavar="REF", help="What it was made from (default: the base in its record).")
@click.option("--no-against", is_flag=True, help="Do not look for what it was made from.")
@click.option("--markers", "--refusal-markers", type=click.Path(path_type=Path), help="Your own refusal markers.")
@click.option(
    "--max-tokens", "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of an answer."
)
@click.option("--raw", is_flag=True, help="Send prompts as they are, without the chat template.")
@click.option("--judge", metavar="NAME", help="A second model that reads the answers: here, or in a running Ollama.")
@click.option("--judge-host", metavar="URL", help="The Ollama that has the judge.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write all answers side by side to a page.")
@click.option("--force", is_flag=True, help="Replace the page when it is there.")
@store_option
@console_options
def command(
    ref: str | None,
    model: str | None,
    paths: PromptPaths,
    against: str | None,
    no_against: bool,
    html_path: Path | None,
    force: bool,
    store_path: Path | None,
    console: Console,
    **settings: Any,
) -> None:
    """Refusals, broken answers and damage of a model, as it ships: through the engine, in full answers, greedily.

    Refusals are found by phrases where refusals stand; empty, looping and garbled answers are counted apart. With
    --against: the same of what it was made from, and how far its harmless answers moved.
    """
    if (ref is None) == (model is None):
        raise UsageError(
            "evaluate needs one model",
            next="Example: ollama-forge abliterate evaluate my-model --harmful harmful.txt --harmless harmless.txt",
        )
    from ollama_forge.files import refuse_existing, write_bytes
    from ollama_forge.jobs.refusals import EvaluateOptions, evaluate_refusals

    harmful, harmless = read_prompt_files(paths, needs_harmless=False)
    if html_path:
        refuse_existing(html_path, overwrite=force)
    options = EvaluateOptions(find_parent=not no_against, store_path=store_path, progress=console.progress, **settings)
    with StepLine(console) as line:
        report = evaluate_refusals(ref or model or "", harmful, harmless, against, options, line)
    if html_path:
        from ollama_forge.jobs.refusal_page import render_report

        write_bytes(html_path, render_report(report).encode(), overwrite=force)
    for warning in report.warnings:
        console.warn(warning)
    console.result(report.document(), lambda: show_report(console, report))
    if html_path:
        console.done(f"All answers: {html_path}")


def show_report(console: Console, report: RefusalReport) -> None:
    """The numbers as tables."""
    from ollama_forge.jobs.refusal_page import rate_words
    from ollama_forge.jobs.refusals import HARMFUL, HARMLESS

    rows = []
    for side in (report.this, report.against):
        for part in (HARMFUL, HARMLESS):
            tally = side.tally(part) if side else None
            if side and tally and tally.n:
                opinion = side.opinions.get(part)
                judged = opinion.document()["refused"] if opinion else ""
                words = (rate_words(count, tally) for count in (tally.refused, tally.degenerate))
                rows.append([side.ref, part, *words, str(tally.answered), str(judged)])
    columns = ["model", "prompts", "refused", "broken", "answered"]
    if report.judge:
        columns.append("judge: refused")
    console.table(columns, [row[: len(columns)] for row in rows], right=columns[2:])
    shift = report.shift
    if shift and report.against:
        console.line()
        console.line(f"Harmless answers of {report.against.ref}: {shift.answers}, {shift.tokens} tokens")
        console.line(f"  KL, first token   {shift.first_kl:.5f} nats (largest {shift.first_kl_max:.4f})")
        console.line(f"  KL, all tokens    {shift.answer_kl:.5f} nats (99 % below {shift.answer_kl_p99:.4f})")
        console.line(f"  same top token    {shift.same_top:.2%}")
        before, now = shift.text_perplexity_against, shift.text_perplexity_this
        console.line(f"  perplexity        {shift.perplexity_against:.4f} -> {shift.perplexity_this:.4f}")
        console.line(f"  of a text         {before:.4f} -> {now:.4f}")
