"""Taking away: blobs that nobody names, whole models, and copies of models under another name.

In: a store and digests or a name. Out: what was freed. Ollama has no lock, and its server and our other processes may
be landing something this very moment, so a blob only goes when no file among the manifests spells its digest, no
living stage claims it, and nobody renewed its time since the model that brought it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import ExistsError, StoreError
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import Digest, find_mentions
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.name import ModelName, validate_writable
from ollama_forge.store.publish import publish_manifest
from ollama_forge.store.stage import find_stages, is_stale, stage_homes, store_error

SERVER_GRACE_SECONDS = 3600.0  # layerPruneGracePeriod of server/images.go, v0.21 and later
CLOCK_SLACK_SECONDS = 2.0


@dataclass(frozen=True)
class Discarded:
    """What became of blobs that were to go.

    Attributes:
        removed: gone; `freed_bytes` together.
        kept: still used, or perhaps about to be.
        warnings: could not be removed, with the reason.
    """

    removed: tuple[Digest, ...] = ()
    kept: tuple[Digest, ...] = ()
    freed_bytes: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Removed:
    """A model that is gone."""

    name: ModelName
    discarded: Discarded


def discard_unused(
    store: Store, digests: Iterable[Digest], *, untouched_since: float, own_stage: Path | None = None
) -> Discarded:
    """Remove those of `digests` that nothing needs.

    Args:
        untouched_since: seconds since 1970; a blob that was renewed later, and less than an hour ago, is kept,
            because a
            server or another process may be about to use it.
        own_stage: the caller's stage, whose claims do not count.
    """
    removed, kept, warnings, freed_bytes = [], [], [], 0
    used = store.mentions()
    claimed = _claimed(store, own_stage)
    for digest in sorted(set(digests)):
        path = store.blobs.path(digest)
        try:
            status = path.lstat()
        except OSError:
            continue
        age = time.time() - status.st_mtime
        is_renewed = status.st_mtime > untouched_since + CLOCK_SLACK_SECONDS and age < SERVER_GRACE_SECONDS
        if digest in used or digest.blob_filename in claimed or is_renewed:
            kept.append(digest)
            continue
        try:
            path.unlink()
        except FileNotFoundError:
            continue
        except OSError as exc:
            warnings.append(f"The unused blob {str(path)!r} could not be removed: {os.strerror(exc.errno or 0)}.")
            continue
        removed.append(digest)
        freed_bytes += status.st_size if status.st_nlink == 1 else 0
    return Discarded(tuple(removed), tuple(kept), freed_bytes, tuple(warnings))


def is_pruning_allowed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether `OLLAMA_NOPRUNE` leaves unused blobs to be removed; any word that is not false forbids it."""
    text = environ.get("OLLAMA_NOPRUNE", "").strip().strip("\"'")
    return text in ("", "0", "f", "F", "false", "FALSE", "False")


def remove_model(store: Store, name: ModelName | str) -> Removed:
    """Remove a model and the blobs that it alone used, as `ollama rm` does. A broken manifest goes too.

    Raises:
        NotFoundError: no such model.
        DiskError: the store cannot be written.
    """
    wanted = store.canonical(name)
    raw = store.read_manifest_bytes(wanted)
    path = store.manifest_path(wanted)
    if raw is None:
        raise store.not_found(wanted)
    try:
        written_at = path.stat().st_mtime
        path.unlink()
    except OSError as exc:
        raise store_error(exc, path, "remove the model") from exc
    prune_empty_folders(store, path.parent)
    if not is_pruning_allowed():
        return Removed(wanted, Discarded(kept=tuple(sorted(find_mentions(raw)))))
    return Removed(wanted, discard_unused(store, find_mentions(raw), untouched_since=written_at))


def plan_removal(store: Store, name: ModelName | str) -> Removed:
    """What `remove_model` would do; a blob that was renewed in the last hour may stay after all.

    Raises:
        NotFoundError: no such model.
        DiskError: the store may not be read.
    """
    wanted = store.canonical(name)
    raw = store.read_manifest_bytes(wanted)
    if raw is None:
        raise store.not_found(wanted)
    own, mentions = store.manifest_path(wanted), store.mentions()
    there = sorted(digest for digest in find_mentions(raw) if store.blobs.has(digest))
    alone = [digest for digest in there if is_pruning_allowed() and set(mentions.get(digest, ())) <= {own}]
    freed = sum(store.blobs.path(digest).stat().st_size for digest in alone)
    return Removed(wanted, Discarded(tuple(alone), tuple(sorted(set(there) - set(alone))), freed))


def copy_model(
    store: Store, source: ModelName | str, destination: ModelName | str, *, overwrite: bool = False
) -> InstalledModel:
    """Give a model a second name; the blobs are shared.

    Raises:
        NotFoundError: no such model.
        NameInvalidError, ExistsError: the new name cannot be used, or is taken and `overwrite` is false.
        DiskError: the store cannot be written.
    """
    model = store.find(source)
    wanted = store.canonical(destination)
    validate_writable(wanted)
    raw = store.read_manifest_bytes(model.name)
    previous = store.read_manifest_bytes(wanted)
    if raw is None:
        raise store.not_found(model.name)
    if previous is not None and previous != raw and not overwrite:
        raise exists_error(wanted)
    for layer in model.manifest.all_layers:
        store.blobs.renew(layer.digest)
    replaced_at = time.time()
    publish_manifest(store, wanted, raw, overwrite=overwrite)
    if previous is not None and is_pruning_allowed():
        discard_unused(store, find_mentions(previous) - find_mentions(raw), untouched_since=replaced_at)
    return store.find(wanted)


def exists_error(name: ModelName) -> ExistsError:
    """The error for a name that is taken."""
    return ExistsError(
        f"There is already a model {name.display!r}",
        why="Nothing is overwritten unless you ask for it.",
        next="Add --force to replace it, or choose another name.",
    )


def prune_empty_folders(store: Store, folder: Path) -> None:
    """Remove empty folders from `folder` up to the manifests' root, which stays."""
    while folder != store.manifests_dir and store.manifests_dir in folder.parents:
        try:
            folder.rmdir()
        except OSError:
            return
        folder = folder.parent


def _claimed(store: Store, own_stage: Path | None) -> set[str]:
    """File names of the blobs that a landing in another process holds on to."""
    names: set[str] = set()
    for home in stage_homes(store.models_dir):
        for stage in find_stages(home):
            if stage != own_stage and not is_stale(stage):
                with contextlib.suppress(OSError):
                    names.update(entry.name for entry in stage.iterdir())
    return names


def require_blobs(store: Store, digests: Iterable[Digest]) -> None:
    """Raise when a blob is not there.

    Raises:
        StoreError: with its digest.
    """
    for digest in digests:
        if not store.blobs.has(digest):
            raise StoreError(
                f"The blob {str(digest)!r} is gone from {str(store.blobs.blobs_dir)!r}",
                why="Another program removed it while it was being used.",
                next="Run the command again.",
            )
