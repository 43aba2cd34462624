"""Where a recipe's weights come from, found and pinned, but not yet fetched.

In: a recipe's `Source`. Out: `FoundSource`: its key (what its bytes are), what is still to be downloaded, and the way
to the model on this disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.errors import RecipeError
from ollama_forge.gguf.reader import shard_paths
from ollama_forge.jobs.environment import total_memory_bytes
from ollama_forge.jobs.hub_local import GGUFPlan
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.recipe.inputs import Fingerprints, hash_of
from ollama_forge.recipe.read import Source
from ollama_forge.source.gguf_names import list_choices, pick_gguf
from ollama_forge.source.hub import fetch_files, list_repo, missing_bytes
from ollama_forge.source.hub_files import HubFile, RepoListing, choose_model_files
from ollama_forge.source.ref import RefKind, parse_ref
from ollama_forge.store.server import OllamaServer


@dataclass(frozen=True)
class FoundSource:
    """A source that is there.

    Attributes:
        key: hash of what it is made of.
        facts: what the lock says of it.
        size_bytes: of its weights.
        missing_bytes: what is still to be downloaded.
        local: the model, where it lies on this disk already.
        quantize: what safetensors are quantized to because the recipe's `quant` says so.
        said: how it was chosen, in words.
        is_served: the weights are in the server that the model is made in, and stay there.
    """

    source: Source
    key: str
    facts: dict[str, Any]
    size_bytes: int
    missing_bytes: int = 0
    local: ResolvedModel | None = None
    projector: Path | None = None
    quantize: str | None = None
    said: str = ""
    warnings: tuple[str, ...] = ()
    is_served: bool = False
    _fetch: Callable[[], tuple[ResolvedModel, Path | None]] | None = field(default=None, repr=False)

    def fetch(self) -> FoundSource:
        """The same, with its model on this disk."""
        if self.local is not None or self._fetch is None:
            return self
        model, projector = self._fetch()
        return replace(self, local=model, projector=projector)

    @property
    def commit(self) -> str:
        return str(self.facts.get("commit", ""))


def find_source(
    source: Source,
    fingerprints: Fingerprints,
    store_path: Path | None,
    *,
    commit: str = "",
    server: OllamaServer | None = None,
) -> FoundSource:
    """Find a recipe's source.

    Args:
        commit: take a repo at this commit, whatever its branches say by now.
        server: where the model will be made; a base of that name there comes before one of this disk.

    Raises:
        NotFoundError: it is not there.
        HubError: as `source.hub`.
    """
    if source.repo is not None:
        return _find_on_hub(source, commit)
    if server is not None and parse_ref(source.ref).kind is RefKind.OLLAMA and server.has(source.ref):
        facts: dict[str, Any] = {"kind": source.kind, "ref": source.text, "server": server.address.url}
        return FoundSource(source, hash_of(facts), facts, 0, is_served=True)
    model = resolve(source.ref, store_path)
    if model.installed is not None:
        facts = {"kind": source.kind, "ref": source.text, "digest": f"sha256:{model.installed.digest}"}
        return FoundSource(source, hash_of(facts["digest"]), facts, _size_of(model), local=model)
    path = model.folder or model.gguf_path
    assert path is not None
    hashes = fingerprints.files(_parts_of(model), source.text)
    if not hashes:
        raise RecipeError(f"{source.text!r} holds nothing that a model consists of", next="Check the path.")
    facts = {"kind": source.kind, "ref": source.text, "files": {name: f"sha256:{sha}" for name, sha in hashes.items()}}
    # A folder's name becomes the model's own name in its GGUF.
    key = hash_of([sorted(hashes.values()), path.resolve().name if model.folder else ""])
    quantize = source.quant if model.folder is not None and source.quant else None
    return FoundSource(source, key, facts, _size_of(model), local=model, quantize=quantize)


def _parts_of(model: ResolvedModel) -> list[Path]:
    if model.folder is not None:
        return [model.folder]
    assert model.gguf_path is not None
    return shard_paths(model.gguf_path)


def _size_of(model: ResolvedModel) -> int:
    if model.folder is not None:
        return sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
    return sum(path.stat().st_size for path in _parts_of(model))


def _find_on_hub(source: Source, commit: str) -> FoundSource:
    named = source.repo
    assert named is not None
    listing = list_repo(named.repo, commit or named.revision)
    is_gguf = bool(named.file) or (source.kind != "checkpoint" and bool(list_choices(listing.files)))
    if is_gguf:
        pick = pick_gguf(listing, quant=named.quant, file=named.file, memory_bytes=total_memory_bytes())
        plan = GGUFPlan(listing, pick, pick.projector)
        said = f"{pick.choice.path}: {pick.why}" if pick.why else pick.choice.path

        def fetch_gguf() -> tuple[ResolvedModel, Path | None]:
            fetched = plan.fetch()
            return ResolvedModel(source.text, gguf_path=fetched.path), fetched.projector

        return _pinned(source, listing, plan.files, said, None, fetch_gguf)
    files = choose_model_files(listing)

    def fetch_folder() -> tuple[ResolvedModel, Path | None]:
        return ResolvedModel(source.text, folder=fetch_files(listing, files).folder), None

    return _pinned(source, listing, files, f"{named.repo}: safetensors", named.quant or None, fetch_folder)


def _pinned(
    source: Source,
    listing: RepoListing,
    files: tuple[HubFile, ...],
    said: str,
    quantize: str | None,
    fetch: Callable[[], tuple[ResolvedModel, Path | None]],
) -> FoundSource:
    facts = {
        "kind": source.kind,
        "ref": source.text,
        "repo": listing.repo,
        "commit": listing.commit,
        "files": {file.path: file.etag for file in sorted(files, key=lambda file: file.path)},
    }
    offline = f"{listing.why_offline}. The cache's own {listing.repo} at {listing.commit[:12]} was used."
    return FoundSource(
        source,
        hash_of([listing.repo, facts["files"]]),
        facts,
        size_bytes=sum(file.size_bytes for file in files),
        missing_bytes=missing_bytes(listing, files),
        quantize=quantize,
        said=said,
        warnings=(offline,) if listing.is_offline else (),
        _fetch=fetch,
    )
