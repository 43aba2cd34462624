"""`registry`: what happens to entries after their import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option
from ollama_forge.cli.registry_options import (
    dry_run_option,
    registry_option,
    run_change,
    show_oddities,
    yes_option,
)

if TYPE_CHECKING:
    from ollama_forge.registry.rehash import RehashReport


@click.command("deprecate", epilog="Example: ollama-forge registry deprecate llama2:7b")
@click.argument("refs", nargs=-1, required=True, metavar="NAME...")
@registry_option
@dry_run_option
@console_options
def deprecate(refs: tuple[str, ...], registry_path: Path | None, dry_run: bool, console: Console) -> None:
    """Mark models as no longer to be used: they leave the list, not the registry."""
    from ollama_forge.registry.lifecycle import deprecate as plan

    run_change(console, registry_path, lambda document: plan(document, refs), dry_run=dry_run)


@click.command("undeprecate", epilog="Example: ollama-forge registry undeprecate llama2:7b")
@click.argument("refs", nargs=-1, required=True, metavar="NAME...")
@registry_option
@dry_run_option
@console_options
def undeprecate(refs: tuple[str, ...], registry_path: Path | None, dry_run: bool, console: Console) -> None:
    """Take the mark away again."""
    from ollama_forge.registry.lifecycle import deprecate as plan

    run_change(console, registry_path, lambda document: plan(document, refs, is_deprecated=False), dry_run=dry_run)


@click.command("purge-deprecated", epilog="Example: ollama-forge registry purge-deprecated --placeholders-only")
@click.option("--placeholders-only", is_flag=True, help="Only legacy `model-ollama-gguf*` entries.")
@yes_option
@registry_option
@dry_run_option
@console_options
def purge_deprecated(
    placeholders_only: bool, assume_yes: bool, registry_path: Path | None, dry_run: bool, console: Console
) -> None:
    """Remove deprecated entries from the registry; models in Ollama stay. `registry undo` brings them back."""
    from ollama_forge.registry.lifecycle import plan_purge

    run_change(
        console,
        registry_path,
        lambda document: plan_purge(document, placeholders_only=placeholders_only),
        dry_run=dry_run,
        assume_yes=assume_yes,
    )


@click.command("backfill", epilog="Example: ollama-forge registry backfill --dry-run -v")
@click.option("-v", "--verbose", is_flag=True, help="Show every field that changes.")
@click.option("--location", default="local", show_default=True, metavar="L", help="Location of entries without one.")
@click.option("--set-format/--no-set-format", default=True, help="Set the format to gguf where it is missing.")
@store_option
@registry_option
@dry_run_option
@console_options
def backfill(
    verbose: bool,
    location: str,
    set_format: bool,
    store_path: Path | None,
    registry_path: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Give entries without a path the blob that their manifest names; no server is needed."""
    from ollama_forge.registry.lifecycle import plan_backfill
    from ollama_forge.store.catalog import open_store
    from ollama_forge.store.location import has_manifests

    store = open_store(store_path)
    known = store if has_manifests(store.models_dir) else None
    run_change(
        console,
        registry_path,
        lambda document: plan_backfill(document, known, location=location, sets_format=set_format),
        dry_run=dry_run,
        verbose=verbose,
    )


@click.command("normalize", epilog="Example: ollama-forge registry normalize --rebuild --apply")
@click.option("--apply", "applies", is_flag=True, help="Do it; without this it is a preview.")
@click.option("--rebuild", is_flag=True, help="Sizes, blobs, digests and capabilities too, from the store.")
@click.option("--prune-missing", is_flag=True, help="Remove entries whose files are known to be missing.")
@yes_option
@registry_option
@dry_run_option
@console_options
def normalize(
    applies: bool,
    rebuild: bool,
    prune_missing: bool,
    assume_yes: bool,
    registry_path: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Bring format, architecture and quantization in line with the headers of the files."""
    from ollama_forge.registry.lifecycle import plan_normalize

    run_change(
        console,
        registry_path,
        lambda document: plan_normalize(document, rebuild=rebuild, prune_missing=prune_missing),
        dry_run=dry_run or not applies,
        assume_yes=assume_yes,
    )


@click.command("verify", epilog="Example: ollama-forge registry verify llama3.2")
@click.argument("refs", nargs=-1, metavar="[NAME]...")
@click.option("--quick", is_flag=True, help="Measure the blobs, do not hash them.")
@registry_option
@console_options
def verify(refs: tuple[str, ...], quick: bool, registry_path: Path | None, console: Console) -> int:
    """Re-hash the blobs of models and compare them with what was recorded. Exit 1 if something differs."""
    from ollama_forge.registry.lifecycle import find_entries
    from ollama_forge.registry.registry_file import find_registry, read_registry
    from ollama_forge.registry.rehash import count_entry_bytes, rehash_entries

    document = read_registry(find_registry(registry_path))
    chosen = find_entries(document, refs) if refs else [document.models[name] for name in sorted(document.models)]
    entries = [entry for entry in chosen if refs or entry.presence != "absent"]
    with console.progress("Hashing", 0 if quick else count_entry_bytes(entries)) as advance:
        report = rehash_entries(entries, quick=quick, advance=advance)
    show_oddities(console, report.problems)
    console.result(_verify_document(report), lambda: _show_verify(console, report))
    return 1 if report.problems else 0


def _verify_document(report: RehashReport) -> dict[str, Any]:
    return {
        "whole": list(report.whole),
        "unknown": list(report.unknown),
        "problems": [{"kind": p.kind, "ref": p.ref, "what": p.what} for p in report.problems],
        "hashed_bytes": report.hashed_bytes,
    }


def _show_verify(console: Console, report: RehashReport) -> None:
    for name in report.unknown:
        console.line(f"? {name}: nothing is recorded that could be compared")
    console.line(
        f"{len(report.whole)} as recorded, {len(report.problems)} problems, {len(report.unknown)} unknown; "
        f"{human_bytes(report.hashed_bytes)} hashed"
    )


@click.group("role", epilog="Example: ollama-forge registry role add llama3.2 qwen3:8b caption")
def role() -> None:
    """What models are used for: words of your own."""


def _role_command(verb: str, words: str) -> click.Command:
    @click.command(verb, help=words, epilog=f"Example: ollama-forge registry role {verb} llama3.2 qwen3:8b caption")
    @click.argument("refs", nargs=-1, required=True, metavar="NAME...")
    @click.argument("role", metavar="ROLE")
    @registry_option
    @dry_run_option
    @console_options
    def run(refs: tuple[str, ...], role: str, registry_path: Path | None, dry_run: bool, console: Console) -> None:
        from ollama_forge.registry.lifecycle import change_roles

        run_change(console, registry_path, lambda document: change_roles(document, refs, role, verb), dry_run=dry_run)

    made: click.Command = run
    return made


role.add_command(_role_command("set", "Give models this role and no other."))
role.add_command(_role_command("add", "Give models this role too."))
role.add_command(_role_command("remove", "Take this role from models."))

COMMANDS = (deprecate, undeprecate, purge_deprecated, backfill, normalize, verify, role)
