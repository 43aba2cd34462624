"""What a build will do, before it does anything: every step with its key, and which of them are done already.

In: a `Recipe`. Out: `BuildPlan`. The keys chain: a step's key is the hash of the key before it, of its own settings,
of the content that it reads, and of the versions of what does it. So whatever changes, all after it is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.read import find_data_files
from ollama_forge.errors import RecipeError
from ollama_forge.files import Progress, no_progress
from ollama_forge.jobs.resolve import resolve
from ollama_forge.recipe.inputs import AdapterInput, Fingerprints, find_adapter_input, hash_of
from ollama_forge.recipe.lock import Lock
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.read import Recipe
from ollama_forge.recipe.schema import AdapterStep, MergeStep, Part, QuantizeStep
from ollama_forge.recipe.source import FoundSource, find_source
from ollama_forge.recipe.wishes import combined_wishes
from ollama_forge.recipe.work import LandedRecord, StepResult, WorkFolder, open_work_folder
from ollama_forge.source.ref import looks_like_path
from ollama_forge.store.catalog import open_store
from ollama_forge.store.modelfile import Modelfile, render_modelfile
from ollama_forge.store.server import OllamaServer

_ENGINE = 1  # raise it when a step comes to mean something else
_TRAINING = ("ollama-forge", "xllamacpp", "torch", "transformers", "peft", "trl")
_PACKAGES = {
    "quantize": ("ollama-forge", "xllamacpp"),
    "fit": ("ollama-forge", "xllamacpp", "torch", "transformers"),
    "merge": ("ollama-forge", "xllamacpp"),
    "adapter": ("ollama-forge",),
    "finetune": _TRAINING,
    "abliterate": _TRAINING,
    "downsize": _TRAINING,
}


@dataclass(frozen=True)
class PlannedStep:
    """A step, with all that decides what it makes.

    Attributes:
        inputs: hashes of what it reads, by the recipe's own words for it.
        commits: of the adapters that come from the Hub.
        result: what it made, when it is done.
    """

    number: int
    step: Part
    key: str
    inputs: Mapping[str, str]
    adapters: tuple[AdapterInput, ...]
    result: StepResult | None

    @property
    def kind(self) -> str:
        return str(self.step.model_dump()["kind"])

    @property
    def commits(self) -> dict[str, str]:
        return {found.label: found.commit for found in self.adapters if found.commit}

    @property
    def options(self) -> dict[str, Any]:
        """Its settings, as the lock and the registry keep them."""
        return {key: value for key, value in self.step.model_dump(mode="json").items() if key != "kind"}


@dataclass(frozen=True)
class BuildPlan:
    """A build that is decided.

    Attributes:
        changes: what the model says beside its weights.
        key: of the whole model.
        landed: the record of the model that is there already and is this one.
    """

    recipe: Recipe
    source: FoundSource
    steps: tuple[PlannedStep, ...]
    changes: Modelfile
    key: str
    work: WorkFolder
    fingerprints: Fingerprints
    landed: LandedRecord | None = None

    @property
    def first_to_do(self) -> int:
        """The number of the first step that must be done: everything before is not needed any more."""
        for index in range(len(self.steps), 0, -1):
            if self.steps[index - 1].result is not None:
                return index
        return 0


def plan_build(
    recipe: Recipe,
    store_path: Path | None,
    *,
    lock: Lock | None = None,
    progress: Progress = no_progress,
    server: OllamaServer | None = None,
) -> BuildPlan:
    """Look at everything that a recipe names, and at what is done already.

    Args:
        lock: take the commits that it names, and believe no remembered hash.
        server: the model is landed through it; its store cannot be looked into.

    Raises:
        NotFoundError, HubError, UsageError: something that the recipe names is not there.
    """
    work = open_work_folder()
    fingerprints = Fingerprints(work.memo_path, trusts_memo=lock is None, progress=progress)
    commit = lock.source_commit if lock else ""
    source = find_source(recipe.source, fingerprints, store_path, commit=commit, server=server)
    parts = _with_quant(recipe.steps, source)
    if source.is_served and parts:
        raise RecipeError(
            f"The weights of {source.source.text!r} are in the server, and the recipe has steps that change weights",
            why="A server gives no weights away.",
            next="Build where the weights are, without --host; or leave the steps out.",
        )
    steps: list[PlannedStep] = []
    key = hash_of([_ENGINE, source.key])
    for number, step in enumerate(parts):
        commits = lock.step_commits(number) if lock else {}
        adapters = _find_adapters(step, recipe.folder, fingerprints, commits)
        inputs = _hash_inputs(step, recipe.folder, fingerprints, adapters, store_path)
        key = _step_key(key, step, inputs)
        kind = str(step.model_dump()["kind"])
        steps.append(PlannedStep(number, step, key, inputs, adapters, work.read_step(kind, key)))
    changes = combined_wishes(recipe.folder, recipe.wishes, store_path)
    whole = hash_of([key, recipe.source.outtype, modelfile_text(changes)])
    landed = None if server is not None else _find_landed(work, recipe, whole, store_path)
    return BuildPlan(recipe, source, tuple(steps), changes, whole, work, fingerprints, landed)


def modelfile_text(changes: Modelfile) -> str:
    """A recipe's wishes in the one spelling that a Modelfile has for them."""
    return render_modelfile(replace(changes, sources=("BASE",), warnings=()))


