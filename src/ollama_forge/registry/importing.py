"""What an inventory, or another registry, changes in this one. Pure: values in, `Imported` out.

A model is found again by its store and name as Ollama compares names, so that importing twice changes nothing; its
entry keeps its name, roles and marks. What Ollama no longer has is marked `absent`, never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.errors import NameInvalidError
from ollama_forge.registry.document import Document, Identity, RegistryEntry
from ollama_forge.registry.inventory import FoundModel, Inventory, Oddity
from ollama_forge.registry.naming import derive_variant, free_name
from ollama_forge.store.name import parse_name


@dataclass(frozen=True)
class Imported:
    """What an import changes: names of entries.

    Attributes:
        skipped: entries of another registry whose names are taken here.
    """

    document: Document
    origin: str
    store: str
    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    deprecated: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    n_unchanged: int = 0
    oddities: tuple[Oddity, ...] = ()


def plan_import(document: Document, inventory: Inventory, *, deprecate_placeholders: bool = False) -> Imported:
    """The registry after an import."""
    models = dict(document.models)
    by_id = _by_served_id(models)
    spellings = frozenset(found.served_model_id for found in inventory.models)
    added, updated, oddities, seen = [], [], list(inventory.oddities), set()
    n_unchanged = 0
    for found in inventory.models:
        entries = _entries_of(found, inventory, by_id.get(served_key(found.served_model_id), []), spellings)
        if len(entries) > 1:
            names = ", ".join(repr(entry.name) for entry in entries)
            oddities.append(Oddity("duplicate", found.served_model_id, f"several entries stand for it: {names}"))
        if not entries:
            wanted = derive_variant(found.served_model_id).name
            name = free_name(wanted, found.served_model_id, models)
            models[name] = update_entry(RegistryEntry(name=name), found, inventory)
            added.append(name)
            seen.add(name)
        for entry in entries:
            seen.add(entry.name)
            models[entry.name] = update_entry(entry, found, inventory)
            if models[entry.name] == entry:
                n_unchanged += 1
            else:
                updated.append(entry.name)
    absent = _mark_absent(models, inventory, seen) if inventory.is_whole else []
    deprecated = _deprecate_placeholders(models) if deprecate_placeholders else []
    return Imported(
        document.with_models(models),
        inventory.origin,
        inventory.store,
        tuple(sorted(added)),
        tuple(sorted(updated)),
        tuple(absent),
        tuple(deprecated),
        n_unchanged=n_unchanged,
        oddities=tuple(oddities),
    )


def plan_merge(document: Document, other: Document, source: str) -> Imported:
    """The registry with the entries and landings of another one; a name that is taken stays as it is here."""
    models, lineage = dict(document.models), document.lineage
    added = sorted(set(other.models) - set(models))
    models |= {name: other.models[name] for name in added}
    merged = document.with_models(models).model_copy(update={"lineage": lineage})
    for digest, landings in other.lineage.items():
        for landing in landings:
            merged = merged.with_landing(digest, landing)
    return Imported(
        merged,
        "json",
        source,
        added=tuple(added),
        skipped=tuple(name for name, entry in sorted(other.models.items()) if models[name] != entry),
        n_unchanged=sum(document.models.get(name) == entry for name, entry in other.models.items()),
    )


def served_key(served_model_id: str) -> str:
    """What two spellings of a model's name share: case and defaults do not count."""
    try:
        return "/".join(parse_name(served_model_id).folded)
    except NameInvalidError:
        return served_model_id.lower()


def update_entry(entry: RegistryEntry, found: FoundModel, inventory: Inventory) -> RegistryEntry:
    """An entry with what was found; what was known of the same bytes and is not known now is kept."""
    variant = derive_variant(found.served_model_id)
    is_same = _is_same(entry.identity, found)
    changes: dict[str, object] = {
        "display_name": entry.display_name or found.served_model_id,
        "backend": "ollama",
        "family": variant.family,
        "architecture": found.architecture or (entry.architecture if is_same else ""),
        "quantization": found.quantization or (entry.quantization if is_same else None) or variant.quantization,
        "parameter_size": found.parameter_size or (entry.parameter_size if is_same else ""),
        "download_format": found.format,
        "download_size_bytes": found.size_bytes if found.size_bytes is not None else entry.download_size_bytes,
        "served_model_id": found.served_model_id,
        "source_provider": "ollama",
        "presence": "present",
    }
    if found.capabilities is not None or not is_same:
        changes["capabilities"] = found.capabilities or ()
    knows_more = is_same and bool(entry.identity.blobs) and not found.identity.blobs
    if knows_more:
        changes["download_size_bytes"] = entry.download_size_bytes
    else:
        changes |= {"download_path": found.path, "store": inventory.store or entry.store}
        changes["identity"] = _merge_identity(entry.identity, found) if is_same else found.identity
    if not is_same and entry.identity.manifest_digest:
        changes["previous_digests"] = (*entry.previous_digests, entry.identity.manifest_digest)
    return entry.model_copy(update=changes)


def _merge_identity(known: Identity, found: FoundModel) -> Identity:
    return found.identity if found.identity.manifest_digest else known


def _is_same(known: Identity, found: FoundModel) -> bool:
    if not known.manifest_digest or not (found.identity.manifest_digest or found.short_id):
        return True  # nothing speaks against it
    if found.identity.manifest_digest:
        return known.manifest_digest == found.identity.manifest_digest
    return known.manifest_digest.removeprefix("sha256:").startswith(found.short_id)


def _by_served_id(models: dict[str, RegistryEntry]) -> dict[str, list[RegistryEntry]]:
    found: dict[str, list[RegistryEntry]] = {}
    for entry in models.values():
        if entry.backend == "ollama" and entry.served_model_id:
            found.setdefault(served_key(entry.served_model_id), []).append(entry)
    return found


def _entries_of(
    found: FoundModel, inventory: Inventory, named: list[RegistryEntry], spellings: frozenset[str]
) -> list[RegistryEntry]:
    """The entries that stand for a found model, of all that have its name in some spelling.

    Those of this store; else those whose store is not known; else those with the same content behind a server and in
    its folder. Two folders never share an entry. An entry that is spelled like another found model is that one's.
    """
    own = [e for e in named if e.served_model_id == found.served_model_id or e.served_model_id not in spellings]
    in_store = [entry for entry in own if inventory.store and entry.store == inventory.store]
    digest = found.identity.manifest_digest
    elsewhere = [
        entry
        for entry in own
        if not entry.store
        or not inventory.store
        or (entry.identity.manifest_digest == digest != "" and "://" in entry.store + inventory.store)
    ]
    candidates = in_store or elsewhere
    return [entry for entry in candidates if entry.served_model_id == found.served_model_id] or candidates


def _mark_absent(models: dict[str, RegistryEntry], inventory: Inventory, seen: set[str]) -> list[str]:
    unreadable = {served_key(name) for name in inventory.unreadable}
    absent = []
    for name, entry in sorted(models.items()):
        if name in seen or entry.backend != "ollama" or not entry.served_model_id:
            continue
        if entry.store not in ("", inventory.store):
            continue
        presence = "unknown" if served_key(entry.served_model_id) in unreadable else "absent"
        if entry.presence != presence:
            models[name] = entry.model_copy(update={"presence": presence})
            if presence == "absent":
                absent.append(name)
    return absent


def _deprecate_placeholders(models: dict[str, RegistryEntry]) -> list[str]:
    names = [name for name, entry in sorted(models.items()) if entry.is_placeholder and not entry.deprecated]
    for name in names:
        models[name] = models[name].model_copy(update={"deprecated": True})
    return names
