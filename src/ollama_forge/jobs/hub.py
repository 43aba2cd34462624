"""Whole jobs that begin on the Hugging Face Hub and end in Ollama: a GGUF fetched, a repo imported, an adapter landed.

In: a repo, and what the model is to be called. Out: `HubLanding`, which also says what was taken and why.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.convert.plan import plan_conversion
from ollama_forge.errors import UsageError
from ollama_forge.files import require_free_space
from ollama_forge.jobs.conversion import ConvertOptions, PlannedGGUF
from ollama_forge.jobs.hub_local import GGUFPlan, fetch_adapter_files, plan_gguf
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder, land_gguf, land_planned
from ollama_forge.jobs.lineage import Ingredient, modelfile_text, working
from ollama_forge.jobs.merging import MergedModel, MergeInput, MergeOptions, merge_and_land, retrain
from ollama_forge.jobs.resolve import resolve
from ollama_forge.source.hub import Fetched, fetch_files, list_repo, missing_bytes
from ollama_forge.source.hub_cache import find_hub_cache
from ollama_forge.source.hub_files import RepoListing, RepoName, choose_model_files
from ollama_forge.source.hub_stream import ShardStream, open_stream
from ollama_forge.store.catalog import open_store
from ollama_forge.store.discard import exists_error
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.name import parse_name, validate_writable

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubLanding:
    """A model that came from the Hub and is in Ollama now.

    Attributes:
        files: of the repo, as they were taken.
        downloaded_bytes: what came over the wire (in a dry run: would come); the rest was in the cache.
        why: how the file was chosen, when nobody named it.
        projector: the file that was landed beside the weights, or that was left out (`has_projector` tells).
    """

    landed: LandedModel
    listing: RepoListing
    files: tuple[str, ...]
    downloaded_bytes: int
    quant: str = ""
    why: str = ""
    projector: str = ""
    has_projector: bool = False
    merged: MergedModel | None = None
    warnings: tuple[str, ...] = field(default=())

    def document(self) -> dict[str, Any]:
        """What a command adds to the landing's own JSON."""
        return {
            "repo": self.listing.repo,
            "revision": self.listing.revision,
            "commit": self.listing.commit,
            "files": list(self.files),
            "quant": self.quant,
            "why": self.why,
            "projector": self.projector if self.has_projector else "",
            "licence": self.listing.licence,
            "downloaded_bytes": self.downloaded_bytes,
            "offline": self.listing.is_offline,
        }


def default_name(repo: str) -> str:
    """The Ollama name of a repo when nobody gives one: `Qwen/Qwen3-0.6B-GGUF` -> `qwen3-0.6b`."""
    name = repo.split("/")[-1].lower()
    name = re.sub(r"[-_.]?gguf$", "", name) or name
    return re.sub(r"[^a-z0-9._-]", "-", name).strip("-._")


def fetch_model(
    named: RepoName,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    say: Say,
    *,
    projector: bool | None = None,
) -> HubLanding:
    """A GGUF of a repo becomes an Ollama model.

    Args:
        projector: land the mmproj too; None: when the repo has one.

    Raises:
        As `source.hub`, `source.gguf_names` and `jobs.landing`.
    """
    validate_writable(parse_name(name))
    plan = plan_gguf(named, projector=projector is not False and options.server is None)
    _require_free_name(name, options, plan)
    if projector and plan.pick.projector is None:
        raise UsageError(f"{named.repo!r} has no projector", next="Leave --projector out.")
    _say_choice(plan, say)
    warnings = _offline_warnings(plan.listing)
    if plan.pick.projector and not plan.projector:
        reason = "a server takes none" if options.server is not None else "--no-projector"
        warnings += (f"{plan.pick.projector.path} was left out ({reason}): the model reads text only.",)
    missing = plan.missing_bytes
    if options.dry_run:
        landed = _planned(name, plan.size_bytes, missing, options, plan)
    else:
        found = plan.fetch()
        missing = found.fetched.downloaded_bytes
        landed = land_gguf(found.path, name, changes, options, projector=found.projector)
    return HubLanding(
        landed=landed,
        listing=plan.listing,
        files=tuple(file.path for file in plan.files),
        downloaded_bytes=missing,
        quant=plan.choice.quant,
        why=plan.pick.why,
        projector=plan.pick.projector.path if plan.pick.projector else "",
        has_projector=plan.projector is not None,
        warnings=warnings,
    )


def import_repo(
    named: RepoName,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    conversion: ConvertOptions,
    *,
    keep_source: bool = True,
) -> HubLanding:
    """A repo's safetensors become a quantized Ollama model.

    Args:
        keep_source: leave the files in the cache. Otherwise each shard comes when it is needed and goes once it is
            used; a model that the cache has already is used and stays.

    Raises:
        As `source.hub`, `source.hub_files.choose_model_files` and `jobs.landing`.
    """
    validate_writable(parse_name(name))
    if named.file or named.quant:
        raise UsageError(
            f"import takes the whole of {named.repo!r}, not {named.file or named.quant!r} of it",
            why="It reads safetensors; which quantization it makes is said by --quant.",
            next=f"ollama-forge import {named.repo} --name {name}, or for a GGUF: ollama-forge fetch {named.repo}",
        )
    _require_free_name(name, options)
    listing = list_repo(named.repo, named.revision)
    files = choose_model_files(listing)
    paths = tuple(file.path for file in files)
    missing = missing_bytes(listing, files)
    if options.dry_run and missing:
        size_bytes = sum(file.size_bytes for file in files)
        landed = _planned(name, size_bytes, missing, options, None)
        landed = replace(
            landed, warnings=("How large the model will be is known once its files are here; it is at most so large.",)
        )
        return HubLanding(landed, listing, paths, missing, warnings=_offline_warnings(listing))
    if missing and not keep_source and not listing.is_offline:
        source = Ingredient("base", f"hf:{listing.repo}", commit=listing.commit)
        with (
            open_stream(listing, files) as stream,
            working("import", [source], conversion=conversion, modelfile=modelfile_text(changes)),
        ):
            landed = land_planned(lambda: _open_streamed(stream, conversion), name, changes, options)
        return HubLanding(landed, listing, paths, stream.downloaded_bytes)
    fetched = fetch_files(listing, files)
    landed = import_folder(fetched.folder, name, changes, options, conversion)
    return HubLanding(landed, listing, paths, fetched.downloaded_bytes, warnings=_offline_warnings(listing))


