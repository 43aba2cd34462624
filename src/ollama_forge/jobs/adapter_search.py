"""Adapters on the Hugging Face Hub for a model: found by what their repos hold and say, never by the words of a name.

In: words, or a base. Out: `AdapterHit`s with the evidence for each. Landing one is `jobs.hub`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.convert.card import model_id_of
from ollama_forge.errors import ForgeError, NotFoundError
from ollama_forge.jobs.bases import resolve_base
from ollama_forge.source.hub import FoundRepo, base_models, fetch_files, list_repo, search_repos
from ollama_forge.source.hub_files import ADAPTER_CONFIG, RepoListing, choose_adapter_files
from ollama_forge.source.ref import RefKind, parse_ref
from ollama_forge.weights.adapter_config import PeftConfig, read_peft_config

_PEFT_WEIGHTS = "adapter_model.safetensors"
_PEFT_PICKLE = "adapter_model.bin"
_SEARCH_FACTOR = 5
_LARGEST_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class AdapterHit:
    """A repo that holds an adapter.

    Attributes:
        form: `peft`, `gguf`, or `pickle` (which nobody should read).
        bases: the models that its tags name as its base.
        evidence: why it is thought to be one, and to fit.
        obstacle: why it cannot be used; empty when nothing is known against it.
        size_bytes, rank: known only where the repo was looked into.
    """

    repo: str
    form: str
    bases: tuple[str, ...]
    licence: str
    downloads: int
    evidence: tuple[str, ...]
    obstacle: str = ""
    size_bytes: int = 0
    rank: int = 0
    commit: str = ""

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "repo": self.repo,
            "form": self.form,
            "bases": list(self.bases),
            "licence": self.licence,
            "downloads": self.downloads,
            "size": self.size_bytes,
            "rank": self.rank,
            "commit": self.commit,
            "evidence": list(self.evidence),
            "obstacle": self.obstacle,
        }


@dataclass(frozen=True)
class AdapterSearch:
    """What a search found.

    Attributes:
        left_out: repos whose name has the words and which hold no adapter.
    """

    hits: tuple[AdapterHit, ...]
    left_out: int


@dataclass(frozen=True)
class Recommendation:
    """Adapters for a base, the best first; those with an obstacle come last.

    Attributes:
        base_repo: the base's repo on the Hub.
        evidence: how it is known.
    """

    base: str
    base_repo: str
    evidence: tuple[str, ...]
    hits: tuple[AdapterHit, ...]

    @property
    def best(self) -> AdapterHit | None:
        return next((hit for hit in self.hits if not hit.obstacle), None)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "base": self.base,
            "base_repo": self.base_repo,
            "evidence": list(self.evidence),
            "adapters": [hit.document() for hit in self.hits],
        }


def search_adapters(query: str, *, limit: int = 10) -> AdapterSearch:
    """Repos whose name has the words and which hold an adapter.

    Raises:
        HubError: as `source.hub`.
    """
    found = search_repos(query, limit=limit * _SEARCH_FACTOR)
    judged = [(repo, _judge(repo)) for repo in found]
    hits = tuple(hit for _, hit in judged if hit is not None)
    return AdapterSearch(hits[:limit], sum(hit is None for _, hit in judged))


def recommend_adapters(
    base: str, store_path: Path | None = None, *, base_repo: str = "", query: str = "", limit: int = 5
) -> Recommendation:
    """Adapters that say that they were trained on a base; each of the first ones is looked into.

    Args:
        base: a model argument.
        base_repo: its repo on the Hub, where nothing on this disk says it.

    Raises:
        NotFoundError: nothing says where the base comes from.
        HubError: as `source.hub`.
    """
    repo, evidence = (base_repo, ("named by you",)) if base_repo else find_base_repo(base, store_path)
    found = search_repos(query, tags=[f"base_model:adapter:{repo}"], limit=limit * _SEARCH_FACTOR)
    hits = [hit for hit in map(_judge, found) if hit is not None]
    looked = [_look_into(hit, repo) for hit in hits[:limit]]
    looked.sort(key=lambda hit: (bool(hit.obstacle), -hit.downloads, hit.repo))
    return Recommendation(base, repo, evidence, tuple(looked))


def find_base_repo(base: str, store_path: Path | None = None) -> tuple[str, tuple[str, ...]]:
    """The repo on the Hub that a model comes from, by evidence.

    Raises:
        NotFoundError: nothing says it.
    """
    ref = parse_ref(base)
    if ref.kind is RefKind.HUB:
        return ref.repo, ("named by you",)
    resolved = resolve_base(base, store_path)
    if resolved.path is None:
        raise NotFoundError(f"There is no model {base!r} here", next=resolved.command)
    found = resolved.counterpart
    if found is not None and found.relation:
        return found.repo, found.evidence
    if resolved.path.is_dir() and model_id_of(resolved.path).count("/") == 1:
        return model_id_of(resolved.path), ("its folder is the Hugging Face cache's",)
    raise NotFoundError(
        f"Nothing says which repo of the Hub {base!r} comes from",
        why="The file names none, and no model of the Hugging Face cache has its vectors.",
        next=f"Name it: ollama-forge adapters recommend --base {base} --base-repo ORG/NAME",
    )


def _judge(found: FoundRepo) -> AdapterHit | None:
    """What a repo's file list and tags say; None when it holds no adapter."""
    names = set(found.files)
    is_tagged = any(tag.startswith("base_model:adapter:") for tag in found.tags) or "lora" in found.tags
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    obstacle = ""
    if ADAPTER_CONFIG in names and _PEFT_WEIGHTS in names:
        form, why = "peft", f"holds {ADAPTER_CONFIG} and {_PEFT_WEIGHTS}"
    elif ADAPTER_CONFIG in names and _PEFT_PICKLE in names:
        form, why = "pickle", f"holds {ADAPTER_CONFIG} and {_PEFT_PICKLE}"
        obstacle = "Its weights are a pickle, which runs code when it is read."
    elif is_tagged and ggufs:
        form, why = "gguf", "is tagged as an adapter and holds " + (ggufs[0] if len(ggufs) == 1 else "GGUF files")
    else:
        return None
    tagged = tuple(tag for tag in found.tags if tag.startswith("base_model:adapter:"))
    if found.is_gated and not obstacle:
        why += "; it is gated"
    return AdapterHit(
        repo=found.repo,
        form=form,
        bases=base_models(tagged or found.tags),
        licence=next((tag.removeprefix("license:") for tag in found.tags if tag.startswith("license:")), ""),
        downloads=found.downloads,
        evidence=(why, *tagged),
        obstacle=obstacle,
    )


