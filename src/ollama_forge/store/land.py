"""Landing: a model gets its name in the store, checked, or the store stays as it was.

In: a GGUF file, a staged or stored blob, or an installed model, with a Modelfile's wishes and adapters. Out:
`Landed`. Order (OLLAMA.md 1.9): every blob is written or renewed and held on to, the model is checked, the manifest
is renamed into place, the blobs are looked at once more, and only then does what the replaced model alone used go
away. The check comes before the manifest, so that a process killed in the middle of it leaves no unproven model under
a name, and no replaced one is lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from ollama_forge.errors import CheckError, ForgeError, ManifestError, StoreError
from ollama_forge.files import Advance, hash_file
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.blobs import SHARED, WRITTEN, BlobStore, StagedBlob, StoredBlob
from ollama_forge.store.catalog import Store
from ollama_forge.store.compose import Additions, Composition, GGUFLayer, compose_from_base, compose_from_file
from ollama_forge.store.digest import Digest, find_mentions
from ollama_forge.store.discard import (
    Discarded,
    discard_unused,
    exists_error,
    is_pruning_allowed,
    prune_empty_folders,
    require_blobs,
)
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.landed import GGUFSource, Ingredients, Landed, LandingPlan, ModelSource, Undo
from ollama_forge.store.manifest import parse_manifest, render_manifest
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.name import ModelName, validate_writable
from ollama_forge.store.publish import publish_manifest
from ollama_forge.store.stage import find_owner, open_stage, store_error

Check = Callable[[InstalledModel], object]
REMEMBERED_BYTES = 1 << 20


def land(
    store: Store,
    name: ModelName | str,
    *,
    model: ModelSource,
    modelfile: Modelfile | None = None,
    adapters: Sequence[GGUFSource] = (),
    projector: GGUFSource | None = None,
    draft: GGUFSource | None = None,
    keeps_adapters: bool = True,
    overwrite: bool = False,
    check: Check | None = None,
    keep_replaced: bool = False,
    advance: Advance | None = None,
) -> Landed:
    """Give a model a name in the store.

    Landing the same thing twice succeeds. The fields of `Ingredients` are given one by one.

    Args:
        overwrite: replace a model of that name that is not the same already.
        check: called with the finished model before anyone else can see it; whatever it raises undoes the landing.
        keep_replaced: leave the replaced model's own blobs where they are, so that `roll_back` works whatever their
            size.
        advance: told the bytes of files that are read.

    Raises:
        NameInvalidError: a name that Ollama refuses or would not find again.
        ExistsError: another model has that name and `overwrite` is false.
        CheckError: the check failed; the store is as it was.
        StoreError, DiskError, GGUFError, AdapterError: with the file and the next step; the store is as it was.
    """
    ingredients = Ingredients(
        model, modelfile or Modelfile(), tuple(adapters), projector, draft, keeps_adapters=keeps_adapters
    )
    wanted = store.canonical(name)
    validate_writable(wanted)
    with contextlib.ExitStack() as files:
        composition, staged = _gather(store.blobs, ingredients, files, advance)
        raw = render_manifest(composition.manifest)
        _require_free_name(store, wanted, raw, overwrite=overwrite)
        owner = find_owner(store.models_dir)
        with open_stage(store.models_dir, store.blobs.blobs_dir, owner) as stage:
            return _Landing(store, wanted, composition, staged, raw, stage).run(
                overwrite=overwrite, check=check, keep_replaced=keep_replaced
            )


def plan_landing(
    store: Store, name: ModelName | str, ingredients: Ingredients, *, overwrite: bool = False
) -> LandingPlan:
    """What `land` would do: files are read for their digests, and nothing is written.

    Raises:
        As `land`.
    """
    wanted = store.canonical(name)
    validate_writable(wanted)
    composition = _compose(ingredients, lambda source: _described(store.blobs, source))
    raw = render_manifest(composition.manifest)
    _require_free_name(store, wanted, raw, overwrite=overwrite)
    layers = {part.layer.digest: part for part in composition.parts}
    shared = sum(p.layer.size_bytes for p in layers.values() if store.blobs.has(p.layer.digest))
    total = sum(p.layer.size_bytes for p in layers.values())
    return LandingPlan(
        name=wanted,
        digest=hashlib.sha256(raw).hexdigest(),
        written_bytes=total - shared + len(raw),
        shared_bytes=shared,
        replaces=store.read_manifest_bytes(wanted) is not None,
        composition=composition,
    )


def roll_back(landed: Landed) -> None:
    """Undo a landing: the name is free again, or the replaced model has it back.

    Raises:
        StoreError: the model was changed since, or weights of the replaced one are gone (see `keep_replaced`).
        DiskError: the store cannot be written.
    """
    store = Store(landed.store)
    current = store.read_manifest_bytes(landed.name)
    if current is None or hashlib.sha256(current).hexdigest() != landed.digest:
        raise StoreError(
            f"{landed.name.display!r} was changed since it was landed",
            why="Taking it back would undo somebody else's work.",
            next=f"Look at it first: ollama-forge show {landed.name.display}",
        )
    for content in landed.undo.texts:
        store.blobs.put_bytes(content)
    if landed.undo.previous is not None:
        with contextlib.suppress(ManifestError):  # it was broken before, and will be again
            require_blobs(store, (layer.digest for layer in parse_manifest(landed.undo.previous).all_layers))
    _restore_manifest(store, landed.name, landed.undo.previous)
    _drop_added(store, landed.undo.added, None)


def require_free_name(store: Store, name: ModelName | str, *, overwrite: bool) -> ModelName:
    """The name as the store will spell it, asked before long work starts.

    Raises:
        NameInvalidError: a name that Ollama refuses or would not find again.
        ExistsError: a model has that name and `overwrite` is false.
    """
    wanted = store.canonical(name)
    validate_writable(wanted)
    if not overwrite and store.read_manifest_bytes(wanted) is not None:
        raise exists_error(wanted)
    return wanted


def _restore_manifest(store: Store, name: ModelName, previous: bytes | None) -> None:
    path = store.manifest_path(name)
    if previous is None:
        try:
            path.unlink(missing_ok=True)
        except OSError as exc:
            raise store_error(exc, path, "take the model back") from exc
        prune_empty_folders(store, path.parent)
    else:
        publish_manifest(store, name, previous, overwrite=True)


def _drop_added(store: Store, added: Sequence[tuple[Digest, float]], own_stage: Path | None) -> None:
    for digest, added_at in added:
        discard_unused(store, [digest], untouched_since=added_at, own_stage=own_stage)


class _Landing:
    """One landing under way: what was added so far is what has to go when it fails."""

    def __init__(
        self,
        store: Store,
        name: ModelName,
        composition: Composition,
        staged: dict[Digest, StagedBlob],
        raw: bytes,
        stage: Path,
    ) -> None:
        self._store = store
        self._name = name
        self._composition = composition
        self._staged = staged
        self._raw = raw
        self._stage = stage
        self._stored: dict[Digest, StoredBlob] = {}
        self._added: list[tuple[Digest, float]] = []
        self._is_published = False
        self._previous: bytes | None = None
        self._replaced_at = 0.0

    def run(self, *, overwrite: bool, check: Check | None, keep_replaced: bool) -> Landed:
        try:
            self._place_blobs()
            checked = self._check(check) if check else None
            self._publish(overwrite=overwrite)
        except BaseException:
            self._take_back()
            raise
        texts, discarded = ((), Discarded()) if keep_replaced else self._discard_replaced()
        stored = self._stored.values()
        written = tuple(sorted(blob.digest for blob in stored if blob.how == WRITTEN))
        written_bytes = sum(blob.written_bytes for blob in stored)
        return Landed(
            name=self._name,
            digest=hashlib.sha256(self._raw).hexdigest(),
            store=self._store.models_dir,
            written_bytes=written_bytes + len(self._raw),
            shared_bytes=sum(blob.size_bytes for blob in stored) - written_bytes,
            written=written,
            shared=tuple(sorted(set(self._stored) - set(written))),
            check=checked,
            warnings=tuple(dict.fromkeys(w for blob in stored for w in blob.warnings)) + discarded.warnings,
            discarded=discarded,
            undo=Undo(self._previous, texts, tuple(self._added)),
        )

    def _place_blobs(self) -> None:
        """Shared blobs first: from here on nobody of ours takes them away."""
        parts = sorted(self._composition.parts, key=lambda part: part.content is not None)
        for part in parts:
            digest = part.layer.digest
            if digest in self._stored:
                continue
            if part.content is not None:
                stored = self._store.blobs.put_bytes(part.content)
            elif digest in self._staged:
                staged = self._staged[digest]
                staged.commit()
                stored = staged.stored or StoredBlob(digest, part.layer.size_bytes, WRITTEN)
            else:
                warnings = self._store.blobs.renew(digest)
                stored = StoredBlob(digest, part.layer.size_bytes, SHARED, warnings)
            self._stored[digest] = stored
            if stored.how != SHARED:
                self._added.append((digest, self._store.blobs.path(digest).lstat().st_mtime))
            self._hold(digest)

    def _hold(self, digest: Digest) -> None:
        """A second link to the blob: a claim that our other processes see, and a way back when it is removed."""
        claim = self._stage / digest.blob_filename
        try:
            os.link(self._store.blobs.path(digest).resolve(), claim)
        except OSError:  # another account's file, or no links here: the claim alone
            with contextlib.suppress(OSError):
                claim.touch()

    def _check(self, check: Check) -> object:
        model = InstalledModel(
            name=self._name,
            digest=hashlib.sha256(self._raw).hexdigest(),
            manifest=self._composition.manifest,
            config=self._composition.config,
            modified_at=datetime.fromtimestamp(time.time(), timezone.utc),
            blobs=self._store.blobs,
        )
        try:
            return check(model)
        except CheckError:
            raise
        except ForgeError as exc:
            raise CheckError(
                f"{self._name.display!r} did not pass its check and was not landed: {exc.what}",
                why=exc.why,
                next=exc.next,
            ) from exc

    def _publish(self, *, overwrite: bool) -> None:
        self._previous = self._store.read_manifest_bytes(self._name)
        self._replaced_at = self._manifest_time()
        publish_manifest(self._store, self._name, self._raw, overwrite=overwrite)
        self._is_published = True
        for digest, stored in self._stored.items():
            if not self._store.blobs.has(digest):
                self._bring_back(digest, stored)
        require_blobs(self._store, self._stored)

    def _bring_back(self, digest: Digest, stored: StoredBlob) -> None:
        claim = self._stage / digest.blob_filename
        with contextlib.suppress(OSError):
            if claim.stat().st_size == stored.size_bytes:
                os.link(claim, self._store.blobs.path(digest))

    def _manifest_time(self) -> float:
        with contextlib.suppress(OSError):
            return self._store.manifest_path(self._name).stat().st_mtime
        return 0.0

    def _take_back(self) -> None:
        with contextlib.suppress(ForgeError):  # what went wrong first is what a person must hear
            if self._is_published:
                _restore_manifest(self._store, self._name, self._previous)
            _drop_added(self._store, self._added, self._stage)

    def _discard_replaced(self) -> tuple[tuple[bytes, ...], Discarded]:
        if self._previous is None or not is_pruning_allowed():
            return (), Discarded()
        superseded = find_mentions(self._previous) - find_mentions(self._raw)
        texts = []
        for digest in sorted(superseded):
            with contextlib.suppress(ForgeError):
                texts.append(self._store.blobs.read_bytes(digest, REMEMBERED_BYTES))
        discarded = discard_unused(self._store, superseded, untouched_since=self._replaced_at, own_stage=self._stage)
        return tuple(texts), discarded


def _require_free_name(store: Store, name: ModelName, raw: bytes, *, overwrite: bool) -> None:
    previous = store.read_manifest_bytes(name)
    if previous is not None and previous != raw and not overwrite:
        raise exists_error(name)


def _gather(
    blobs: BlobStore, ingredients: Ingredients, files: contextlib.ExitStack, advance: Advance | None
) -> tuple[Composition, dict[Digest, StagedBlob]]:
    """Bring every file near the store and describe it; nothing has a blob's name yet."""
    staged: dict[Digest, StagedBlob] = {}

    def describe(source: GGUFSource) -> GGUFLayer:
        if isinstance(source, Path):
            with open_gguf(source):  # a file that is none is told before gigabytes of it are read
                pass
            brought = files.enter_context(blobs.stage_file(source, advance=advance))
            staged[brought.digest] = brought
            return GGUFLayer(source, brought.digest, brought.size_bytes)
        if isinstance(source, StagedBlob):
            staged[source.digest] = source
        return _described(blobs, source)

    return _compose(ingredients, describe), staged


def _compose(ingredients: Ingredients, describe: Callable[[GGUFSource], GGUFLayer]) -> Composition:
    additions = Additions(
        adapters=tuple(describe(adapter) for adapter in ingredients.adapters),
        projector=describe(ingredients.projector) if ingredients.projector else None,
        draft=describe(ingredients.draft) if ingredients.draft else None,
    )
    if isinstance(ingredients.model, InstalledModel):
        return compose_from_base(
            ingredients.model, additions, ingredients.modelfile, keeps_adapters=ingredients.keeps_adapters
        )
    return compose_from_file(describe(ingredients.model), additions, ingredients.modelfile)


def _described(blobs: BlobStore, source: GGUFSource) -> GGUFLayer:
    if isinstance(source, StagedBlob):
        source.flush()
        path = blobs.path(source.digest) if source.stored else source.path
        return GGUFLayer(path, source.digest, source.size_bytes)
    if isinstance(source, Digest):
        return GGUFLayer(blobs.path(source), source, blobs.size_bytes(source))
    with open_gguf(source):
        pass
    hashed = hash_file(source)
    return GGUFLayer(source, Digest(hashed.sha256), hashed.size_bytes)
