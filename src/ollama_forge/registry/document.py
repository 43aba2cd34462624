"""The registry as a value: what each model is, and how it came about. Bytes in, `Document` out, and back.

One spelling only: sorted keys, no clock but the times that were recorded, a newline at the end. So the same facts are
the same bytes. Fields that this version does not know are kept. Where the file lies is `registry_file`'s business.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ollama_forge.errors import RegistryError

SCHEMA_VERSION = 1
LIMIT_BYTES = 256 << 20

Presence = Literal["present", "absent", "unknown"]


class Record(BaseModel):
    """What all parts of the document share: they are never changed in place, and keep fields that are not theirs."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class BlobRecord(Record):
    """One layer of a model. `kind` is the last word of its media type: `model`, `adapter`, `projector`, `params` ..."""

    kind: str
    digest: str
    size_bytes: int = 0


class Identity(Record):
    """What a model is made of, whatever it is called.

    Attributes:
        manifest_digest: `sha256:` and 64 digits of Ollama's manifest; empty where it is not known.
        metadata_hash: SHA-256 over the GGUF header's plain values up to its vocabulary.
    """

    manifest_digest: str = ""
    blobs: tuple[BlobRecord, ...] = ()
    metadata_hash: str = ""


class RegistryEntry(Record):
    """A model that the registry knows; `name` is its key.

    Attributes:
        served_model_id: the name that Ollama knows, letter by letter.
        store: the models folder, or the server's address; empty where it is not known.
        presence: whether Ollama had it when it was last looked at.
        capabilities: Ollama's words (`completion`, `tools`, `vision` ...), read from the model.
        previous_digests: manifests that had the same name earlier, the oldest first.
    """

    name: str
    display_name: str = ""
    backend: str = "ollama"
    family: str = ""
    architecture: str = ""
    quantization: str | None = None
    parameter_size: str = ""
    download_format: str | None = None
    download_location: str | None = None
    download_path: str | None = None
    download_size_bytes: int | None = None
    served_model_id: str | None = None
    source_provider: str | None = None
    store: str = ""
    presence: Presence = "unknown"
    roles: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    deprecated: bool = False
    identity: Identity = Identity()
    previous_digests: tuple[str, ...] = ()
    scores: dict[str, float] = {}

    @property
    def is_placeholder(self) -> bool:
        """Whether it is a legacy `model-ollama-gguf*` entry that stands for no model that was ever seen."""
        is_named_so = self.backend == "ollama" and self.name.startswith("model-ollama-gguf")
        return is_named_so and not self.identity.manifest_digest and self.presence != "present"

    @property
    def is_logical(self) -> bool:
        """Whether nothing says where its bytes lie."""
        return not self.download_path


class Parent(Record):
    """Something that a model was made from.

    Attributes:
        role: `base`, `adapter`, `data`, `imatrix` ...
        ref: what the person named.
        digest: `sha256:...` of the parent's manifest or file, where it is known.
        commit: the revision of a Hugging Face repo.
    """

    role: str
    ref: str = ""
    digest: str = ""
    commit: str = ""


class Landing(Record):
    """How a model came about, once. `landed_at` and `seconds` are what the clock said then."""

    name: str
    step: str
    parents: tuple[Parent, ...] = ()
    parameters: dict[str, Any] = {}
    versions: dict[str, str] = {}
    scores: dict[str, float] = {}
    seconds: float = 0.0
    landed_at: str = ""

    def is_same_work(self, other: Landing) -> bool:
        """Whether the other one did the same, at whatever time."""
        clock = {"seconds", "landed_at"}
        return self.model_dump(exclude=clock) == other.model_dump(exclude=clock)


class Document(Record):
    """The whole registry: entries by name, landings by the digest of the manifest that they made."""

    schema_version: int = Field(default=SCHEMA_VERSION, strict=True)
    models: dict[str, RegistryEntry] = Field(default_factory=dict)
    lineage: dict[str, tuple[Landing, ...]] = Field(default_factory=dict)

    def with_models(self, models: dict[str, RegistryEntry]) -> Document:
        """The same registry with other entries."""
        return self.model_copy(update={"models": models})

    def with_landing(self, digest: str, landing: Landing) -> Document:
        """One landing more, unless the same work is recorded already."""
        known = self.lineage.get(digest, ())
        if any(landing.is_same_work(other) for other in known):
            return self
        return self.model_copy(update={"lineage": {**self.lineage, digest: (*known, landing)}})


