"""Every landing leaves a record: what the model was made from, how, with which versions.

In: what a job knows of its work (`working`) and what was landed. Out: an entry and a `Landing` in the registry. A
record that cannot be written never costs the landing: it becomes a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import enum
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import DigestError, ForgeError
from ollama_forge.files import hash_file
from ollama_forge.gguf.reader import shard_paths
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import parse_digest
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.landed import Landed
from ollama_forge.store.modelfile import Modelfile, render_modelfile
from ollama_forge.store.name import parse_name

if TYPE_CHECKING:
    from ollama_forge.gguf.imatrix import Imatrix
    from ollama_forge.registry.document import Document, Landing
    from ollama_forge.registry.inventory import Inventory
    from ollama_forge.store.server import OllamaServer

_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})(?:[/\\](?P<file>.+))?")
_VERSIONED = ("ollama-forge", "xllamacpp", "torch", "transformers", "peft")
_HASHED_BYTES = 1 << 30
_SHOWN = 500
_GIVEN = {"base", "data"}


@dataclass(frozen=True)
class Ingredient:
    """Something that went into a model.

    Attributes:
        role: `base`, `adapter`, `data`, `imatrix` ...
        ref: as the person named it, or the path.
        digest: `sha256:...` of its manifest or of its bytes; empty where that is not known.
        commit: the revision of a Hugging Face repo.
    """

    role: str
    ref: str
    digest: str = ""
    commit: str = ""


@dataclass(frozen=True)
class Work:
    """What a job is doing. `scores` are what it measured, `seconds` what it took before it came to land."""

    step: str
    ingredients: tuple[Ingredient, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


_WORK: contextvars.ContextVar[Work | None] = contextvars.ContextVar("work", default=None)
_RECORDS: contextvars.ContextVar[bool] = contextvars.ContextVar("records", default=True)


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Whatever is landed inside is a trial, and leaves no record."""
    token = _RECORDS.set(False)
    try:
        yield
    finally:
        _RECORDS.reset(token)


_ORIGINALS: contextvars.ContextVar[Mapping[Path, Path] | None] = contextvars.ContextVar("originals", default=None)


@contextlib.contextmanager
def standing_for(originals: Mapping[Path, Path]) -> Iterator[None]:
    """Inside, a passing file (an adapter converted on the way) is recorded as what the person gave."""
    outer = _ORIGINALS.get() or {}
    token = _ORIGINALS.set({**outer, **{made: outer.get(given, given) for made, given in originals.items()}})
    try:
        yield
    finally:
        _ORIGINALS.reset(token)


_REGISTRY: contextvars.ContextVar[Path | None] = contextvars.ContextVar("registry", default=None)


@contextlib.contextmanager
def recording_in(registry_path: Path) -> Iterator[None]:
    """Landings inside are recorded in that registry, not in the person's own."""
    token = _REGISTRY.set(registry_path)
    try:
        yield
    finally:
        _REGISTRY.reset(token)


@contextlib.contextmanager
def working(
    step: str,
    ingredients: Sequence[Ingredient] = (),
    scores: Mapping[str, float] | None = None,
    *,
    seconds: float = 0.0,
    **parameters: Any,
) -> Iterator[None]:
    """Whatever is landed inside came about like this. Within other work, that one's step stands and this one adds."""
    outer = _WORK.get()
    own = Work(step, tuple(ingredients), parameters, scores or {}, seconds)
    token = _WORK.set(own if outer is None else _added(outer, own))
    try:
        yield
    finally:
        _WORK.reset(token)


def ingredient_of(model: ResolvedModel | InstalledModel | Path, role: str = "base") -> Ingredient:
    """A model that a job reads: an Ollama model by its digest, a blob by its name, a folder by its commit."""
    if isinstance(model, ResolvedModel):
        if model.installed is not None:
            return ingredient_of(model.installed, role)
        path = model.gguf_path or model.folder
        return ingredient_of(path, role) if path is not None else Ingredient(role, model.text)
    if isinstance(model, InstalledModel):
        return Ingredient(role, model.name.display, f"sha256:{model.digest}")
    match = _SNAPSHOT.search(str(model.absolute()))
    if match:
        file = ":" + match["file"].replace("\\", "/") if match["file"] else ""
        return Ingredient(role, "hf:" + match["repo"].replace("--", "/") + file, commit=match["commit"])
    with contextlib.suppress(DigestError):
        return Ingredient(role, str(model.absolute()), str(parse_digest(model.name)))
    return Ingredient(role, str(model.absolute()))


