"""Build a recipe: do what is not done yet, land the model, write the lock.

In: a `Recipe`. Out: `Build`, which counts what was done and what was there. A second build writes nothing; a killed one
goes on at the step that it was in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.errors import ExistsError, InterruptedRunError, RecipeError
from ollama_forge.files import hash_file
from ollama_forge.jobs.conversion import convert_options
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import LandedModel, import_folder, land_gguf, land_installed, land_named
from ollama_forge.jobs.lineage import Ingredient, ingredient_of, working
from ollama_forge.jobs.merging import inherited
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.recipe.estimate import BuildEstimate, estimate_build
from ollama_forge.recipe.lock import Lock, lock_path, read_lock, refuse_drift, write_lock
from ollama_forge.recipe.plan import BuildPlan, PlannedStep, landed_key, modelfile_text, plan_build, versions_of
from ollama_forge.recipe.read import Recipe
from ollama_forge.recipe.steps import Workbench, current_model, run_step
from ollama_forge.recipe.work import DONE, LandedRecord, StepResult
from ollama_forge.store.catalog import open_store
from ollama_forge.store.land import require_free_name
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.options import Watch

_TRAINED = ("finetune", "abliterate", "downsize")
_ROLES = {"finetune": "data", "abliterate": "prompts", "downsize": "data", "quantize": "imatrix", "fit": "data"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class BuiltStep:
    """A step as it went. `state` is `done`, `cached` (it was there) or `planned` (a dry run)."""

    kind: str
    key: str
    state: str
    seconds: float = 0.0
    written_bytes: int = 0
    facts: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "kind": self.kind,
            "key": self.key[:24],
            "state": self.state,
            "seconds": round(self.seconds, 3),
            "written_bytes": self.written_bytes,
            "facts": self.facts or {},
        }


@dataclass(frozen=True)
class Build:
    """What came of a build.

    Attributes:
        is_up_to_date: the model was there already, and nothing was written.
        landed: None when it was there already, or in a dry run that cannot know it yet.
        downloaded_bytes: in a dry run: what would come.
    """

    plan: BuildPlan
    steps: tuple[BuiltStep, ...]
    is_up_to_date: bool
    landed: LandedModel | None
    lock: Path
    is_lock_written: bool
    downloaded_bytes: int
    seconds: float
    estimate: BuildEstimate | None = None
    warnings: tuple[str, ...] = ()

    @property
    def is_dry_run(self) -> bool:
        return self.estimate is not None

    @property
    def kept_bytes(self) -> int:
        """Disk that the steps' files take beside the store."""
        return sum(self.plan.work.size_of(step.kind, step.key) for step in self.plan.steps)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        landed = self.landed
        return {
            "recipe": str(self.plan.recipe.path),
            "name": landed.name if landed else self.plan.recipe.name,
            "digest": landed.digest if landed else self.plan.landed.digest if self.plan.landed else "",
            "key": self.plan.key,
            "up_to_date": self.is_up_to_date,
            "steps": [step.document() for step in self.steps],
            "steps_done": sum(step.state == "done" for step in self.steps),
            "steps_cached": sum(step.state == "cached" for step in self.steps),
            "written_bytes": sum(step.written_bytes for step in self.steps) + (landed.written_bytes if landed else 0),
            "downloaded_bytes": self.downloaded_bytes,
            "source": dict(self.plan.source.facts),
            "kept_bytes": self.kept_bytes,
            "lock": str(self.lock),
            "lock_written": self.is_lock_written,
            "landed": landed.document() if landed else None,
            "estimate": self.estimate.document() if self.estimate else None,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
            "dry_run": self.is_dry_run,
        }


def build_recipe(
    recipe: Recipe,
    options: LandOptions,
    *,
    locked: bool = False,
    keep_steps: bool = True,
    say: Say = lambda _text: None,
    watch: Watch | None = None,
) -> Build:
    """Build a recipe; with `options.dry_run` only say what would be done.

    Args:
        locked: refuse whatever differs from the recipe's lock.
        keep_steps: leave what the steps made, so that the next build of a changed recipe need not make it again.

    Raises:
        RecipeError: the lock says otherwise; or a step made other bytes than were locked.
        ExistsError: another model has the name, and `options.overwrite` is false.
        Whatever the jobs of the steps raise.
    """
    started = time.monotonic()
    lock = read_lock(recipe.path) if locked else None
    plan = plan_build(recipe, options.store_path, lock=lock, progress=options.progress, server=options.server)
    if lock is not None:
        refuse_drift(lock, lock_document(plan, {}))
    if plan.source.said:
        say(plan.source.said)
    if plan.landed is not None:
        return _nothing_to_do(plan, is_dry_run=options.dry_run, is_locked=locked, started=started)
    _require_free_name(plan, options)
    if options.dry_run:
        return Build(
            plan,
            tuple(_cached(step) for step in plan.steps),
            False,
            None,
            lock_path(recipe.path),
            False,
            plan.source.missing_bytes,
            time.monotonic() - started,
            estimate_build(plan, options),
            plan.source.warnings,
        )
    built = _build(plan, options, lock, say, watch, started)
    if not keep_steps:
        for step in plan.steps:
            plan.work.discard(step.kind, step.key)
    return built


