"""`--measure` at the end of a command that makes a model: the result beside its source, in a few lines."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import Command
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.measure import Measurement


def measure_options(function: Command) -> Command:
    """`--measure` and `--measure-text`; the command receives `measuring`, a `MeasureRequest` or None."""

    @click.option("--measure", "wants_measure", is_flag=True, help="Then say what it cost: perplexity, KL divergence.")
    @click.option(
        "--measure-text", type=click.Path(path_type=Path), metavar="FILE", help="On this text, not the package's own."
    )
    @functools.wraps(function)
    def wrapper(*args: Any, wants_measure: bool, measure_text: Path | None, **kwargs: Any) -> Any:
        if not wants_measure:
            if measure_text is not None:
                raise UsageError("--measure-text goes with --measure", next="Add --measure.")
            return function(*args, measuring=None, **kwargs)
        from ollama_forge.jobs.measure import MeasureRequest
        from ollama_forge.jobs.measure_run import takes_engine

        takes_engine()
        if measure_text is not None and not measure_text.is_file():
            raise UsageError(f"There is no text {str(measure_text)!r}", next="Check the path behind --measure-text.")
        return function(*args, measuring=MeasureRequest(text=measure_text), **kwargs)

    return wrapper


def show_cost(console: Console, measured: Measurement) -> None:
    """Three lines for people."""
    from ollama_forge.jobs.measure_view import measured_facts

    facts = measured_facts(measured)
    console.line(f"perplexity      {facts['perplexity']}, {facts['change']}")
    console.line(f"KL divergence   mean {facts['KL mean']}, 99 % {facts['KL 99 %']}, max {facts['KL max']}")
    console.line(f"same top token  {facts['same top token']}")