def served_ingredient(server: OllamaServer | None, name: str) -> Ingredient:
    """A model that a server has, by the digest that it tells."""
    rows = server.tags() if server is not None else []
    digest = next((row.digest for row in rows if parse_name(row.name) == parse_name(name)), "")
    return Ingredient("base", name, f"sha256:{digest}" if digest else "")


def file_ingredient(path: Path, role: str) -> Ingredient:
    """A file or an adapter's folder that a job reads, by the hash of its bytes where that takes but a moment."""
    known = ingredient_of(path, role)
    if known.digest or known.commit or not (path.is_file() or (role == "adapter" and path.is_dir())):
        return known
    with contextlib.suppress(ForgeError, OSError):
        parts = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
        if sum(part.stat().st_size for part in parts) <= _HASHED_BYTES:
            return dataclasses.replace(known, digest=content_digest(path))
    return known


def hashed_ingredient(source: ResolvedModel | Path, role: str = "base") -> Ingredient:
    """As `ingredient_of`; a file or a folder by the hash of its bytes, however many: for work that takes far longer."""
    known = ingredient_of(source, role)
    if not (known.digest or known.commit):
        with contextlib.suppress(ForgeError, OSError):
            return dataclasses.replace(known, digest=content_digest(Path(known.ref)))
    return known


def content_digest(path: Path) -> str:
    """`sha256:...` of a file's bytes; of a folder, over the names and hashes of the files that lie right in it; of a
    shard of a GGUF, over those of all shards."""
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    else:
        files = shard_paths(path)
        if len(files) == 1:
            return f"sha256:{hash_file(path).sha256}"
    lines = (f"{hash_file(entry).sha256}  {entry.name}\n" for entry in files)
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def weights_digest(path: Path) -> str:
    """SHA-256 of a GGUF, all shards of it; that of a blob in a store is its name."""
    try:
        return str(parse_digest(path.name)).removeprefix("sha256:")
    except DigestError:
        return content_digest(path).removeprefix("sha256:")


@contextlib.contextmanager
def hashed_beside(folder: Path) -> Iterator[Callable[[], str]]:
    """Hashes a folder while something else is done with it; what it gives waits for the digest.

    A snapshot of a Hugging Face cache needs none: its commit says as much. One that cannot be read gives none either.
    """
    if _SNAPSHOT.search(str(folder.absolute())):
        yield str
        return
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(content_digest, folder)

        def digest() -> str:
            try:
                return hashing.result()
            except (ForgeError, OSError):
                return ""

        yield digest


def source_work(
    source: Path | InstalledModel | None,
    adapters: Sequence[Path],
    changes: Modelfile,
    quantization: object = None,
    digest: str = "",
    projector: Path | None = None,
) -> Work:
    """What a plain landing is made of: weights, adapters, a Modelfile's wishes, perhaps a quantization.

    Args:
        digest: of the source, where it is a folder.
    """
    parameters: dict[str, Any] = {}
    text = modelfile_text(changes)
    if text:
        parameters["modelfile"] = text
    if quantization is not None:
        parameters["conversion" if _is_folder(source) else "quantization"] = plain_value(quantization)
    sources = [] if source is None else [ingredient_of(source)]
    if digest:
        sources = [dataclasses.replace(one, digest=digest) for one in sources]
    given = _ORIGINALS.get() or {}
    sources += [file_ingredient(given.get(path, path), "adapter") for path in adapters]
    if projector is not None:
        sources.append(file_ingredient(projector, "projector"))
    matrix: Imatrix | None = getattr(getattr(quantization, "quantize", quantization), "imatrix", None)
    if matrix is not None and matrix.path is not None:
        sources.append(file_ingredient(matrix.path, "imatrix"))
    step = "import" if _is_folder(source) else "create" if quantization is None else "quantize"
    return Work(step, tuple(sources), parameters)


