"""What goes into a landing and what comes out of it: values only. `land` does the work."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.store.blobs import StagedBlob
from ollama_forge.store.compose import Composition
from ollama_forge.store.digest import Digest
from ollama_forge.store.discard import Discarded
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.name import ModelName

GGUFSource = Digest | Path | StagedBlob
ModelSource = GGUFSource | InstalledModel


@dataclass(frozen=True)
class Ingredients:
    """What a model is made of.

    Attributes:
        model: the weights: a GGUF file (shared or copied into the store, hashed with one read), a blob that is staged
            or
            already there, or an installed model whose layers are shared. When a landing fails, a staged blob goes with
            it; one that was named by its digest stays.
        modelfile: what to set; its FROM, ADAPTER and DRAFT lines are the caller's to resolve and are not read here.
        adapters: LoRA GGUF files, added behind those of the base.
        keeps_adapters: whether those of the base stay.
    """

    model: ModelSource
    modelfile: Modelfile = field(default_factory=Modelfile)
    adapters: tuple[GGUFSource, ...] = ()
    projector: GGUFSource | None = None
    draft: GGUFSource | None = None
    keeps_adapters: bool = True


@dataclass(frozen=True)
class Undo:
    """What `roll_back` needs.

    Attributes:
        previous: the manifest that was replaced; None when the name was free.
        texts: small blobs of the replaced model that went away with it.
        added: the blobs that this landing brought, and their times.
    """

    previous: bytes | None
    texts: tuple[bytes, ...] = field(repr=False)
    added: tuple[tuple[Digest, float], ...]


@dataclass(frozen=True)
class Landed:
    """A model that is in the store under its name.

    Attributes:
        name: as it is spelled in the store, which may differ in case from what was asked for.
        digest: SHA-256 of the manifest, 64 digits, as the API shows it.
        store: the models folder.
        written_bytes: disk that was taken, manifest included.
        shared_bytes: bytes of the model that cost nothing: there before, reflinked or hardlinked.
        check: what the check returned.
        discarded: what went away with the model that was replaced.
    """

    name: ModelName
    digest: str
    store: Path
    written_bytes: int
    shared_bytes: int
    written: tuple[Digest, ...]
    shared: tuple[Digest, ...]
    check: object
    warnings: tuple[str, ...]
    discarded: Discarded
    undo: Undo

    @property
    def has_replaced(self) -> bool:
        return self.undo.previous is not None


@dataclass(frozen=True)
class LandingPlan:
    """What `land` would do, exactly; nothing was changed to find out."""

    name: ModelName
    digest: str
    written_bytes: int
    shared_bytes: int
    replaces: bool
    composition: Composition
