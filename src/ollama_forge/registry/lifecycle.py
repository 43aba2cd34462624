"""What happens to entries after their import: marked, purged, given roles, completed, brought in line with the files.

Each function takes a document and gives a `Change`; none writes. `Change.rows` says field by field what is different,
so that a dry run shows exactly what the real one does.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, NotFoundError, UsageError
from ollama_forge.registry.document import Document, RegistryEntry
from ollama_forge.registry.facts import read_weight_facts
from ollama_forge.registry.importing import served_key, update_entry
from ollama_forge.registry.inventory import UNKNOWN_STORE, Inventory, find_installed
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import parse_digest

ROLE_VERBS = ("set", "add", "remove")
_MIN_DIGEST_DIGITS = 6


@dataclass(frozen=True)
class FieldChange:
    """One field of one entry, before and after, as JSON values."""

    name: str
    field: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Change:
    """A registry that differs from another. `removed` are entries that it no longer has."""

    document: Document
    rows: tuple[FieldChange, ...]
    removed: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The entries that changed, sorted."""
        return tuple(sorted({row.name for row in self.rows}))


def find_entries(document: Document, refs: Sequence[str]) -> list[RegistryEntry]:
    """The entries that are meant: by their own name, else by Ollama's name, else by the start of their digest.

    Raises:
        NotFoundError: there is none, with names that are alike.
        UsageError: a digest that several have.
    """
    return [_find_entry(document, ref) for ref in dict.fromkeys(refs)]


def deprecate(document: Document, refs: Sequence[str], *, is_deprecated: bool = True) -> Change:
    """Mark entries as no longer to be used, or take the mark away; nothing is removed."""
    return _edit(document, find_entries(document, refs), lambda _: {"deprecated": is_deprecated})


def change_roles(document: Document, refs: Sequence[str], role: str, verb: str) -> Change:
    """Give entries a role (`set`: this one only; `add`: this one too) or take it from them (`remove`)."""
    if verb not in ROLE_VERBS or not role.strip():
        raise UsageError(
            f"{role!r} is not a role, or {verb!r} is not one of {', '.join(ROLE_VERBS)}",
            next="Example: ollama-forge registry role add llama3.2 caption",
        )

    def roles(entry: RegistryEntry) -> dict[str, Any]:
        kept = () if verb == "set" else tuple(one for one in entry.roles if one != role)
        return {"roles": kept if verb == "remove" else tuple(sorted({*kept, role}))}

    return _edit(document, find_entries(document, refs), roles)


def plan_purge(document: Document, *, placeholders_only: bool = False) -> Change:
    """Without the deprecated entries (only the placeholders among them); models in Ollama stay as they are."""
    gone = [e for e in document.models.values() if e.deprecated and (e.is_placeholder or not placeholders_only)]
    return _without(document, gone)


def plan_backfill(document: Document, store: Store | None, *, location: str, sets_format: bool = True) -> Change:
    """Entries that do not say where their bytes lie get the blob that their manifest names.

    Without a store, or where it does not have the model, the path is `ollama://<name>`. Sizes and digests are left to
    `plan_normalize`.
    """

    def fill(entry: RegistryEntry) -> dict[str, Any]:
        served = entry.served_model_id or entry.name
        changes: dict[str, Any] = {"download_path": UNKNOWN_STORE + served}
        path = _blob_path(store, served)
        if store is not None and path is not None:
            changes |= {"download_path": str(path), "store": str(store.models_dir)}
        if not entry.download_location:
            changes["download_location"] = location
        if sets_format and not entry.download_format:
            changes["download_format"] = "gguf"
        return changes if path is not None or not entry.download_path else {}

    chosen = [
        entry
        for entry in document.models.values()
        if entry.backend == "ollama" and (not entry.download_path or entry.download_path.startswith(UNKNOWN_STORE))
    ]
    return _edit(document, chosen, fill)


def plan_normalize(document: Document, *, rebuild: bool = False, prune_missing: bool = False) -> Change:
    """Entries as the headers of their files say.

    Args:
        rebuild: sizes, blobs, digests and capabilities too, from the store.
        prune_missing: entries whose files are known to be missing go; those of which nothing is known stay.
    """
    change = _edit(document, list(document.models.values()), _rebuilt if rebuild else _from_header)
    if not prune_missing:
        return change
    gone = [entry for entry in change.document.models.values() if is_installed(entry) is False]
    pruned = _without(change.document, gone)
    rows = tuple(row for row in change.rows if row.name not in pruned.removed)
    return Change(pruned.document, rows, pruned.removed)


