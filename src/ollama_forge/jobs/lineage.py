"""Every landing leaves a record: what the model was made from, how, with which versions.

In: what a job knows of its work (`working`) and what was landed. Out: an entry and a `Landing` in the registry. A
record that cannot be written never costs the landing: it becomes a warning.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import enum
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import DigestError, ForgeError
from ollama_forge.files import hash_file
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import parse_digest
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.landed import Landed
from ollama_forge.store.modelfile import Modelfile, render_modelfile

if TYPE_CHECKING:
    from ollama_forge.registry.document import Document, Landing

_SNAPSHOT = re.compile(r"models--(?P<repo>[^/\\]+)[/\\]snapshots[/\\](?P<commit>[0-9a-f]{40})")
_VERSIONED = ("ollama-forge", "xllamacpp", "torch", "transformers", "peft")
_HASHED_BYTES = 1 << 30
_SHOWN = 500


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
        return Ingredient(role, "hf:" + match["repo"].replace("--", "/"), commit=match["commit"])
    with contextlib.suppress(DigestError):
        return Ingredient(role, str(model.absolute()), str(parse_digest(model.name)))
    return Ingredient(role, str(model.absolute()))


def file_ingredient(path: Path, role: str) -> Ingredient:
    """A file that a job reads, by the hash of its bytes where that takes no more than a moment."""
    known = ingredient_of(path, role)
    if known.digest or known.commit or not path.is_file() or path.stat().st_size > _HASHED_BYTES:
        return known
    with contextlib.suppress(ForgeError):
        return dataclasses.replace(known, digest=f"sha256:{hash_file(path).sha256}")
    return known


def source_work(
    source: Path | InstalledModel | None, adapters: Sequence[Path], changes: Modelfile, quantization: object = None
) -> Work:
    """What a plain landing is made of: weights, adapters, a Modelfile's wishes, perhaps a quantization."""
    parameters: dict[str, Any] = {}
    text = render_modelfile(dataclasses.replace(changes, sources=("BASE",), warnings=()))
    if text.strip() != "FROM BASE":
        parameters["modelfile"] = text
    if quantization is not None:
        parameters["conversion" if _is_folder(source) else "quantization"] = plain_value(quantization)
    base = () if source is None else (ingredient_of(source),)
    step = "import" if _is_folder(source) else "create" if quantization is None else "quantize"
    return Work(step, (*base, *(file_ingredient(path, "adapter") for path in adapters)), parameters)


def record_landing(landed: Landed, work: Work, seconds: float, registry_path: Path | None = None) -> tuple[str, ...]:
    """Write down a model that has just got its name; returns warnings, never raises what a registry can raise."""
    if not _RECORDS.get():
        return ()
    from ollama_forge.registry.registry_file import find_registry, update_registry

    path = find_registry(registry_path or _REGISTRY.get())
    outer = _WORK.get()
    whole = work if outer is None else _added(outer, work)
    try:
        landing = _landing(landed, whole, seconds)
        found = Store(landed.store)
        update_registry(path, lambda document: _with_landed(document, found, landed, landing))
    except (ForgeError, OSError, ValueError) as exc:
        what = exc.what if isinstance(exc, ForgeError) else str(exc)
        return (f"The landing is not in the registry {str(path)!r}: {what}",)
    return ()


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
    if any(one.role == "base" for one in outer.ingredients):
        news = tuple(one for one in news if one.role != "base")  # a step in between, not where it came from
    return Work(
        outer.step,
        (*outer.ingredients, *news),
        {**inner.parameters, **outer.parameters},
        {**inner.scores, **outer.scores},
        inner.seconds + outer.seconds,
    )


def _landing(landed: Landed, work: Work, seconds: float) -> Landing:
    from datetime import datetime, timezone

    from ollama_forge.registry.document import Landing, Parent

    return Landing(
        name=landed.name.display,
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


def _with_landed(document: Document, store: Store, landed: Landed, landing: Landing) -> Document:
    from ollama_forge.registry.importing import plan_import
    from ollama_forge.registry.inventory import Inventory, find_installed

    found = find_installed(store, store.find(landed.name))
    inventory = Inventory("store", str(store.models_dir), (found,), is_whole=False)
    return plan_import(document, inventory).document.with_landing(f"sha256:{landed.digest}", landing)


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if package == "ollama-forge" or package in sys.modules:
                versions[package] = importlib.metadata.version(package)
    return versions