def versions_of(steps: Sequence[PlannedStep]) -> dict[str, str]:
    """Versions of everything that made something."""
    names = {"ollama-forge", *(name for step in steps for name in _PACKAGES.get(step.kind, ()))}
    return {name: version for name in sorted(names) if (version := _version(name))}


def landed_key(key: str, store_path: Path, name: str) -> str:
    """One recipe may be landed in several stores, under several names."""
    return hash_of([key, str(store_path.resolve()), name])


def _with_quant(steps: tuple[Part, ...], source: FoundSource) -> tuple[Part, ...]:
    return (QuantizeStep(type=source.quantize), *steps) if source.quantize else steps


def _find_adapters(
    step: Part, folder: Path, fingerprints: Fingerprints, commits: Mapping[str, str]
) -> tuple[AdapterInput, ...]:
    if isinstance(step, AdapterStep):
        revision = commits.get(step.path) or step.revision or ""
        return (find_adapter_input(step.path, folder, fingerprints, revision=revision, file=step.file or ""),)
    if isinstance(step, MergeStep):
        return tuple(
            find_adapter_input(text, folder, fingerprints, revision=commits.get(text, "")) for text in step.adapters
        )
    return ()


def _hash_inputs(
    step: Part,
    folder: Path,
    fingerprints: Fingerprints,
    adapters: Sequence[AdapterInput],
    store_path: Path | None,
) -> dict[str, str]:
    found: dict[str, str] = {}
    for adapter in adapters:
        found |= adapter.hashes
    for key in step.paths:
        if adapters and key in ("path", "adapters"):
            continue
        value = getattr(step, key)
        for text in value if isinstance(value, tuple) else (value,):
            if text is not None:
                found |= _hash_path(text, folder, fingerprints, getattr(step, "include", ()), is_data=key == "data")
    teacher = getattr(step, "teacher", None)
    if teacher is not None:
        found |= _hash_teacher(teacher, folder, fingerprints, store_path)
    return found


def _hash_path(
    text: str, folder: Path, fingerprints: Fingerprints, include: Sequence[str], *, is_data: bool
) -> dict[str, str]:
    path = locate(folder, text)
    if not is_data or path.is_file():
        return fingerprints.files([path], text)
    files = find_data_files([path], include)
    return {f"{text}/{file.name}": fingerprints.file(file) for file in files}


def _hash_teacher(text: str, folder: Path, fingerprints: Fingerprints, store_path: Path | None) -> dict[str, str]:
    beside = locate(folder, text)
    model = resolve(str(beside) if looks_like_path(text) or beside.exists() else text, store_path)
    if model.installed is not None:
        return {text: model.installed.digest}
    path = model.gguf_path or model.folder
    assert path is not None
    return fingerprints.files([path], text)


def _step_key(previous: str, step: Part, inputs: Mapping[str, str]) -> str:
    options = {
        name: value for name, value in step.model_dump(mode="json").items() if name not in (*step.paths, "teacher")
    }
    versions = [[name, _version(name)] for name in _PACKAGES.get(str(options["kind"]), ())]
    # The order of adapters matters, their paths do not.
    return hash_of([previous, options, list(inputs.values()), versions])


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return ""


def _find_landed(work: WorkFolder, recipe: Recipe, key: str, store_path: Path | None) -> LandedRecord | None:
    store = open_store(store_path)
    name = store.canonical(recipe.name)
    known = work.read_landed(landed_key(key, store.models_dir, name.display))
    raw = store.read_manifest_bytes(name)
    if known is None or raw is None or hashlib.sha256(raw).hexdigest() != known.digest:
        return None
    return known
