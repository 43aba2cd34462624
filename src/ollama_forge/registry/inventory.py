"""What Ollama has, found out in the best way there is: its store, else its server, else its program's listing.

Out: `Inventory`, a value. It only reads, loads no model, and tells every oddity once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import DigestError, ForgeError, NameInvalidError, ServerError
from ollama_forge.registry.document import BlobRecord, Identity
from ollama_forge.registry.facts import WeightFacts, find_capabilities, read_weight_facts
from ollama_forge.registry.listing import Listing, read_listing
from ollama_forge.registry.naming import agrees, derive_variant, parse_quantization
from ollama_forge.store.catalog import Store, open_store
from ollama_forge.store.digest import Digest
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.location import has_manifests
from ollama_forge.store.manifest import PROJECTOR, Layer
from ollama_forge.store.name import parse_name
from ollama_forge.store.server import OllamaServer
from ollama_forge.store.verify import verify_store

UNKNOWN_STORE = "ollama://"


@dataclass(frozen=True)
class Oddity:
    """Something that is not as it should be. `kind` is a stable word; those of a store are `store.verify`'s."""

    kind: str
    ref: str
    what: str


@dataclass(frozen=True)
class FoundModel:
    """A model that Ollama has.

    Attributes:
        served_model_id: its name, as Ollama lists it.
        short_id: the first digits of the manifest's digest, where only they are known.
        path: the weights' file, or `ollama://<name>` where the store is not known.
        capabilities: None where they are not known.
    """

    served_model_id: str
    identity: Identity
    short_id: str = ""
    size_bytes: int | None = None
    architecture: str = ""
    quantization: str | None = None
    parameter_size: str = ""
    format: str = "gguf"
    path: str = ""
    capabilities: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Inventory:
    """All that was found.

    Attributes:
        origin: `store`, `server`, `cli-json` or `cli-text`.
        store: the models folder or the server's address; empty for a listing.
        unreadable: names that are there but whose manifests could not be read.
        is_whole: whether what is not in it is not there.
    """

    origin: str
    store: str
    models: tuple[FoundModel, ...]
    oddities: tuple[Oddity, ...] = ()
    unreadable: frozenset[str] = frozenset()
    is_whole: bool = True


def take_inventory(store_path: Path | None = None, server: OllamaServer | None = None) -> Inventory:
    """Look at what was named; else at the store of this machine, the server, the program: the first that is there.

    Raises:
        ServerError: none is there, or the named one does not answer.
        DiskError: the store may not be read.
    """
    if server is not None:
        return read_server_inventory(server)
    store = open_store(store_path)
    if store_path is not None or has_manifests(store.models_dir):
        return read_store_inventory(store)
    try:
        with OllamaServer() as found:
            return read_server_inventory(found)
    except ServerError:
        return listed_inventory(read_listing())


def read_store_inventory(store: Store) -> Inventory:
    """Every model of a store, with what its files say."""
    catalog = store.read_catalog()
    problems = verify_store(store, quick=True).problems
    facts: dict[Digest, WeightFacts] = {}
    models, oddities = [], [Oddity(p.kind, str(p.path), p.what) for p in problems]
    for model in sorted(catalog.models, key=lambda model: model.name):
        weights = _facts_of(store, model.model_layer, facts)
        projectors = model.manifest.of_type(PROJECTOR)
        projector = _facts_of(store, projectors[0], facts) if projectors else None
        models.append(_found(model, weights, projector))
        oddities += _mismatches(model, weights)
    readable = {model.name for model in catalog.models}
    return Inventory(
        "store",
        str(store.models_dir),
        tuple(models),
        tuple(dict.fromkeys(oddities)),
        frozenset(name.display for name in store.names() if name not in readable),
    )


