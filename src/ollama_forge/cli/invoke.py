"""One command of ours run by another, as argument lists: what `start`, `auto` and `plan` have in common.

No shell is involved, and nothing but our own commands can be named.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Sequence
from typing import Any

import click

from ollama_forge.cli.console import Console


def find_command(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that words name, and the rest of the words: `["adapters", "recommend", ...]` too.

    Raises:
        click.UsageError: there is no such command.
    """
    from ollama_forge.cli import root

    context = click.Context(root, info_name="ollama-forge")
    found: click.Command = root
    rest = list(words)
    while isinstance(found, click.Group) and rest:
        _, command, rest = found.resolve_command(context, rest)
        assert command is not None
        context = click.Context(command, info_name=command.name, parent=context)
        found = command
    return found, rest


def run_words(words: Sequence[str]) -> None:
    """Run a command; its result goes where its own would."""
    from ollama_forge.cli import root

    code = root.main(args=list(words), prog_name="ollama-forge", standalone_mode=False)
    if isinstance(code, int) and code:
        click.get_current_context().exit(code)


def run_for_document(words: Sequence[str]) -> Any:
    """Run a command with `--json`, and give its document instead of printing it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run_words([*words, "--json"])
    return json.loads(out.getvalue())


def run_and_tell(console: Console, words: Sequence[str], extra: dict[str, Any]) -> None:
    """Run a command as a part of another: people see its own output, scripts its document with `extra` in it."""
    if console.as_json:
        console.result({**run_for_document(words), **extra})
        return
    console.say(f"→ {spoken(words)}")
    run_words([*words, *(["--quiet"] if console.is_quiet else [])])


def spoken(words: Sequence[str]) -> str:
    """A command as a person would type it."""
    return shlex.join(["ollama-forge", *words])
