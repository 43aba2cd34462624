"""`registry`: a model with its history as one folder, for another machine."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, write_options
from ollama_forge.cli.registry_options import dry_run_option, registry_option


@click.command("export", epilog="Example: ollama-forge registry export my-model -o ./my-model-bundle")
@click.argument("ref")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@registry_option
@dry_run_option
@console_options
def export(ref: str, output: Path, registry_path: Path | None, dry_run: bool, console: Console) -> None:
    """Write REF into one folder: its blobs, hashed on the way, manifest, Modelfile and history."""
    from ollama_forge.registry.bundle import find_bundled, write_bundle
    from ollama_forge.registry.lifecycle import find_entries
    from ollama_forge.registry.registry_file import find_registry, read_registry

    document = read_registry(find_registry(registry_path))
    entry = find_entries(document, [ref])[0]
    model = find_bundled(entry)
    if not dry_run:
        with console.progress(f"Exporting {ref}", model.size_bytes) as advance:
            write_bundle(document, entry, model, output, advance)
    told = {
        "name": model.name.display,
        "digest": model.digest,
        "folder": str(output),
        "size": model.size_bytes,
        "dry_run": dry_run,
    }
    verb = "Would write" if dry_run else "Written:"
    console.result(
        told, lambda: console.line(f"{verb} {output}, {human_bytes(model.size_bytes)}, {model.name.display}")
    )


@click.command("import-bundle", epilog="Example: ollama-forge registry import-bundle ./my-model-bundle")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--name", help="Another name in Ollama than it had.")
@store_option
@registry_option
@write_options
@console_options
def import_bundle(
    folder: Path,
    name: str | None,
    store_path: Path | None,
    registry_path: Path | None,
    force: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Take a bundle into Ollama's store and the registry; every byte is verified first."""
    from ollama_forge.registry.bundle import land_bundle, read_bundle, require_landable, with_bundle
    from ollama_forge.registry.registry_file import find_registry, update_registry
    from ollama_forge.store.catalog import open_store

    bundle, store = read_bundle(folder), open_store(store_path)
    wanted = require_landable(bundle, store, name, overwrite=force)
    if not dry_run:
        with console.progress(f"Verifying {wanted.display}", bundle.size_bytes) as advance:
            land_bundle(bundle, store, wanted, overwrite=force, advance=advance)
        update_registry(find_registry(registry_path), lambda document: with_bundle(document, bundle, store, wanted))
    told = {
        "name": wanted.display,
        "digest": bundle.digest.removeprefix("sha256:"),
        "store": str(store.models_dir),
        "size": bundle.size_bytes,
        "dry_run": dry_run,
    }
    words = "would land" if dry_run else "landed"
    console.result(told, lambda: console.line(f"{wanted.display} {words} in {store.models_dir}, same digest as before"))


COMMANDS: tuple[click.Command, ...] = (export, import_bundle)
