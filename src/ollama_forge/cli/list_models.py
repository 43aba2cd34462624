"""`list`: the models of Ollama's store, read without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option

if TYPE_CHECKING:
    from ollama_forge.store.installed import InstalledModel


@click.command("list", epilog="Example: ollama-forge list --json")
@click.argument("prefix", required=False, default="")
@store_option
@console_options
def command(prefix: str, store_path: Path | None, console: Console) -> None:
    """Models in Ollama's store (those whose name begins with PREFIX), newest first."""
    from ollama_forge.store.catalog import open_store

    catalog = open_store(store_path).read_catalog()
    models = [model for model in catalog.models if model.name.display.lower().startswith(prefix.lower())]
    for problem in catalog.problems:
        console.warn(f"{problem.path}: {problem.what}")
    console.result(
        [_document(model) for model in models], lambda: _show(console, models, prefix if catalog.models else "")
    )


def _document(model: InstalledModel) -> dict[str, Any]:
    return {
        "name": model.name.display,
        "digest": model.digest,
        "size": model.size_bytes,
        "family": model.family,
        "parameters": model.parameter_size,
        "quantization": model.quantization,
        "context_length": model.context_length,
        "modified_at": model.modified_at.isoformat(),
        "blob": str(model.model_path) if model.model_path else None,
    }


def _show(console: Console, models: list[InstalledModel], prefix: str) -> None:
    if not models and prefix:
        console.line(f"No model here has a name that begins with {prefix!r}. All of them: ollama-forge list")
        return
    if not models:
        console.line("No models here yet. Get one: ollama-forge start   (or: ollama pull NAME)")
        return
    columns = ("NAME", "ID", "SIZE", "FAMILY", "PARAMETERS", "QUANT", "CONTEXT", "MODIFIED")
    rows = [
        (
            model.name.display,
            model.digest[:12],
            human_bytes(model.size_bytes),
            model.family or "-",
            model.parameter_size or "-",
            model.quantization or "-",
            str(model.context_length or "-"),
            model.modified_at.astimezone().strftime("%Y-%m-%d %H:%M"),
        )
        for model in models
    ]
    console.table(columns, rows, right=("SIZE", "PARAMETERS", "CONTEXT"))
