"""`check`: what is here, and the next step where something is missing."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, store_option

_SIGNS = {"ok": ("✓", "green"), "optional": ("·", "yellow"), "missing": ("✗", "red")}


@click.command("check", epilog="Example: ollama-forge check --json")
@store_option
@console_options
def command(store_path: Path | None, console: Console) -> int:
    """What is here: engine, store and its path, server and its version, extras, disk. Exit 1 if a need is missing."""
    from ollama_forge.jobs.environment import State, inspect_environment

    findings = inspect_environment(store_path)

    def show() -> None:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            sign, colour = _SIGNS[finding.state.value]
            console.line(f"{click.style(sign, fg=colour)} {finding.name:<{width}}  {finding.detail}")
            if finding.next:
                console.line(f"  {'':<{width}}  next: {finding.next}")

    missing = [finding.name for finding in findings if finding.state is State.MISSING]
    document = {
        "ok": not missing,
        "findings": [{"name": f.name, "state": f.state.value, "detail": f.detail, "next": f.next} for f in findings],
    }
    console.result(document, show)
    return 1 if missing else 0