@contextlib.contextmanager
def _open_streamed(stream: ShardStream, conversion: ConvertOptions) -> Iterator[PlannedGGUF]:
    with plan_conversion(stream.folder, conversion) as plan:
        plan.checkpoint.before_read = stream.need
        entries = [replace(entry, chunks=functools.partial(stream.watched, entry.chunks)) for entry in plan.entries]
        yield PlannedGGUF(plan.fields, entries, plan.size_bytes, warnings=plan.warnings)


def land_adapter(
    named: RepoName, base: str, name: str, changes: Modelfile, options: LandOptions, *, merge: bool = False
) -> HubLanding:
    """A repo's adapter on a base of this disk becomes an Ollama model: as a layer, or merged.

    Raises:
        As `source.hub`, `source.hub_files.choose_adapter_files` and `jobs.merging`.
    """
    validate_writable(parse_name(name))
    model = resolve(base, options.store_path)
    fetched, path = fetch_adapter_files(named)
    merged = None
    if merge:
        merged, landed = merge_and_land(model, [MergeInput(path)], name, changes, options, MergeOptions())
    else:
        landed = retrain(base, [path], name, changes, options)
    return _adapter_landing(fetched, landed, merged)


def _adapter_landing(fetched: Fetched, landed: LandedModel, merged: MergedModel | None) -> HubLanding:
    return HubLanding(
        landed=landed,
        listing=fetched.listing,
        files=tuple(file.path for file in fetched.files),
        downloaded_bytes=fetched.downloaded_bytes,
        merged=merged,
        warnings=_offline_warnings(fetched.listing),
    )


def _say_choice(plan: GGUFPlan, say: Say) -> None:
    label = plan.choice.path if len(plan.choice.files) == 1 else f"{plan.choice.path} and its other parts"
    why = f": {plan.pick.why}" if plan.pick.why else ""
    say(f"{label}{why}")
    others = sorted({choice.label for choice in plan.pick.others if choice is not plan.choice})
    if plan.pick.why and others:
        say(f"  others: {', '.join(others[:12])} (--quant)")
    if plan.projector:
        say(f"  with {plan.projector.path}, so that it sees or hears (--no-projector leaves it out)")


def _offline_warnings(listing: RepoListing) -> tuple[str, ...]:
    if not listing.is_offline:
        return ()
    return (f"{listing.why_offline}. The cache's own {listing.repo} at {listing.commit[:12]} was used.",)


def _require_free_name(name: str, options: LandOptions, plan: GGUFPlan | None = None) -> None:
    """Say that a name is taken before gigabytes are downloaded for it.

    What is there may be the same model; then landing it once more changes nothing. A file's hash tells that beforehand.
    """
    if options.server is not None or options.overwrite:
        return
    store = open_store(options.store_path)
    wanted = store.canonical(name)
    present = store.read_manifest_bytes(wanted)
    if present is None:
        return
    is_one_file = plan is not None and len(plan.choice.files) == 1 and plan.choice.files[0].sha256
    if options.dry_run or (plan and is_one_file and plan.choice.files[0].sha256.encode() not in present):
        raise exists_error(wanted)


def _planned(name: str, size_bytes: int, missing: int, options: LandOptions, plan: GGUFPlan | None) -> LandedModel:
    """What landing files that are not here yet would do; their hashes are the Hub's word for it."""
    started = time.monotonic()
    if options.server is not None:
        wanted, where = parse_name(name), options.server.address.url
        shared, replaced = 0, options.server.has(name)
    else:
        store = open_store(options.store_path)
        wanted, where = store.canonical(name), str(store.models_dir)
        require_free_space(store.models_dir, size_bytes, name)
        shared = _already_stored(store.blobs.blobs_dir, plan)
        replaced = store.read_manifest_bytes(wanted) is not None
    require_free_space(find_hub_cache(), missing, "the download")
    return LandedModel(
        name=wanted.display,
        digest="",
        store=where,
        written_bytes=size_bytes - shared,
        shared_bytes=shared,
        check=None,
        replaced=replaced,
        warnings=(),
        seconds=time.monotonic() - started,
        is_dry_run=True,
    )


def _already_stored(blobs_dir: Path, plan: GGUFPlan | None) -> int:
    if plan is None:
        return 0
    parts: Sequence[tuple[str, int]] = [(file.sha256, file.size_bytes) for file in plan.files]
    if len(plan.choice.files) > 1:
        return 0
    return sum(size for sha256, size in parts if sha256 and (blobs_dir / f"sha256-{sha256}").exists())
