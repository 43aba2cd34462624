"""A model with its history in one folder, for another machine: written with its hashes, verified on arrival.

    bundle.json     what it is: names, digests, its entry, the landings of it and of all that it was made from
    manifest.json   Ollama's manifest, byte for byte
    Modelfile       for `ollama create`, where this tool is not
    blobs/          its layers under their digests

In: an entry or a folder, and a store. Nothing is taken into a store before every byte of it was hashed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import DigestError, ForgeError, NotFoundError, RegistryError, StoreError
from ollama_forge.files import Advance, atomic_output, disk_error, make_folder, require_free_space, write_bytes
from ollama_forge.registry.document import Document, RegistryEntry, parse_document, render_document
from ollama_forge.registry.importing import plan_import, plan_merge
from ollama_forge.registry.inventory import Inventory, find_installed
from ollama_forge.registry.lifecycle import store_folder
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import Digest, digest_of, parse_digest
from ollama_forge.store.discard import exists_error
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.manifest import Layer, parse_manifest
from ollama_forge.store.modelfile import render_modelfile
from ollama_forge.store.name import ModelName, parse_name, validate_writable
from ollama_forge.store.publish import publish_manifest

BUNDLE_VERSION = 1
_CHUNK_BYTES = 1 << 22
_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Bundle:
    """A folder that was read and whose manifest is the one that it promises; its blobs are not hashed yet."""

    folder: Path
    name: ModelName
    raw_manifest: bytes
    layers: tuple[Layer, ...]
    document: Document

    @property
    def digest(self) -> str:
        """`sha256:...` of the manifest."""
        return str(digest_of(self.raw_manifest))

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)

    def blob_path(self, digest: Digest) -> Path:
        return self.folder / "blobs" / digest.blob_filename


def find_bundled(entry: RegistryEntry) -> InstalledModel:
    """The installed model behind an entry.

    Raises:
        NotFoundError: it is in no store here.
        StoreError: it is another model by now.
    """
    folder = store_folder(entry)
    if folder is None or not entry.served_model_id:
        raise NotFoundError(
            f"{entry.name!r} is in no store of this machine",
            next="Bring it into the registry: ollama-forge registry import",
        )
    model = Store(folder).find(entry.served_model_id)
    if entry.identity.manifest_digest not in ("", f"sha256:{model.digest}"):
        raise StoreError(
            f"{entry.served_model_id!r} is not the model that the registry means",
            why=f"Its digest is sha256:{model.digest}, and {entry.identity.manifest_digest} is recorded.",
            next="Bring the registry up to date: ollama-forge registry import",
        )
    return model


def write_bundle(
    document: Document, entry: RegistryEntry, model: InstalledModel, folder: Path, advance: Advance | None = None
) -> None:
    """Write the folder, whole or not at all.

    Raises:
        RegistryError: the folder is there already.
        StoreError: a blob is missing, or its bytes are not what its digest says.
        DiskError: no room.
    """
    if folder.exists():
        raise RegistryError(f"{str(folder)!r} exists already", next="Choose another folder for -o.")
    require_free_space(folder.parent, model.size_bytes, folder.name)
    temp = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    make_folder(temp / "blobs")
    try:
        for layer in dict.fromkeys(model.manifest.all_layers):
            target = temp / "blobs" / layer.digest.blob_filename
            if not target.exists():
                _copy_blob(model.blobs.path(layer.digest), target, layer.digest, advance)
        raw = Store(model.blobs.blobs_dir.parent).read_manifest_bytes(model.name) or b""
        history = Document(models={entry.name: _portable(entry)}, lineage=_ancestry(document, f"sha256:{model.digest}"))
        promise = {
            "bundle_version": BUNDLE_VERSION,
            "name": model.name.display,
            "manifest_digest": f"sha256:{model.digest}",
            "registry": json.loads(render_document(history)),
        }
        source = f"./blobs/{model.model_path.name}" if model.model_path else model.name.display
        write_bytes(temp / "manifest.json", raw)
        write_bytes(temp / "Modelfile", _portable_modelfile(model, source).encode())
        write_bytes(
            temp / "bundle.json", (json.dumps(promise, ensure_ascii=False, sort_keys=True, indent=1) + "\n").encode()
        )
        try:
            temp.rename(folder)
        except OSError as exc:
            raise disk_error(exc, folder, "write the bundle") from exc
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def read_bundle(folder: Path) -> Bundle:
    """Read and check everything but the bytes of the blobs.

    Raises:
        RegistryError: no bundle, a newer one, or one that does not keep its promise.
        ManifestError: a manifest that is none.
    """
    try:
        promise = json.loads(_read_bounded(folder / "bundle.json"))
        if not isinstance(promise, dict) or promise.get("bundle_version") != BUNDLE_VERSION:
            raise _broken(folder, f"It is not of version {BUNDLE_VERSION}.")
        name, digest = parse_name(promise["name"]), parse_digest(promise["manifest_digest"])
        document = parse_document(json.dumps(promise["registry"]).encode(), repr(str(folder)))
    except (ValueError, KeyError, TypeError, RecursionError, DigestError) as exc:
        raise _broken(folder, f"Its bundle.json is broken: {exc}") from exc
    raw = _read_bounded(folder / "manifest.json")
    if digest_of(raw) != digest:
        raise _broken(folder, f"Its manifest has the digest {digest_of(raw)}, and {digest} was promised.")
    layers = tuple(dict.fromkeys(parse_manifest(raw).all_layers))
    bundle = Bundle(folder, name, raw, layers, document)
    for layer in layers:
        path = bundle.blob_path(layer.digest)
        if not path.is_file() or path.stat().st_size != layer.size_bytes:
            raise _broken(folder, f"Its blob {path.name} is missing or has another size.")
    return bundle


def require_landable(bundle: Bundle, store: Store, name: str | None, *, overwrite: bool) -> ModelName:
    """The name that the model will have.

    Raises:
        ExistsError: another model has it and `overwrite` is false.
    """
    wanted = store.canonical(name or bundle.name)
    validate_writable(wanted)
    current = store.read_manifest_bytes(wanted)
    if current not in (None, bundle.raw_manifest) and not overwrite:
        raise exists_error(wanted)
    return wanted


def land_bundle(
    bundle: Bundle, store: Store, name: ModelName, *, overwrite: bool, advance: Advance | None = None
) -> None:
    """Put the model into the store: all blobs hashed first, the manifest last.

    Raises:
        StoreError: bytes that are not what their digest says; the store is as before.
    """
    with contextlib.ExitStack() as stages:
        staged = []
        for layer in bundle.layers:
            path = bundle.blob_path(layer.digest)
            blob = stages.enter_context(store.blobs.stage_file(path, advance=advance, may_hardlink=False))
            if blob.digest != layer.digest:
                raise StoreError(
                    f"{str(path)!r} is damaged",
                    why=f"Its bytes have the digest {blob.digest}.",
                    next="Copy the bundle again.",
                )
            staged.append(blob)
        for blob in staged:
            blob.commit()
        publish_manifest(store, name, bundle.raw_manifest, overwrite=overwrite)


def with_bundle(document: Document, bundle: Bundle, store: Store, name: ModelName) -> Document:
    """The registry with a landed bundle: what is found here, roles and scores of there, and its whole history."""
    found = find_installed(store, store.find(name))
    imported = plan_import(document, Inventory("store", str(store.models_dir), (found,), is_whole=False))
    merged = plan_merge(imported.document, bundle.document.with_models({}), str(bundle.folder)).document
    old = next(iter(bundle.document.models.values()), None)
    if old is None or not imported.added:
        return merged
    key = imported.added[0]
    entry = merged.models[key].model_copy(update={"roles": old.roles, "scores": old.scores})
    return merged.with_models({**merged.models, key: entry})


def _ancestry(document: Document, digest: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    waiting = [digest]
    while waiting:
        one = waiting.pop()
        if one in found or one not in document.lineage:
            continue
        found[one] = document.lineage[one]
        waiting += [parent.digest for landing in document.lineage[one] for parent in landing.parents]
    return found


def _portable(entry: RegistryEntry) -> RegistryEntry:
    return entry.model_copy(update={"store": "", "download_path": None, "download_location": None})


def _portable_modelfile(model: InstalledModel, source: str) -> str:
    from dataclasses import replace

    modelfile = model.modelfile(source)
    adapters = tuple(f"./blobs/{path.name}" for path in model.adapters)
    drafts = (f"./blobs/{model.draft.name}",) if model.draft else ()
    return render_modelfile(replace(modelfile, adapters=adapters, drafts=drafts))


def _copy_blob(source: Path, target: Path, digest: Digest, advance: Advance | None) -> None:
    with atomic_output(target) as sink:
        for chunk in _chunks(source):
            sink.write(chunk)
            if advance:
                advance(len(chunk))
        if sink.sha256 != digest.hex:
            raise StoreError(
                f"The blob {str(source)!r} is damaged",
                why=f"Its bytes have the digest sha256:{sink.sha256}.",
                next="Pull the model again, or make it again; then export it.",
            )


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except FileNotFoundError as exc:
        raise StoreError(f"The blob {str(path)!r} is missing", next="Run `ollama-forge verify`.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise _broken(path.parent, f"It has no {path.name}.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    if len(raw) > _LIMIT_BYTES:
        raise _broken(path.parent, f"Its {path.name} is larger than {_LIMIT_BYTES:,} bytes.")
    return raw


def _broken(folder: Path, why: str) -> ForgeError:
    return RegistryError(
        f"{str(folder)!r} is not a whole bundle", why=why, next="Make one: ollama-forge registry export REF -o FOLDER"
    )
