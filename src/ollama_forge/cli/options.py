"""Options that several commands share, so that one word means one thing everywhere.

Each is a decorator; `modelfile_options` hands the command one `changes` value instead of a dozen arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.errors import UsageError

Command = Callable[..., Any]


def console_options(function: Command) -> Command:
    """`--json` and `-q/--quiet`; the command receives `console`."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="Only the result and warnings.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        return function(*args, console=Console(as_json=as_json, is_quiet=quiet), **kwargs)

    return wrapper


def store_option(function: Command) -> Command:
    """`--store DIR`: another Ollama models folder than OLLAMA_MODELS or the default one."""
    return click.option(
        "--store",
        "store_path",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Ollama's models folder (default: OLLAMA_MODELS, or where Ollama keeps it).",
    )(function)


def write_options(function: Command) -> Command:
    """`--force` and `--dry-run`, for everything that writes."""
    function = click.option("--dry-run", is_flag=True, help="Say what would be done, exactly; change nothing.")(
        function
    )
    return click.option("--force", is_flag=True, help="Replace what is already there under that name.")(function)


def threads_option(function: Command) -> Command:
    """`--threads N`."""
    return click.option(
        "--threads", "n_threads", type=click.IntRange(1, 512), metavar="N", help="Processor threads (default: all)."
    )(function)


def parse_assignments(values: tuple[str, ...], option: str) -> tuple[tuple[str, str], ...]:
    """`("a=1", "b=x=y")` -> `(("a", "1"), ("b", "x=y"))`.

    Raises:
        UsageError: an item without `=` or without a name.
    """
    pairs = []
    for value in values:
        name, sign, text = value.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"{option} {value!r} is not name=value", next=f"Example: {option} temperature=0.7")
        pairs.append((name.strip(), text))
    return tuple(pairs)
