"""Make a model again from its record, and see whether it has the same digest.

In: the registry and a model. Out: `Rebuilt`. It is made in a store of its own beside the one that it is in, under the
names that were recorded, because a manifest holds names; that store shares the blobs of bases, and goes away at the
end. How each step is repeated is `jobs.rebuild_steps`'s business.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import NameInvalidError, NotFoundError, StoreError
from ollama_forge.files import Progress, disk_error, no_progress
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel
from ollama_forge.jobs.lineage import content_digest, unrecorded
from ollama_forge.jobs.rebuild_steps import MADE_ON_THE_WAY, MODELS, find_source, repeat_step, require_repeatable
from ollama_forge.registry.document import Document, Landing, Parent
from ollama_forge.registry.lifecycle import find_entries, store_folder
from ollama_forge.store.catalog import Store
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.name import parse_name
from ollama_forge.store.publish import publish_manifest


@dataclass(frozen=True)
class RebuildStep:
    """One thing that will be made again, from what, with what."""

    name: str
    step: str
    digest: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Rebuilt:
    """What came of it; `digest` is empty in a dry run."""

    name: str
    recorded_digest: str
    digest: str
    steps: tuple[RebuildStep, ...]
    is_dry_run: bool = False

    @property
    def is_same(self) -> bool:
        return self.digest == self.recorded_digest

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "recorded_digest": self.recorded_digest,
            "digest": self.digest,
            "same": None if self.is_dry_run else self.is_same,
            "steps": [
                {"name": one.name, "step": one.step, "digest": one.digest, "sources": list(one.sources)}
                for one in self.steps
            ],
            "dry_run": self.is_dry_run,
        }


def rebuild(
    document: Document, ref: str, *, whole: bool = False, dry_run: bool = False, progress: Progress = no_progress
) -> Rebuilt:
    """Make the model of `ref` again in its own store.

    Args:
        whole: also what it was made from, as far back as the records go; else bases that are installed are taken.

    Raises:
        NotFoundError: no record of how it was made, or a source that is gone.
        StoreError: a source that is another one by now.
        UnsupportedError: a step that cannot be made again.
    """
    entry = find_entries(document, [ref])[0]
    folder = store_folder(entry)
    if folder is None:
        raise NotFoundError(f"{entry.name!r} is in no store of this machine", next="ollama-forge registry import")
    digest = entry.identity.manifest_digest
    work, name = _Rebuild(document, folder, whole), entry.served_model_id or entry.name
    work.plan(digest, name)
    if dry_run:
        return Rebuilt(entry.name, digest, "", tuple(work.steps), is_dry_run=True)
    with _scratch_store(folder) as scratch, unrecorded():
        options = LandOptions(scratch.models_dir, overwrite=True, check=False, progress=progress)
        made = work.make(digest, name, scratch, options)
    return Rebuilt(entry.name, digest, f"sha256:{made.digest}", tuple(work.steps))


@contextlib.contextmanager
def _scratch_store(beside: Path) -> Iterator[Store]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=".forge-rebuild-", dir=beside.parent)
    except OSError as exc:
        raise disk_error(exc, beside.parent, "make a store beside") from exc
    with folder as name:
        yield Store(Path(name))


def _share_into(scratch: Store, model: InstalledModel, name: str) -> InstalledModel:
    """An installed model in the scratch store too, under the recorded name; where links are possible nothing is
    copied."""
    for layer in dict.fromkeys(model.manifest.all_layers):
        scratch.blobs.put_file(model.blobs.path(layer.digest), digest=layer.digest)
    raw = Store(model.blobs.blobs_dir.parent).read_manifest_bytes(model.name) or b""
    publish_manifest(scratch, parse_name(name), raw, overwrite=True)
    return scratch.find(name)


def _find_exact(folder: Path, name: str, digest: str) -> InstalledModel | None:
    """The model of that name in a store, if it has that digest."""
    with contextlib.suppress(NotFoundError, NameInvalidError):  # a path is no name
        model = Store(folder).find(name)
        return model if f"sha256:{model.digest}" == digest else None
    return None


class _Rebuild:
    """A rebuild under way: first `plan`, then `make`."""

    def __init__(self, document: Document, folder: Path, whole: bool) -> None:
        self._document = document
        self._folder = folder
        self._whole = whole
        self.steps: list[RebuildStep] = []

    def plan(self, digest: str, name: str) -> None:
        """Check every source; the oldest step comes first."""
        landing = self._landing(digest, name)
        for parent in landing.parents:
            if parent.role in MODELS and self._is_made_again(parent):
                self.plan(parent.digest, parent.ref)
            elif parent.role not in MADE_ON_THE_WAY.get(landing.step, ()):
                self._require(parent)
        sources = tuple(f"{one.role}: {one.ref}" for one in landing.parents)
        step = RebuildStep(landing.name, landing.step, digest, sources)
        if step not in self.steps:
            self.steps.append(step)

    def make(self, digest: str, name: str, scratch: Store, options: LandOptions) -> LandedModel:
        """Make it, and before it what it was made from, in the scratch store."""
        landing = self._landing(digest, name)
        models = {one.role: self._place(one, scratch, options) for one in landing.parents if one.role in MODELS}
        return repeat_step(landing, models, options)

    def _place(self, parent: Parent, scratch: Store, options: LandOptions) -> InstalledModel | Path:
        """A model that the step reads: in the scratch store, or where its file or folder lies."""
        made = _find_exact(scratch.models_dir, parent.ref, parent.digest)
        if made is not None:
            return made
        if self._is_made_again(parent):
            return scratch.find(self.make(parent.digest, parent.ref, scratch, options).name)
        installed = self._installed(parent)
        return find_source(parent) if installed is None else _share_into(scratch, installed, parent.ref)

    def _landing(self, digest: str, name: str) -> Landing:
        """How it was made last: the same bytes may have come about in another way under another name."""
        landings = self._document.lineage.get(digest, ())
        if not landings:
            raise NotFoundError(
                f"How {name!r} was made is not recorded",
                why="Only what this tool lands is.",
                next=f"See what is known: ollama-forge registry lineage {name}",
            )
        landing = next((one for one in reversed(landings) if one.name == name), landings[-1])
        require_repeatable(landing)
        return landing

    def _is_made_again(self, model: Parent) -> bool:
        return model.digest in self._document.lineage and (self._whole or self._installed(model) is None)

    def _installed(self, parent: Parent) -> InstalledModel | None:
        """The Ollama model of that digest: under the recorded name beside what was made of it, or where the registry
        knows one."""
        places = [(self._folder, parent.ref)]
        for entry in self._document.models.values():
            store = store_folder(entry)
            if entry.identity.manifest_digest == parent.digest and store and entry.served_model_id:
                places.append((store, entry.served_model_id))
        found = (_find_exact(store, name, parent.digest) for store, name in places)
        return next((model for model in found if model is not None), None)

    def _require(self, parent: Parent) -> None:
        if parent.role in MODELS and self._installed(parent) is not None:
            return
        if parent.commit:
            return  # of the Hub, which is asked for that very commit
        path = Path(parent.ref)
        if not path.is_absolute():
            raise NotFoundError(
                f"Ollama no longer has the {parent.role} {parent.ref!r} that was recorded",
                why=f"No model here has the digest {parent.digest or '(none was recorded)'}.",
                next="Pull or make that very version again; if it has another name now: ollama-forge registry import",
            )
        if not path.exists():
            raise NotFoundError(
                f"The {parent.role} {parent.ref!r} is gone", next="Bring it back to that place, then run this again."
            )
        if parent.digest and content_digest(path) != parent.digest:
            raise StoreError(
                f"The {parent.role} {parent.ref!r} is another one by now",
                why=f"{parent.digest} was recorded.",
                next="Bring the old one back.",
            )
