"""`train-resolve-base`: the file behind a name, whether it can be trained, and where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.options import console_options, store_option

if TYPE_CHECKING:
    from ollama_forge.jobs.bases import ResolvedBase
    from ollama_forge.jobs.counterpart import Counterpart


@click.command(
    "train-resolve-base",
    epilog="Examples: ollama-forge train-resolve-base llama3.2"
    "   |   ollama-forge train-resolve-base ./model.gguf --json",
)
@click.argument("name")
@store_option
@console_options
def command(name: str, store_path: Path | None, console: Console) -> int:
    """The weights behind NAME (path, family, quantization), whether finetune can train them, and their origin.

    When NAME is not here, the command that gets it, and exit code 1. The origin on the Hugging Face Hub is told by
    evidence (keys of the file, dimensions, vocabulary, equal vectors of a cached repo) and is unknown without it.
    """
    from ollama_forge.jobs.bases import resolve_base

    base = resolve_base(name, store_path)
    console.result(base.document(), lambda: _show(console, base))
    return 0 if base.path is not None else 1


def _show(console: Console, base: ResolvedBase) -> None:
    if base.path is None:
        for reason in base.reasons:
            console.line(f"{base.name}: {reason}")
        console.line(f"  next: {base.command}")
        return
    console.line(str(base.path))
    facts = {
        "family": base.family or "unknown",
        "quantization": base.quantization,
        "parameters": human_count(base.parameters),
        "size": human_bytes(base.size_bytes),
        "trainable": "yes, on its packed blocks" if base.form == "gguf" else "yes",
    }
    if not base.is_trainable:
        facts["trainable"] = "no"
    for key, value in facts.items():
        console.line(f"  {key:<13} {value}")
    for reason in base.reasons:
        console.line(f"    {reason}")
    if base.counterpart is not None:
        _show_counterpart(console, base.counterpart)
    console.line(f"  next: {base.command}")


def _show_counterpart(console: Console, found: Counterpart) -> None:
    relation = f" ({found.relation.replace('_', ' ')})" if found.relation else ""
    console.line(f"  {'Hugging Face':<13} {found.repo}{relation}")
    for evidence in found.evidence:
        console.line(f"    {evidence}")
    if found.cached is not None:
        state = found.cached.document()
        whole = "complete" if state["complete"] else f"incomplete ({'; '.join(state['missing'])})"
        console.line(f"    in the cache, {whole}, {human_bytes(state['size'])}: {state['folder']}")
    elif found.relation:
        console.line("    not in the cache")
    for match in found.matches:
        if found.cached is None or match.model.folder != found.cached.folder:
            console.line(f"    {match.model.repo} in the cache: {match.evidence()}")