def read_server_inventory(server: OllamaServer, only: str | None = None) -> Inventory:
    """Every model of a running Ollama, through its API; or one of them, by its name."""
    models, oddities = [], []
    for row in sorted(server.tags(), key=lambda row: row.name):
        if only is not None and parse_name(row.name) != parse_name(only):
            continue
        capabilities = None
        try:
            capabilities = tuple(sorted(server.show(row.name).capabilities)) or None
        except ForgeError as exc:
            oddities.append(Oddity("show", row.name, exc.what))
        models.append(
            FoundModel(
                row.name,
                _identity(row.digest),
                row.digest[:12],
                row.size_bytes,
                row.family,
                parse_quantization(row.quantization),
                row.parameter_size,
                path=UNKNOWN_STORE + row.name,
                capabilities=capabilities,
            )
        )
        oddities += _compare(row.name, parse_quantization(row.quantization))
    return Inventory("server", server.address.url, tuple(models), tuple(oddities), is_whole=only is None)


def listed_inventory(listing: Listing) -> Inventory:
    """What a listing says, which is little: names, sizes, and the start of the digests."""
    oddities = [
        Oddity("line", line, "a line of `ollama list` that is not understood") for line in listing.strange_lines
    ]
    models: dict[str, FoundModel] = {}
    for row in listing.models:
        try:
            parse_name(row.name)
        except NameInvalidError as exc:
            oddities.append(Oddity("name", row.name, exc.what))
            continue
        found = FoundModel(row.name, _identity(row.id), row.id[:12], row.size_bytes, path=UNKNOWN_STORE + row.name)
        if models.setdefault(row.name, found) != found:
            oddities.append(Oddity("twice", row.name, "listed twice, with another digest or size; the first is taken"))
    return Inventory(f"cli-{listing.form}", "", tuple(models[name] for name in sorted(models)), tuple(oddities))


def find_installed(store: Store, model: InstalledModel) -> FoundModel:
    """One model of a store, with what its files say."""
    projectors = model.manifest.of_type(PROJECTOR)
    known: dict[Digest, WeightFacts] = {}
    projector = _facts_of(store, projectors[0], known) if projectors else None
    return _found(model, _facts_of(store, model.model_layer, known), projector)


def _found(model: InstalledModel, weights: WeightFacts, projector: WeightFacts | None) -> FoundModel:
    layers = model.manifest.all_layers
    return FoundModel(
        served_model_id=model.name.display,
        identity=Identity(
            manifest_digest=f"sha256:{model.digest}",
            blobs=tuple(
                BlobRecord(
                    kind="config" if layer is model.manifest.config else layer.media_type.rsplit(".", 1)[-1],
                    digest=str(layer.digest),
                    size_bytes=layer.size_bytes,
                )
                for layer in layers
            ),
            metadata_hash=weights.metadata_hash,
        ),
        short_id=model.digest[:12],
        size_bytes=model.size_bytes,
        architecture=weights.architecture or model.family,
        quantization=weights.quantization or parse_quantization(model.quantization),
        parameter_size=model.parameter_size,
        format=model.config.model_format or "gguf",
        path=str(model.model_path) if model.model_path else UNKNOWN_STORE + model.name.display,
        capabilities=find_capabilities(model, weights, projector),
    )


def _facts_of(store: Store, layer: Layer | None, known: dict[Digest, WeightFacts]) -> WeightFacts:
    if layer is None:
        return WeightFacts()
    if layer.digest not in known:
        known[layer.digest] = read_weight_facts(store.blobs.path(layer.digest))
    return known[layer.digest]


def _mismatches(model: InstalledModel, weights: WeightFacts) -> Iterable[Oddity]:
    name = model.name.display
    if weights.architecture and model.family and weights.architecture != model.family:
        what = f"its config says the family {model.family!r}, its GGUF header {weights.architecture!r}"
        yield Oddity("family", name, what)
    config_says = parse_quantization(model.quantization)
    if weights.quantization and config_says and not agrees(config_says, weights.quantization):
        what = f"its config says the quantization {config_says!r}, its GGUF header {weights.quantization!r}"
        yield Oddity("quantization", name, what)
    yield from _compare(name, weights.quantization)


def _compare(name: str, found: str | None) -> Iterable[Oddity]:
    said = derive_variant(name).quantization
    if said and found and not agrees(said, found):
        yield Oddity("quantization", name, f"its name says {said!r}, its GGUF header {found!r}; the header counts")


def _identity(hexadecimal: str) -> Identity:
    try:
        return Identity(manifest_digest=str(Digest(hexadecimal)))
    except DigestError:
        return Identity()