def _nothing_to_do(plan: BuildPlan, *, is_dry_run: bool, is_locked: bool, started: float) -> Build:
    """The model is there. Only what somebody has taken away is written again: a lock, remembered hashes."""
    assert plan.landed is not None
    path, is_written = lock_path(plan.recipe.path), False
    if not (is_locked or is_dry_run):
        plan.fingerprints.save()
        document = {**lock_document(plan, plan.landed.outputs), "model": {"digest": plan.landed.digest}}
        is_written = write_lock(path, document)
    steps = tuple(BuiltStep(step.kind, step.key, "cached") for step in plan.steps)
    seconds = time.monotonic() - started
    estimate = BuildEstimate() if is_dry_run else None
    return Build(plan, steps, True, None, path, is_written, 0, seconds, estimate, plan.source.warnings)


def _build(
    plan: BuildPlan, options: LandOptions, lock: Lock | None, say: Say, watch: Watch | None, started: float
) -> Build:
    source = plan.source.fetch()
    plan.fingerprints.save()
    warnings = list(plan.source.warnings)
    state, outputs, built = _do_steps(plan, source.local, options, lock, warnings, say, watch)
    say(f"{len(plan.steps) + 1}. create {plan.recipe.name}")
    if options.server is None:
        plan.work.write_landed(_landed_key(plan, options), LandedRecord(""))
    try:
        with _building(plan):
            landed = _land(source.local, state, plan, options, source.projector)
    except ExistsError:
        plan.work.forget_landed(_landed_key(plan, options))  # else the next dry run takes the other's name for its own
        raise
    path, is_written = lock_path(plan.recipe.path), False
    if options.server is None:
        plan.work.write_landed(_landed_key(plan, options), LandedRecord(landed.digest, outputs))
    if lock is None:
        is_written = write_lock(path, {**lock_document(plan, outputs), "model": {"digest": landed.digest}})
    elif lock.digest not in (landed.digest, "") and options.server is None:
        warnings.append("The finished model has another digest than the locked one.")
    seconds = time.monotonic() - started
    missing = plan.source.missing_bytes
    return Build(plan, built, False, landed, path, is_written, missing, seconds, None, tuple(warnings))


def _do_steps(
    plan: BuildPlan,
    source: ResolvedModel | None,
    options: LandOptions,
    lock: Lock | None,
    warnings: list[str],
    say: Say,
    watch: Watch | None,
) -> tuple[StepResult, dict[int, dict[str, str]], tuple[BuiltStep, ...]]:
    """The state after the last step, what each step made, and how it went."""
    state, outputs, built = StepResult(), dict[int, dict[str, str]](), list[BuiltStep]()
    for index, step in enumerate(plan.steps):
        if index < plan.first_to_do:
            # A step whose files are gone is not needed when a later one is whole.
            built.append(_cached(step))
            if step.result is not None:
                state, outputs[step.number] = step.result, step.result.outputs
                say(f"{index + 1}. {step.kind}: it is there already")
            continue
        say(f"{index + 1}. {step.kind}")
        begun = time.monotonic()
        assert source is not None
        bench = Workbench(source, state, plan.recipe.folder, step.adapters, options.store_path, options.progress, watch)
        with plan.work.open_step(step.kind, step.key) as folder:
            state = _run(step, bench, folder, plan)
            warnings += [str(text) for text in state.facts.get("warnings", ())]
            _compare_outputs(lock, step, state, warnings)
            plan.work.write_step(step.kind, step.key, state)
            plan.work.tidy(step.kind, step.key, state)
        outputs[step.number] = state.outputs
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != DONE)
        built.append(BuiltStep(step.kind, step.key, "done", time.monotonic() - begun, written, state.facts))
    return state, outputs, tuple(built)


def _run(step: PlannedStep, bench: Workbench, folder: Path, plan: BuildPlan) -> StepResult:
    try:
        return run_step(step.step, bench, folder)
    except InterruptedRunError as exc:
        next_step = f"ollama-forge build {plan.recipe.path}   (it goes on where it was)"
        raise InterruptedRunError(exc.what, why=exc.why, next=next_step) from exc