def parse_document(raw: bytes, source: str = "the registry") -> Document:
    """Read a registry of any version, or the list that its predecessor wrote.

    Raises:
        RegistryError: not JSON, of a newer version, or a field of the wrong type (which one is said).
    """
    if len(raw) > LIMIT_BYTES:
        raise _broken(source, f"It has {len(raw):,} bytes; the limit is {LIMIT_BYTES:,}.")
    if not raw[:1024].lstrip().startswith(b"["):
        try:
            with _uncollected():
                document = Document.model_validate_json(raw)
        except ValidationError as exc:
            document = _parse_old(raw, source, exc)
        if "schema_version" in document.model_fields_set and document.schema_version == SCHEMA_VERSION:
            return _with_its_names(document, source)
    return _parse_old(raw, source, None)


def render_document(document: Document) -> bytes:
    """The one spelling of a registry: same value, same bytes."""
    with _uncollected():
        plain = document.model_dump(mode="json", exclude_none=True)
        text = json.dumps(plain, ensure_ascii=False, sort_keys=True, indent=1)
    return (text + "\n").encode("utf-8")


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without the garbage collector: it would walk the growing document again and again, which triples the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _parse_old(raw: bytes, source: str, problem: ValidationError | None) -> Document:
    try:
        plain = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        raise _broken(source, f"It is not JSON: {exc}") from exc
    migrated = migrate(plain, source)
    if problem is not None and migrated is plain:
        raise _broken(source, _words(problem)) from problem
    try:
        document = Document.model_validate(migrated)
    except ValidationError as exc:
        raise _broken(source, _words(exc)) from exc
    return _with_its_names(document, source)


def migrate(plain: Any, source: str = "the registry") -> Any:
    """A registry of an older version as one of this version; the same object when there is nothing to do.

    Raises:
        RegistryError: a version that is not known, or no registry at all.
    """
    version = 0 if isinstance(plain, list) else plain.get("schema_version") if isinstance(plain, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise _broken(source, "It has no schema_version.")
    if version > SCHEMA_VERSION:
        raise RegistryError(
            f"{source} was written by a newer version of this tool (schema {version}; this one knows {SCHEMA_VERSION})",
            why="It is left as it is.",
            next="Update: pip install -U ollama-forge",
        )
    while version < SCHEMA_VERSION:
        if version not in MIGRATIONS:
            raise _broken(source, f"There is no schema {version}.")
        plain = MIGRATIONS[version](plain, source)
        version += 1
    return plain


def _from_predecessor(entries: Any, source: str) -> dict[str, Any]:
    """Version 0: the list of entries in the predecessor's `configs/model_registry.json`."""
    models: dict[str, Any] = {}
    for number, old in enumerate(entries if isinstance(entries, list) else entries.get("models", []), 1):
        if not isinstance(old, dict) or not isinstance(old.get("name"), str) or not old["name"]:
            raise _broken(source, f"Entry {number} has no name.")
        if old["name"] in models:
            raise _broken(source, f"Two entries have the name {old['name']!r}.")
        models[old["name"]] = _entry_from_predecessor(old)
    return {"schema_version": 1, "models": models, "lineage": {}}


def _entry_from_predecessor(old: dict[str, Any]) -> dict[str, Any]:
    entry = {key: value for key, value in old.items() if value is not None}
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict):
        entry["capabilities"] = sorted(word for word, has in capabilities.items() if has)
    path = entry.get("download_path")
    if isinstance(path, str) and path.startswith("ollama:/") and not path.startswith("ollama://"):
        entry["download_path"] = "ollama://" + path.removeprefix("ollama:/").lstrip("/")
    entry.setdefault("display_name", old["name"])
    return entry


MIGRATIONS: dict[int, Callable[[Any, str], dict[str, Any]]] = {0: _from_predecessor}
"""Version -> what makes the next version of it."""


def _with_its_names(document: Document, source: str) -> Document:
    for name, entry in document.models.items():
        if name != entry.name:
            raise _broken(
                source, f"The entry {name!r} says that its name is {entry.name!r}: another name than its key."
            )
    return document


def _words(problem: ValidationError) -> str:
    first = problem.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _broken(source: str, why: str) -> RegistryError:
    return RegistryError(
        f"{source} is not a registry that can be read",
        why=why,
        next="Take the last version back: ollama-forge registry undo; or name another file with --registry PATH.",
    )
