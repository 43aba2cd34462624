"""From a repo on the Hugging Face Hub to a model on this disk: what to take, and the path where it lies afterwards.

In: a `RepoName`. Out: a GGUF with its projector, or a folder of safetensors, in the Hugging Face cache. Landing is
`jobs.hub`'s. One commit is looked at once; everything that is taken is of that commit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import NotFoundError
from ollama_forge.jobs.environment import total_memory_bytes
from ollama_forge.source.gguf_names import GGUFChoice, Pick, list_choices, pick_gguf
from ollama_forge.source.hub import Fetched, fetch_files, list_repo, missing_bytes
from ollama_forge.source.hub_files import (
    HubFile,
    RepoListing,
    RepoName,
    choose_adapter_files,
    choose_model_files,
)


@dataclass(frozen=True)
class GGUFPlan:
    """A GGUF of a repo, chosen and not yet here.

    Attributes:
        projector: to land with it; None when it has none or it is not wanted.
    """

    listing: RepoListing
    pick: Pick
    projector: HubFile | None

    @property
    def choice(self) -> GGUFChoice:
        return self.pick.choice

    @property
    def files(self) -> tuple[HubFile, ...]:
        return (*self.choice.files, *((self.projector,) if self.projector else ()))

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def missing_bytes(self) -> int:
        """What is still to be downloaded."""
        return missing_bytes(self.listing, self.files)

    def fetch(self) -> FetchedGGUF:
        """Download and verify it."""
        fetched = fetch_files(self.listing, self.files)
        projector = fetched.path(self.projector) if self.projector else None
        return FetchedGGUF(self, fetched, fetched.path(self.choice.files[0]), projector)


@dataclass(frozen=True)
class FetchedGGUF:
    """A GGUF of a repo on this disk; `path` is the first file of a split set."""

    plan: GGUFPlan
    fetched: Fetched
    path: Path
    projector: Path | None


def plan_gguf(named: RepoName, *, projector: bool = True) -> GGUFPlan:
    """Choose a GGUF of a repo.

    Args:
        projector: take the mmproj too, where the repo has one (that is: where the model sees or hears).

    Raises:
        HubError: as `source.hub.list_repo`.
        NotFoundError, UsageError: as `source.gguf_names.pick_gguf`.
    """
    listing = list_repo(named.repo, named.revision)
    pick = pick_gguf(listing, quant=named.quant, file=named.file, memory_bytes=total_memory_bytes())
    return GGUFPlan(listing, pick, pick.projector if projector else None)


def fetch_folder(named: RepoName) -> Fetched:
    """A repo's safetensors model as a folder on this disk.

    Raises:
        HubError, DiskError: as `source.hub`.
        NotFoundError, UnsafeFileError: as `source.hub_files.choose_model_files`.
    """
    listing = list_repo(named.repo, named.revision)
    return fetch_files(listing, choose_model_files(listing))


def fetch_adapter_files(named: RepoName) -> tuple[Fetched, Path]:
    """A repo's adapter on this disk: its PEFT folder, or its LoRA GGUF.

    Raises:
        HubError, DiskError: as `source.hub`.
        NotFoundError, UnsafeFileError, UsageError: as `source.hub_files.choose_adapter_files`.
    """
    listing = list_repo(named.repo, named.revision)
    files: tuple[HubFile, ...]
    if named.file:
        files = (pick_gguf(listing, file=named.file).choice.files[0],)
    else:
        files = choose_adapter_files(listing)
    fetched = fetch_files(listing, files)
    is_gguf = len(files) == 1
    return fetched, fetched.path(files[0]) if is_gguf else fetched.folder


def fetch_file(named: RepoName) -> Path:
    """One file of a repo on this disk; a GGUF that is split comes whole.

    Raises:
        HubError, DiskError: as `source.hub`.
        NotFoundError: the repo has no such file.
    """
    listing = list_repo(named.repo, named.revision)
    sets = [choice.files for choice in list_choices(listing.files) if choice.files[0].path == named.file]
    files = sets[0] if sets else tuple(file for file in listing.files if file.path == named.file)
    if not files:
        raise NotFoundError(
            f"{named.repo!r} has no file {named.file!r} at {named.revision or 'its main revision'}",
            next=f"ollama-forge fetch {named.repo} lists what it has, if you name a quantization that it lacks.",
        )
    return fetch_files(listing, files).path(files[0])


def fetch_model_path(named: RepoName) -> Path:
    """A model argument's repo on this disk: the GGUF that was named, else its safetensors folder, else its best GGUF.

    Raises:
        As `plan_gguf` and `fetch_folder`.
    """
    if named.file or named.quant:
        return plan_gguf(named, projector=False).fetch().path
    listing = list_repo(named.repo, named.revision)
    if listing.has_safetensors or listing.is_adapter:
        return fetch_files(listing, choose_model_files(listing)).folder
    pick = pick_gguf(listing, memory_bytes=total_memory_bytes())
    return GGUFPlan(listing, pick, None).fetch().path