def _look_into(hit: AdapterHit, base_repo: str) -> AdapterHit:
    """Read what the adapter says of itself: a few hundred bytes, no weights."""
    if hit.obstacle:
        return hit
    try:
        listing = list_repo(hit.repo)
        files = choose_adapter_files(listing)
        config = _read_config(listing)
    except ForgeError as error:
        return _with(hit, (), obstacle=f"{error.what}. {error.why}".strip())
    size_bytes = sum(file.size_bytes for file in files)
    if config is None:
        return _with(hit, (), size_bytes=size_bytes, commit=listing.commit)
    said = [f"rank {config.rank}, alpha {config.alpha:g}"]
    obstacle = ""
    if config.base_name:
        said.append(f"{ADAPTER_CONFIG} names {config.base_name}")
        if config.base_name.count("/") == 1 and config.base_name.lower() != base_repo.lower():
            obstacle = f"{ADAPTER_CONFIG} names another base than its tags: {config.base_name}"
    return _with(hit, said, obstacle=obstacle, size_bytes=size_bytes, rank=config.rank, commit=listing.commit)


def _read_config(listing: RepoListing) -> PeftConfig | None:
    file = listing.by_path.get(ADAPTER_CONFIG)
    if file is None or file.size_bytes > _LARGEST_CONFIG_BYTES:
        return None
    return read_peft_config(fetch_files(listing, [file]).folder)


def _with(hit: AdapterHit, evidence: Sequence[str], **changes: Any) -> AdapterHit:
    return replace(hit, evidence=(*hit.evidence, *evidence), **changes)
