"""Is a store whole? Every manifest read, every blob measured and hashed; nothing is changed.

In: a store. Out: a `StoreReport` of frozen findings. Mending is left to the person: pull a model again, remove it, or
let Ollama's own clean-up take what nobody needs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import DigestError, ForgeError, ManifestError, StoreError
from ollama_forge.files import Advance, hash_file
from ollama_forge.store.catalog import Problem, Store
from ollama_forge.store.digest import Digest, find_mentions, parse_digest
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.manifest import MESSAGES, PARAMS, Layer
from ollama_forge.store.name import ModelName
from ollama_forge.store.stage import find_stages, is_stale, stage_homes


@dataclass(frozen=True)
class StoreReport:
    """What was found.

    Attributes:
        models: names whose manifests were read.
        problems: what makes a model wrong or unusable. Kinds: `manifest`, `name`, `dangling`, `config` (cannot be
            understood), `missing`, `size`, `content`, `unreadable` (a blob), `spelling` (a digest that Ollama's
            clean-up takes for unused), `texts` (params or messages that the server refuses), `case` (names that only
            differ in it).
        orphans: blobs that no manifest names; `orphan_bytes` together.
        leftovers: other files in `blobs/`: interrupted downloads and temporary files.
        stages: what killed commands of this tool left; the next one removes them.
        hashed_bytes: 0 in a quick look.
    """

    models: tuple[ModelName, ...]
    problems: tuple[Problem, ...]
    orphans: tuple[Path, ...]
    orphan_bytes: int
    leftovers: tuple[Path, ...]
    stages: tuple[Path, ...]
    n_blobs: int
    hashed_bytes: int

    @property
    def is_whole(self) -> bool:
        """Whether every model has all its bytes, unharmed."""
        return not self.problems


def verify_store(
    store: Store, names: Iterable[ModelName | str] = (), *, quick: bool = False, advance: Advance | None = None
) -> StoreReport:
    """Look at the whole store, or at some models.

    Args:
        names: only these models; orphans and leftovers are then not looked for.
        quick: measure the blobs without reading them.
        advance: told the bytes that were hashed.

    Raises:
        NotFoundError: a name that is not there.
        DiskError: the store may not be read.
    """
    chosen = [store.canonical(name) for name in names]
    models, problems = _read_models(store, chosen)
    layers = _layers_by_digest(models)
    hashed_bytes = 0
    for digest, users in sorted(layers.items()):
        found = list(_check_blob(store, digest, users, quick=quick, advance=advance))
        problems += found
        if not quick and not found:
            hashed_bytes += store.blobs.size_bytes(digest)
    for model in models:
        problems += _check_texts(store, model)
    if chosen:
        return StoreReport(tuple(chosen), tuple(problems), (), 0, (), (), len(layers), hashed_bytes)
    problems += _check_case(store)
    orphans = tuple(path for path in store.orphans() if _is_blob_name(path.name))
    return StoreReport(
        models=tuple(model.name for model in models),
        problems=tuple(problems),
        orphans=orphans,
        orphan_bytes=sum(_size(path) for path in orphans),
        leftovers=tuple(path for path in store.blob_files() if not _is_blob_name(path.name)),
        stages=tuple(stage for home in stage_homes(store.models_dir) for stage in find_stages(home) if is_stale(stage)),
        n_blobs=len(layers),
        hashed_bytes=hashed_bytes,
    )


def count_bytes(store: Store, names: Iterable[ModelName | str] = ()) -> int:
    """Bytes that `verify_store` will hash, for a progress bar."""
    models, _ = _read_models(store, [store.canonical(name) for name in names])
    return sum(_size(store.blobs.path(digest)) for digest in _layers_by_digest(models))


def _read_models(store: Store, chosen: list[ModelName]) -> tuple[list[InstalledModel], list[Problem]]:
    if not chosen:
        catalog = store.read_catalog()
        return list(catalog.models), list(catalog.problems)
    models, problems = [], []
    for name in chosen:
        try:
            models.append(store.find(name))
        except StoreError as exc:
            kind = "manifest" if isinstance(exc, ManifestError) else "config"
            problems.append(Problem(kind, store.manifest_path(name), exc.what))
    return models, problems


def _layers_by_digest(models: list[InstalledModel]) -> dict[Digest, list[tuple[ModelName, Layer]]]:
    layers: dict[Digest, list[tuple[ModelName, Layer]]] = {}
    for model in models:
        for layer in model.manifest.all_layers:
            layers.setdefault(layer.digest, []).append((model.name, layer))
    return layers


def _check_blob(
    store: Store, digest: Digest, users: list[tuple[ModelName, Layer]], *, quick: bool, advance: Advance | None
) -> Iterator[Problem]:
    path = store.blobs.path(digest)
    used_by = ", ".join(dict.fromkeys(name.display for name, _ in users))
    try:
        size_bytes = path.stat().st_size
    except FileNotFoundError:
        yield Problem("missing", path, f"not there, and needed by {used_by}")
        return
    except OSError as exc:
        yield Problem("unreadable", path, f"{os.strerror(exc.errno or 0)}, and needed by {used_by}")
        return
    claims = {layer.size_bytes for _, layer in users} - {size_bytes}
    if claims:
        told = ", ".join(f"{claim:,}" for claim in sorted(claims))
        yield Problem("size", path, f"{size_bytes:,} bytes, and the manifest of {used_by} says {told}")
    if quick:
        return
    try:
        actual = hash_file(path, advance).sha256
    except ForgeError as exc:
        yield Problem("unreadable", path, exc.what)
        return
    if actual != digest.hex:
        yield Problem("content", path, f"its bytes have the digest sha256:{actual}; {used_by} is damaged")


def _check_texts(store: Store, model: InstalledModel) -> Iterator[Problem]:
    path = store.manifest_path(model.name)
    raw = store.read_manifest_bytes(model.name) or b""
    misspelt = [digest for digest in sorted(find_mentions(raw)) if str(digest).encode() not in raw]
    for digest in misspelt:
        yield Problem("spelling", path, f"{digest} is not spelled in lower case with a colon: Ollama would delete it")
    if not all(store.blobs.has(layer.digest) for layer in model.manifest.of_type(PARAMS, MESSAGES)):
        return  # told already
    for read in ("parameters", "messages"):
        try:
            getattr(model, read)
        except ForgeError as exc:
            yield Problem("texts", path, exc.what)


def _check_case(store: Store) -> Iterator[Problem]:
    seen: dict[tuple[str, ...], ModelName] = {}
    for name in store.names():
        other = seen.setdefault(name.folded, name)
        if other is not name:
            yield Problem(
                "case", store.manifest_path(name), f"{name.display} and {other.display} are one name to Ollama"
            )


def _is_blob_name(filename: str) -> bool:
    try:
        return parse_digest(filename).blob_filename == filename
    except DigestError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
