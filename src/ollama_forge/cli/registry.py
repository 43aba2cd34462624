"""`registry`: every model known by what it is. Here: fill it, look at it, take the last version back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli import registry_bundle, registry_lifecycle, registry_lineage
from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option
from ollama_forge.cli.registry_options import dry_run_option, registry_option, show_oddities, yes_option

if TYPE_CHECKING:
    from ollama_forge.registry.document import Document, RegistryEntry
    from ollama_forge.registry.importing import Imported
    from ollama_forge.registry.inventory import Inventory


@click.group("registry", epilog="Start with: ollama-forge registry import")
def command() -> None:
    """Every model known by what it is, where it came from and what it is for; one JSON file.

    It lies in OLLAMA_FORGE_HOME (default: ~/.ollama-forge), or where OLLAMA_FORGE_REGISTRY or --registry says.
    """


@command.command(
    "import",
    epilog="Examples: ollama-forge registry import --dry-run   |   "
    "ollama-forge registry import --from-json configs/model_registry.json",
)
@click.option("--deprecate-placeholders", is_flag=True, help="Mark legacy `model-ollama-gguf*` entries as deprecated.")
@click.option(
    "--from-json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Add the entries of another registry file (of any version, its predecessor's list too).",
)
@click.option("--host", metavar="URL", help="Ask this running Ollama, not a store.")
@store_option
@registry_option
@dry_run_option
@console_options
def import_models(
    deprecate_placeholders: bool,
    json_path: Path | None,
    host: str | None,
    store_path: Path | None,
    registry_path: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Write down every model that Ollama has: from its store, else its server, else `ollama list`.

    Importing twice changes nothing. Models that are gone are marked, not dropped. No model is loaded.
    """
    from ollama_forge.registry.importing import plan_import, plan_merge
    from ollama_forge.registry.registry_file import find_registry, read_registry, update_registry

    path = find_registry(registry_path)
    plan: Callable[[Document], Imported]
    if json_path is not None:
        plan = functools.partial(plan_merge, other=read_other(json_path), source=str(json_path))
    else:
        inventory = _inventory(host, store_path)
        plan = functools.partial(plan_import, inventory=inventory, deprecate_placeholders=deprecate_placeholders)

    if dry_run:
        imported = plan(read_registry(path))
    else:
        done: list[Imported] = []

        def change(document: Document) -> Document:
            done[:] = [plan(document)]
            return done[0].document

        update_registry(path, change)
        imported = done[0]
    show_oddities(console, imported.oddities)
    console.result(_import_document(imported, path, dry_run), lambda: _show_import(console, imported, path, dry_run))


def read_other(json_path: Path) -> Document:
    """Another registry, of any version; unlike our own it must be there."""
    from ollama_forge.errors import NotFoundError
    from ollama_forge.registry.registry_file import read_registry

    if not json_path.exists():
        raise NotFoundError(f"There is no file {str(json_path)!r}", next="Check the path.")
    return read_registry(json_path)


def _inventory(host: str | None, store_path: Path | None) -> Inventory:
    from ollama_forge.registry.inventory import take_inventory

    if host is None:
        return take_inventory(store_path)
    from ollama_forge.store.server import OllamaServer

    with OllamaServer(host) as server:
        return take_inventory(server=server)


def _import_document(imported: Imported, path: Path, dry_run: bool) -> dict[str, Any]:
    return {
        "registry": str(path),
        "origin": imported.origin,
        "store": imported.store,
        "added": list(imported.added),
        "updated": list(imported.updated),
        "absent": list(imported.absent),
        "deprecated": list(imported.deprecated),
        "skipped": list(imported.skipped),
        "unchanged": imported.n_unchanged,
        "oddities": [{"kind": odd.kind, "ref": odd.ref, "what": odd.what} for odd in imported.oddities],
        "dry_run": dry_run,
    }


def _show_import(console: Console, imported: Imported, path: Path, dry_run: bool) -> None:
    marks = (("+", imported.added), ("~", imported.updated), ("gone", imported.absent), ("old", imported.deprecated))
    for mark, names in marks:
        for name in names:
            console.line(f"{mark:<5}{name}  {imported.document.models[name].served_model_id or ''}".rstrip())
    for name in imported.skipped:
        console.line(f"kept {name}: another entry of that name is here already")
    counts = (
        f"{len(imported.added)} added, {len(imported.updated)} updated, {imported.n_unchanged} unchanged, "
        f"{len(imported.absent)} gone"
    )
    console.line(f"{counts} (from {imported.origin}). " + ("Nothing was changed." if dry_run else f"In {path}"))


@command.command("list", epilog="Examples: ollama-forge registry list --details   |   ... --role caption --json")
@click.option("-d", "--details", is_flag=True, help="Also Ollama's name, digest, capabilities, roles, path.")
@click.option("--show-deprecated", is_flag=True, help="Also deprecated entries.")
@click.option("--include-logical", is_flag=True, help="Also entries that do not say where their bytes lie.")
@click.option("--role", metavar="ROLE", help="Only those that have this role.")
@click.option("--capability", metavar="WORD", help="Only those that can do this: completion, tools, vision ...")
@registry_option
@console_options
def list_entries(
    details: bool,
    show_deprecated: bool,
    include_logical: bool,
    role: str | None,
    capability: str | None,
    registry_path: Path | None,
    console: Console,
) -> None:
    """What the registry knows. INSTALLED says whether all of a model's blobs are there now."""
    from ollama_forge.registry.registry_file import find_registry, read_registry

    document = read_registry(find_registry(registry_path))
    entries = [
        entry
        for _, entry in sorted(document.models.items())
        if (show_deprecated or not entry.deprecated)
        and (include_logical or not entry.is_logical)
        and (role is None or role in entry.roles)
        and (capability is None or capability in entry.capabilities)
    ]
    hidden = len(document.models) - len(entries)
    console.result(
        [entry_document(entry) for entry in entries],
        lambda: _show_list(console, entries, details=details, hidden=hidden),
    )


