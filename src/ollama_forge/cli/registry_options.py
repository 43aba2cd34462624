"""What the registry's commands share: options, and how changes and oddities are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import Command

if TYPE_CHECKING:
    from ollama_forge.registry.document import Document
    from ollama_forge.registry.inventory import Oddity
    from ollama_forge.registry.lifecycle import Change

_SHOWN = 60


def registry_option(function: Command) -> Command:
    """`--registry PATH`."""
    return click.option(
        "--registry",
        "registry_path",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="PATH",
        help="The registry's file (default: OLLAMA_FORGE_REGISTRY, or model_registry.json in OLLAMA_FORGE_HOME).",
    )(function)


def dry_run_option(function: Command) -> Command:
    """`--dry-run`."""
    return click.option("--dry-run", is_flag=True, help="Say what would be done, exactly; change nothing.")(function)


def yes_option(function: Command) -> Command:
    """`--yes`, for what asks."""
    return click.option("-y", "--yes", "assume_yes", is_flag=True, help="Do not ask.")(function)


def show_oddities(console: Console, oddities: Iterable[Oddity]) -> None:
    """One warning for each."""
    for odd in oddities:
        console.warn(f"{odd.kind}: {odd.ref}: {odd.what}")


def run_change(
    console: Console,
    registry_path: Path | None,
    plan: Callable[[Document], Change],
    *,
    dry_run: bool,
    assume_yes: bool = True,
    verbose: bool = True,
) -> None:
    """Plan, ask when entries would go, do it under the lock, and say what was done; a dry run only plans."""
    from ollama_forge.registry.registry_file import find_registry, read_registry, update_registry

    path = find_registry(registry_path)
    change = plan(read_registry(path))
    if not dry_run and (change.rows or change.removed):
        if change.removed:
            question = f"Remove {len(change.removed)} entries from {path} ({', '.join(change.removed[:8])})?"
            console.confirm(question, assume_yes=assume_yes)
        made: list[Change] = []

        def apply(document: Document) -> Document:
            made[:] = [plan(document)]
            return made[0].document

        update_registry(path, apply)
        change = made[0]
    console.result(_document(change, path, dry_run), lambda: _show(console, change, path, dry_run, verbose))


def _document(change: Change, path: Path, dry_run: bool) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {}
    for row in change.rows:
        changes.setdefault(row.name, {})[row.field] = {"before": row.before, "after": row.after}
    return {"registry": str(path), "changed": changes, "removed": list(change.removed), "dry_run": dry_run}


def _show(console: Console, change: Change, path: Path, dry_run: bool, verbose: bool) -> None:
    if verbose:
        for row in change.rows:
            console.line(f"~ {row.name}  {row.field}: {_short(row.before)} -> {_short(row.after)}")
    for name in change.removed:
        console.line(f"- {name}")
    console.line(
        f"{len(change.names)} changed, {len(change.removed)} removed. "
        + ("Nothing was changed: this was a dry run." if dry_run else f"In {path}")
    )
    if change.removed and not dry_run:
        console.say("  the way back: ollama-forge registry undo")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
