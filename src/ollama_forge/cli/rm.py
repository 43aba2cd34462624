"""`rm`: take a model out of Ollama's store; no server and no Ollama needed."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option


@click.command("rm", epilog="Example: ollama-forge rm my-model --dry-run")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Say what would be done, exactly; change nothing.")
@store_option
@console_options
def command(name: str, dry_run: bool, store_path: Path | None, console: Console) -> None:
    """Remove a model, and the blobs that it alone uses, as `ollama rm` does."""
    from ollama_forge.store.catalog import open_store
    from ollama_forge.store.discard import plan_removal, remove_model

    store = open_store(store_path)
    removed = plan_removal(store, name) if dry_run else remove_model(store, name)
    freed = removed.discarded
    for warning in freed.warnings:
        console.warn(warning)
    document = {
        "name": removed.name.display,
        "store": str(store.models_dir),
        "removed_blobs": [str(digest) for digest in freed.removed],
        "kept_blobs": [str(digest) for digest in freed.kept],
        "freed_bytes": freed.freed_bytes,
        "dry_run": dry_run,
    }
    words = "would be removed from" if dry_run else "is removed from"
    tail = " Nothing was changed." if dry_run else ""
    console.result(
        document,
        lambda: console.line(
            f"{removed.name.display} {words} {store.models_dir}: {human_bytes(freed.freed_bytes)} freed, "
            f"{len(freed.kept)} blobs stay for other models.{tail}"
        ),
    )