def entry_document(entry: RegistryEntry) -> dict[str, Any]:
    """An entry as `--json` prints it: its fields, and what is true of it now."""
    from ollama_forge.registry.lifecycle import is_installed

    return {**entry.model_dump(mode="json"), "installed": is_installed(entry), "logical": entry.is_logical}


def _show_list(console: Console, entries: list[RegistryEntry], *, details: bool, hidden: int) -> None:
    from ollama_forge.registry.lifecycle import is_installed

    if not entries:
        words = "Nothing to show." if hidden else "The registry is empty."
        console.line(f"{words} Fill it: ollama-forge registry import")
    columns = ["NAME", "FAMILY", "QUANT", "SIZE", "INSTALLED", "ROLES"]
    columns += ["SERVED AS", "DIGEST", "CAPABILITIES", "PATH"] if details else []
    rows = []
    for entry in entries:
        marks = " (deprecated)" if entry.deprecated else ""
        size = human_bytes(entry.download_size_bytes) if entry.download_size_bytes is not None else "-"
        installed = {True: "yes", False: "no", None: "?"}[is_installed(entry)]
        roles, quant = ",".join(entry.roles) or "-", entry.quantization or "-"
        row = [entry.name + marks, entry.family or "-", quant, size, installed, roles]
        if details:
            digest = entry.identity.manifest_digest.removeprefix("sha256:")[:12] or "-"
            can = ",".join(entry.capabilities) or "-"
            row += [entry.served_model_id or "-", digest, can, entry.download_path or "-"]
        rows.append(row)
    if rows:
        console.table(columns, rows, right=("SIZE",))
    if hidden:
        console.say(f"{hidden} more are not shown (--show-deprecated, --include-logical).")


@command.command("show", epilog="Example: ollama-forge registry show llama3.2")
@click.argument("ref")
@registry_option
@console_options
def show_entry(ref: str, registry_path: Path | None, console: Console) -> None:
    """All that is known of one model: REF is its name here, its name in Ollama, or the start of its digest."""
    from ollama_forge.registry.lifecycle import find_entries
    from ollama_forge.registry.registry_file import find_registry, read_registry

    document = read_registry(find_registry(registry_path))
    entry = find_entries(document, [ref])[0]
    landings = document.lineage.get(entry.identity.manifest_digest, ())
    told = {**entry_document(entry), "lineage": [landing.model_dump(mode="json") for landing in landings]}
    console.result(told, lambda: _show_entry(console, told))


def _show_entry(console: Console, told: dict[str, Any]) -> None:
    identity = told.pop("identity")
    facts = {**told, "manifest_digest": identity["manifest_digest"], "metadata_hash": identity["metadata_hash"]}
    landings = facts.pop("lineage")
    width = max(map(len, facts))
    for key, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        console.line(f"{key:<{width}}  {'-' if text in (None, '', {}) else text}")
    if identity["blobs"]:
        console.line()
        rows = [(blob["kind"], blob["digest"], human_bytes(blob["size_bytes"])) for blob in identity["blobs"]]
        console.table(("BLOB", "DIGEST", "SIZE"), rows, right=("SIZE",))
    for landing in landings:
        console.line()
        console.line(f"made by {landing['step']} at {landing['landed_at'] or '?'}: ollama-forge registry lineage ...")


@command.command("undo", epilog="Example: ollama-forge registry undo")
@yes_option
@registry_option
@dry_run_option
@console_options
def undo(assume_yes: bool, registry_path: Path | None, dry_run: bool, console: Console) -> None:
    """Take the registry's last version back; a second time brings the present one again."""
    from ollama_forge.registry.lifecycle import compare_documents
    from ollama_forge.registry.registry_file import backup_path, find_registry, restore_backup

    path = find_registry(registry_path)
    if dry_run:
        before, after = _readable(path), read_other(backup_path(path))
    else:
        console.confirm(f"Replace {path} by its last version?", assume_yes=assume_yes)
        after = restore_backup(path)
        before = _readable(backup_path(path))
    returned, gone = sorted(set(after.models) - set(before.models)), sorted(set(before.models) - set(after.models))
    changed = sorted({row.name for row in compare_documents(before, after)})
    document = {"registry": str(path), "returned": returned, "gone": gone, "changed": changed, "dry_run": dry_run}

    def human() -> None:
        for mark, names in (("+", returned), ("-", gone), ("~", changed)):
            for name in names:
                console.line(f"{mark} {name}")
        console.line("Nothing was changed." if dry_run else f"{path} is as it was before its last change.")

    console.result(document, human)


def _readable(path: Path) -> Document:
    """The registry, or an empty one where it is broken: that is what undo is for."""
    from ollama_forge.errors import RegistryError
    from ollama_forge.registry.document import Document
    from ollama_forge.registry.registry_file import read_registry

    try:
        return read_registry(path)
    except RegistryError:
        return Document()


for _subcommand in (*registry_lifecycle.COMMANDS, *registry_lineage.COMMANDS, *registry_bundle.COMMANDS):
    command.add_command(_subcommand)