def modelfile_text(changes: Modelfile) -> str:
    """A Modelfile's wishes as they are recorded; empty where there are none."""
    text = render_modelfile(dataclasses.replace(changes, sources=("BASE",), adapters=(), warnings=()))
    return "" if text.strip() == "FROM BASE" else text


def record_landing(landed: Landed, work: Work, seconds: float, registry_path: Path | None = None) -> tuple[str, ...]:
    """Write down a model that has just got its name; returns warnings, never raises what a registry can raise."""
    from ollama_forge.registry.inventory import Inventory, find_installed

    def found() -> Inventory:
        store = Store(landed.store)
        return Inventory(
            "store", str(store.models_dir), (find_installed(store, store.find(landed.name)),), is_whole=False
        )

    return _record(landed.name.display, landed.digest, found, work, seconds, registry_path)


def record_sent(server: OllamaServer, name: str, digest: str, work: Work, seconds: float) -> tuple[str, ...]:
    """The same for a model that was made on a server; `digest` is what the server says."""
    from ollama_forge.registry.inventory import read_server_inventory

    return _record(name, digest, lambda: read_server_inventory(server, only=name), work, seconds)


def plain_value(value: Any) -> Any:
    """Options as JSON has them: dataclasses as objects without what was not set, paths and enumerations as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if not isinstance(fields.get("imatrix"), (Path, type(None))):
            fields["imatrix"] = "given"  # megabytes of numbers
        return {key: plain_value(item) for key, item in fields.items() if not _is_unset(item)}
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)[:_SHOWN]


def _is_folder(source: object) -> bool:
    return isinstance(source, Path) and source.is_dir()


def _is_unset(value: object) -> bool:
    return value is None or value is False or value in ("", ())


def _added(outer: Work, inner: Work) -> Work:
    known = {(one.role, one.digest or one.ref) for one in outer.ingredients}
    news = tuple(one for one in inner.ingredients if (one.role, one.digest or one.ref) not in known)
    settled = _GIVEN & {one.role for one in outer.ingredients}
    news = tuple(one for one in news if one.role not in settled)  # a step in between, not where it came from
    return Work(
        outer.step,
        (*outer.ingredients, *news),
        {**inner.parameters, **outer.parameters},
        {**inner.scores, **outer.scores},
        inner.seconds + outer.seconds,
    )


def _record(
    name: str,
    digest: str,
    found: Callable[[], Inventory],
    work: Work,
    seconds: float,
    registry_path: Path | None = None,
) -> tuple[str, ...]:
    if not _RECORDS.get():
        return ()
    from ollama_forge.registry.importing import plan_import
    from ollama_forge.registry.registry_file import find_registry, update_registry

    path = find_registry(registry_path or _REGISTRY.get())
    outer = _WORK.get()
    whole = work if outer is None else _added(outer, work)
    try:
        landing = _landing(name, whole, seconds)
        inventory = found()

        def with_landed(document: Document) -> Document:
            known = plan_import(document, inventory).document
            return known.with_landing(f"sha256:{digest}", landing) if digest else known

        update_registry(path, with_landed)
    except (ForgeError, OSError, ValueError) as exc:
        what = exc.what if isinstance(exc, ForgeError) else str(exc)
        return (f"The landing is not in the registry {str(path)!r}: {what}",)
    return ()


def _landing(name: str, work: Work, seconds: float) -> Landing:
    from datetime import datetime, timezone

    from ollama_forge.registry.document import Landing, Parent

    return Landing(
        name=name,
        step=work.step,
        parents=tuple(
            Parent(role=one.role, ref=one.ref, digest=one.digest, commit=one.commit) for one in work.ingredients
        ),
        parameters={key: plain_value(value) for key, value in sorted(work.parameters.items())},
        versions=_versions(),
        scores=dict(work.scores),
        seconds=round(work.seconds + seconds, 3),
        landed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if package == "ollama-forge" or package in sys.modules:
                versions[package] = importlib.metadata.version(package)
    return versions
