"""What the commands about refusals share: where prompts come from, and one live line that says how far the work is."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import Command
from ollama_forge.errors import UsageError


@dataclass(frozen=True)
class PromptPaths:
    """Files and folders of prompts, and how many of each list are wanted (None: all)."""

    harmful: tuple[Path, ...] = ()
    harmless: tuple[Path, ...] = ()
    n_prompts: int | None = None


def prompt_options(function: Command) -> Command:
    """`--harmful`, `--harmless`, their folders, `--num-prompts`; the command receives `paths`, a `PromptPaths`."""
    path = click.Path(path_type=Path)
    declared = [
        click.option("--harmful", multiple=True, type=path, help="Prompts that it refuses: .txt or .jsonl."),
        click.option("--harmless", multiple=True, type=path, help="Prompts that it answers: .txt or .jsonl."),
        click.option("--harmful-dir", multiple=True, type=path, help="All .txt and .jsonl files of a folder."),
        click.option("--harmless-dir", multiple=True, type=path, help="All .txt and .jsonl files of a folder."),
        click.option(
            "--num-prompts", type=click.IntRange(2), metavar="N", help="Ask the first N of each list (default: all)."
        ),
    ]

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        harmful: tuple[Path, ...],
        harmless: tuple[Path, ...],
        harmful_dir: tuple[Path, ...],
        harmless_dir: tuple[Path, ...],
        num_prompts: int | None,
        **kwargs: Any,
    ) -> Any:
        paths = PromptPaths((*harmful, *harmful_dir), (*harmless, *harmless_dir), num_prompts)
        return function(*args, paths=paths, **kwargs)

    for option in reversed(declared):
        option(wrapper)
    return wrapper


def read_prompt_files(
    paths: PromptPaths, *, needs_harmless: bool = True, whole: bool = False
) -> tuple[list[str], list[str]]:
    """(harmful, harmless) prompts.

    Args:
        whole: all of them, however many are wanted for the judgement.

    Raises:
        UsageError: a list is missing.
        NotFoundError, DatasetError: a file is missing, empty, or holds something else.
    """
    from ollama_forge.dataset.prompts import read_prompts

    for option, given in (("--harmful", paths.harmful), ("--harmless", paths.harmless)):
        if not given and (needs_harmless or option == "--harmful"):
            raise UsageError(
                f"There is no {option}",
                why="This package has no lists of such prompts: bring your own, one prompt a line.",
                next="Example: --harmful harmful.txt --harmless harmless.txt",
            )
    harmful = read_prompts(paths.harmful)
    harmless = read_prompts(paths.harmless) if paths.harmless else []
    both = set(harmful) & set(harmless)
    if both:
        raise UsageError(
            f"{len(both)} prompts are in both lists, among them {min(both)[:60]!r}",
            why="A prompt is either one that the model refuses, or one that it answers.",
            next="Take them out of one of the files.",
        )
    count = None if whole else paths.n_prompts
    return harmful[:count], harmless[:count]


class StepLine:
    """One line on stderr, rewritten: what is done, and how much of it. Use it in a `with` block."""

    def __init__(self, console: Console) -> None:
        self._is_live = sys.stderr.isatty() and not (console.as_json or console.is_quiet)
        self._is_open = False

    def __enter__(self) -> StepLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            click.echo("", err=True)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._is_live:
            self._is_open = True
            click.echo(f"\r\033[K  {what}: {done}/{total}", nl=False, err=True)
