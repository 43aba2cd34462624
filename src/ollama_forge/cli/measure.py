"""`measure`: two models and a text in, what lies between them out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, store_option

if TYPE_CHECKING:
    from ollama_forge.jobs.measure import Measurement

_SHOWN_PLACES = 5
_SHOWN_BEFORE = 60


@click.command(
    "measure",
    epilog="Examples: ollama-forge measure my-model --against llama3.2"
    "   |   ollama-forge measure ./small.gguf --against ./model-f16.gguf --text book.txt --html report.html",
)
@click.argument("ref")
@click.option("--against", required=True, metavar="REF", help="What it was made from, or should be like.")
@click.option("--text", type=click.Path(path_type=Path), help="A UTF-8 text to read (default: one of this package).")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Prompts (.txt, one a line) or conversations (.jsonl)."
)
@click.option("--context", type=click.IntRange(4), metavar="N", help="Tokens of a window (default: 512).")
@click.option("--exact", is_flag=True, help="Without llama.cpp's rounding of what the weights are multiplied with.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write a page with plots.")
@click.option("--force", is_flag=True, help="Replace the page if it is there.")
@store_option
@console_options
def command(
    ref: str,
    against: str,
    text: Path | None,
    prompts: Path | None,
    context: int | None,
    exact: bool,
    device: str,
    html_path: Path | None,
    force: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """What a step cost: perplexity, KL divergence and same-top rate of one model beside another.

    REF may carry adapters: REF+ADAPTER. Weights stay packed on both sides.
    """
    from ollama_forge.files import refuse_existing
    from ollama_forge.jobs.measure import MeasureRequest, measure
    from ollama_forge.jobs.measure_models import require_matplotlib

    if html_path is not None:
        require_matplotlib()
        refuse_existing(html_path, overwrite=force)
    request = MeasureRequest(text, prompts, context, exact, device)
    measured = measure(ref, against, request, store_path=store_path, progress=console.progress)
    if html_path is not None:
        from ollama_forge.jobs.measure_view import write_measure_page

        write_measure_page(measured, html_path, overwrite=force)
    for warning in measured.warnings:
        console.warn(warning)
    document = {**measured.document(), "html": str(html_path) if html_path else None}
    console.result(document, lambda: show_measurement(console, measured))
    if html_path is not None:
        console.done(f"The page is {html_path}")


def show_measurement(console: Console, measured: Measurement) -> None:
    """The numbers, by place, and the worst places, for people."""
    from ollama_forge.jobs.measure_view import POSITION_HEAD, expected, measured_facts, position_rows

    facts = measured_facts(measured)
    width = max(map(len, facts))
    for name, value in facts.items():
        console.line(f"{name.ljust(width)}  {value}")
    console.line()
    console.table(POSITION_HEAD, position_rows(measured), right=POSITION_HEAD[1:])
    if measured.comparison.kl.max > 0:
        console.line()
        console.line("Where they differ most:")
    for place in measured.places[:_SHOWN_PLACES]:
        if place.kl > 0:
            before = " ".join(place.before.split())[-_SHOWN_BEFORE:]
            console.line(f"  KL {place.kl:.4f}  ...{before} [{place.token!r}]")
            console.line(f"      against: {expected(place.against)}")
            console.line(f"      this:    {expected(place.this)}")