def is_installed(entry: RegistryEntry) -> bool | None:
    """Whether all of its bytes are there; None where that cannot be known from here (another machine, no path)."""
    if entry.presence == "absent":
        return False
    folder = store_folder(entry)
    if folder is not None and entry.identity.blobs:
        blobs_dir = folder / "blobs"
        digests = {blob.digest for blob in entry.identity.blobs}
        return all((blobs_dir / parse_digest(digest).blob_filename).is_file() for digest in digests)
    if entry.is_logical or "://" in str(entry.download_path):
        return None
    return Path(str(entry.download_path)).exists()


def store_folder(entry: RegistryEntry) -> Path | None:
    """The models folder that has it; None for a server or where it is not known."""
    return Path(entry.store) if entry.store and "://" not in entry.store else None


def compare_documents(before: Document, after: Document) -> tuple[FieldChange, ...]:
    """Every field that differs in the entries that both have, in the order of their names."""
    rows = []
    for name in sorted(set(before.models) & set(after.models)):
        if before.models[name] is not after.models[name]:
            rows += compare_entries(before.models[name], after.models[name])
    return tuple(rows)


def compare_entries(before: RegistryEntry, after: RegistryEntry) -> list[FieldChange]:
    """Every field in which two entries differ; the first one's name stands for both."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return [
        FieldChange(before.name, field, old.get(field), new.get(field))
        for field in sorted({*old, *new})
        if old.get(field) != new.get(field)
    ]


def _find_entry(document: Document, ref: str) -> RegistryEntry:
    if ref in document.models:
        return document.models[ref]
    key = served_key(ref)
    served = [
        e for _, e in sorted(document.models.items()) if e.served_model_id and served_key(e.served_model_id) == key
    ]
    exact = [entry for entry in served if entry.served_model_id == ref]
    if exact or served:
        return sorted(exact or served, key=lambda entry: entry.presence != "present")[0]
    digits = ref.lower().removeprefix("sha256:")
    if len(digits) >= _MIN_DIGEST_DIGITS:
        prefix = f"sha256:{digits}"
        same = [e for _, e in sorted(document.models.items()) if e.identity.manifest_digest.startswith(prefix)]
        if len({entry.identity.manifest_digest for entry in same}) > 1:
            names = ", ".join(repr(entry.name) for entry in same[:5])
            raise UsageError(
                f"Several entries have a digest that begins with {ref!r}", why=names, next="Type more of it."
            )
        if same:
            return same[0]
    spoken = [*document.models, *(e.served_model_id for e in document.models.values() if e.served_model_id)]
    alike = difflib.get_close_matches(ref, spoken, 3, 0.5)
    raise NotFoundError(
        f"The registry has no model {ref!r}",
        why=f"Alike: {', '.join(alike)}" if alike else "",
        next="See what it has: ollama-forge registry list; or fill it: ollama-forge registry import",
    )


def _edit(document: Document, entries: list[RegistryEntry], edit: Callable[[RegistryEntry], dict[str, Any]]) -> Change:
    models = dict(document.models)
    for entry in entries:
        if changes := edit(entry):
            models[entry.name] = entry.model_copy(update=changes)
    after = document.with_models(models)
    return Change(after, compare_documents(document, after))


def _without(document: Document, gone: list[RegistryEntry]) -> Change:
    names = {entry.name for entry in gone}
    models = {name: entry for name, entry in document.models.items() if name not in names}
    return Change(document.with_models(models), (), tuple(sorted(names)))


def _blob_path(store: Store | None, served: str) -> Path | None:
    if store is None:
        return None
    try:
        return store.find(served).model_path
    except ForgeError:
        return None


def _from_header(entry: RegistryEntry) -> dict[str, Any]:
    path = entry.download_path
    if not path or "://" in path or not Path(path).is_file():
        return {}
    facts = read_weight_facts(Path(path))
    changes: dict[str, Any] = {}
    if facts.architecture:
        changes |= {"architecture": facts.architecture, "download_format": "gguf"}
    if facts.quantization:
        changes["quantization"] = facts.quantization
    return changes


def _rebuilt(entry: RegistryEntry) -> dict[str, Any]:
    folder = store_folder(entry)
    if folder is None or entry.backend != "ollama" or not entry.served_model_id:
        return _from_header(entry)
    store = Store(folder)
    try:
        found = find_installed(store, store.find(entry.served_model_id))
    except ForgeError:
        return _from_header(entry)
    rebuilt = update_entry(entry, found, Inventory("store", entry.store, ()))
    return {field: getattr(rebuilt, field) for field in RegistryEntry.model_fields}