def lock_document(plan: BuildPlan, outputs: Mapping[int, Mapping[str, str]]) -> dict[str, Any]:
    """What the lock says of a plan; with what the steps made, by their numbers, where that is known."""
    steps = []
    for step in plan.steps:
        entry: dict[str, Any] = {"kind": step.kind, "options": step.options, "inputs": dict(step.inputs)}
        if step.commits:
            entry["commits"] = step.commits
        if step.number in outputs:
            entry["outputs"] = dict(outputs[step.number])
        steps.append(entry)
    return {
        "schema": 1,
        "name": plan.recipe.name,
        "source": plan.source.facts,
        "outtype": plan.recipe.source.outtype,
        "steps": steps,
        "modelfile": modelfile_text(plan.changes),
        "versions": versions_of(plan.steps),
    }


def _cached(step: PlannedStep) -> BuiltStep:
    is_there = step.result is not None
    return BuiltStep(
        step.kind, step.key, "cached" if is_there else "planned", facts=step.result.facts if step.result else None
    )


def _compare_outputs(lock: Lock | None, step: PlannedStep, state: StepResult, warnings: list[str]) -> None:
    """A step that has the same inputs makes the same bytes, unless it trains: another machine may round otherwise."""
    locked = lock.step_outputs(step.number) if lock else {}
    if not locked or locked == state.outputs:
        return
    what = f"Step {step.number + 1} ({step.kind}) made other bytes than were locked"
    if step.kind in _TRAINED:
        warnings.append(f"{what}: training rounds otherwise on another processor or card.")
        return
    raise RecipeError(
        what,
        why=f"Locked {locked}, made {state.outputs}.",
        next="Build without --locked to take what this machine makes.",
    )


def _require_free_name(plan: BuildPlan, options: LandOptions) -> None:
    """Say that a name is taken before hours are spent on it; a build that was killed while it landed may go on."""
    is_cheap = not plan.steps and not plan.source.missing_bytes and not options.dry_run
    if options.server is not None or is_cheap:
        return  # landing itself tells whether the same model is there already
    store = open_store(options.store_path)
    has_begun = plan.work.read_landed(_landed_key(plan, options)) is not None
    require_free_name(store, plan.recipe.name, overwrite=options.overwrite or has_begun)


def _landed_key(plan: BuildPlan, options: LandOptions) -> str:
    store = open_store(options.store_path)
    return landed_key(plan.key, store.models_dir, store.canonical(plan.recipe.name).display)


def _building(plan: BuildPlan) -> Any:
    """What the registry is told of a build."""
    ingredients = list(_ingredients(plan))
    steps = [{"kind": step.kind, **_changed(step)} for step in plan.steps]
    return working("build", ingredients, recipe=plan.recipe.path.name, key=plan.key, steps=steps)


def _changed(step: PlannedStep) -> dict[str, Any]:
    return {key: value for key, value in step.options.items() if key in step.step.model_fields_set and key != "kind"}


def _ingredients(plan: BuildPlan) -> Iterator[Ingredient]:
    source = plan.source
    if source.commit:
        yield Ingredient("base", f"hf:{source.facts['repo']}", commit=source.commit)
    elif source.local is not None:
        yield ingredient_of(source.local)
    yield Ingredient("recipe", str(plan.recipe.path), f"sha256:{hash_file(plan.recipe.path).sha256}")
    for step in plan.steps:
        role = _ROLES.get(step.kind, "adapter")
        for adapter in step.adapters:
            if adapter.commit:
                yield Ingredient(role, adapter.label, commit=adapter.commit)
        for label, sha256 in step.inputs.items():
            if not label.startswith("hf:"):
                yield Ingredient(role, label, f"sha256:{sha256}")


def _land(
    source: ResolvedModel | None, state: StepResult, plan: BuildPlan, options: LandOptions, projector: Path | None
) -> LandedModel:
    name = plan.recipe.name
    changes = plan.changes
    if source is None:
        return land_named(plan.recipe.source.ref, name, changes, options)
    if state.template is not None and changes.template is None:
        changes = replace(changes, template=state.template)
    if state.weights is None and source.installed is not None and options.server is None:
        return land_installed(source.installed, name, changes, options, adapters=state.adapters)
    model = current_model(source, state)
    wanted = inherited(model, changes) if source.installed is not None else changes
    if source.installed is not None:
        projector = source.projector
    return _land_weights(model, name, wanted, options, projector, plan)


def _land_weights(
    model: ResolvedModel,
    name: str,
    wanted: Modelfile,
    options: LandOptions,
    projector: Path | None,
    plan: BuildPlan,
) -> LandedModel:
    adapters: Sequence[Path] = model.adapters
    if model.folder is not None:
        conversion = convert_options(plan.recipe.source.outtype, None)
        return import_folder(model.folder, name, wanted, options, conversion, adapters=adapters)
    assert model.gguf_path is not None
    return land_gguf(model.gguf_path, name, wanted, options, adapters=adapters, projector=projector)
