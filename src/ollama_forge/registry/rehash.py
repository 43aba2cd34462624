"""Are the models still what the registry says? Manifests compared, blobs measured and hashed; nothing is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import DigestError, ForgeError
from ollama_forge.files import Advance, hash_file
from ollama_forge.registry.document import RegistryEntry
from ollama_forge.registry.inventory import Oddity
from ollama_forge.registry.lifecycle import store_folder
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import digest_of, parse_digest


@dataclass(frozen=True)
class RehashReport:
    """What was found.

    Attributes:
        whole: entries whose every byte is as recorded.
        unknown: entries of which no digest is recorded, or whose store is not here.
        problems: kinds `manifest` (another one has the name), `missing`, `size`, `content`, `digest` (it is none).
    """

    whole: tuple[str, ...]
    unknown: tuple[str, ...]
    problems: tuple[Oddity, ...]
    hashed_bytes: int


def count_entry_bytes(entries: Sequence[RegistryEntry]) -> int:
    """Bytes that `rehash_entries` will read, at most; for a progress bar."""
    return sum({blob.digest: blob.size_bytes for entry in entries for blob in entry.identity.blobs}.values())


def rehash_entries(
    entries: Sequence[RegistryEntry], *, quick: bool = False, advance: Advance | None = None
) -> RehashReport:
    """Compare each entry with its store; a blob that several share is read once.

    Args:
        quick: measure the blobs, do not read them.
    """
    whole, unknown, problems = [], [], []
    verdicts: dict[tuple[Path, str], Oddity | None] = {}
    hashed_bytes = 0
    for entry in entries:
        folder = store_folder(entry)
        if folder is None or not entry.identity.manifest_digest:
            unknown.append(entry.name)
            continue
        found = _check_manifest(Store(folder), entry)
        for blob in entry.identity.blobs:
            key = (folder, blob.digest)
            if key not in verdicts:
                verdicts[key], read_bytes = _check_blob(Store(folder), blob.digest, blob.size_bytes, quick, advance)
                hashed_bytes += read_bytes
            verdict = verdicts[key]
            if verdict is not None:
                found.append(verdict)
        if found:
            problems += found
        else:
            whole.append(entry.name)
    return RehashReport(tuple(whole), tuple(unknown), tuple(dict.fromkeys(problems)), hashed_bytes)


def _check_manifest(store: Store, entry: RegistryEntry) -> list[Oddity]:
    served = entry.served_model_id or entry.name
    try:
        raw = store.read_manifest_bytes(store.canonical(served))
    except ForgeError as exc:
        return [Oddity("manifest", entry.name, exc.what)]
    if raw is None:
        return [Oddity("missing", entry.name, f"{served} is no longer in the store")]
    actual = str(digest_of(raw))
    if actual != entry.identity.manifest_digest:
        return [Oddity("manifest", entry.name, f"{served} is another model now: its manifest has the digest {actual}")]
    return []


def _check_blob(
    store: Store, text: str, size_bytes: int, quick: bool, advance: Advance | None
) -> tuple[Oddity | None, int]:
    try:
        digest = parse_digest(text)
    except DigestError as exc:
        return Oddity("digest", text, exc.what), 0
    path = store.blobs.path(digest)
    if not path.is_file():
        return Oddity("missing", str(path), "the blob is not there"), 0
    actual_bytes = path.stat().st_size
    if actual_bytes != size_bytes:
        return Oddity("size", str(path), f"{actual_bytes:,} bytes, and the registry says {size_bytes:,}"), 0
    if quick:
        return None, 0
    actual = hash_file(path, advance).sha256
    if actual != digest.hex:
        return Oddity("content", str(path), f"its bytes have the digest sha256:{actual}"), actual_bytes
    return None, actual_bytes
