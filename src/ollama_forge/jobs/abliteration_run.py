"""Abliteration in one command: compute, choose by evidence, apply, ask before and after, land.

In: an `AbliterateRequest`. Out: `AbliterationResult`. The layer is not guessed from norms: each candidate's edit is
switched on in the loaded model, and the one with the fewest refusals, and of these with the least harm, is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.verdicts import Tally
from ollama_forge.errors import UsageError
from ollama_forge.jobs.ablation_bench import AblationBench, TrialScore
from ollama_forge.jobs.abliteration_result import PAGE_FILE, evaluate_result, land_result, require_free_name
from ollama_forge.jobs.abliteration_work import AbliterateRequest, AbliterationWork, EditedModel
from ollama_forge.jobs.directions import layers_at, packed_memory_bytes, plan_directions
from ollama_forge.jobs.land_options import LandOptions, removal_command
from ollama_forge.jobs.landing import LandedModel
from ollama_forge.jobs.measure_models import require_packages
from ollama_forge.jobs.refusals import OnStep
from ollama_forge.jobs.run_folder import removal_of
from ollama_forge.jobs.work_stages import hash_key
from ollama_forge.transform.ablation import AblationOptions

JOB = "abliterate run"
COMPUTE, APPLY, EXPORT = "compute", "apply", "export"
STAGES = (COMPUTE, APPLY, EXPORT)
MOST_CANDIDATES = 12
_SHALLOWEST, _DEEPEST = 0.15, 0.9


@dataclass(frozen=True)
class Candidate:
    """A layer whose direction was tried in all layers. `layer` None: each layer its own."""

    layer: int | None
    score: TrialScore

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"layer": self.layer, **self.score.document()}


@dataclass(frozen=True)
class Choice:
    """What is applied, and what was tried. `untouched` is the model as it is, on the same prompts."""

    options: AblationOptions
    candidates: tuple[Candidate, ...] = ()
    untouched: TrialScore | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "options": asdict(self.options),
            "candidates": [candidate.document() for candidate in self.candidates],
            "untouched": self.untouched.document() if self.untouched else None,
        }


@dataclass(frozen=True)
class AbliterationResult:
    """What came of it; what a run did not come to is None.

    Attributes:
        directions: the file of the directions.
        evidence: what speaks for each layer's direction, in JSON form.
        evaluation: before and after, in the JSON form of `RefusalReport`, with `scores`.
        report: the page with all answers.
        undo: commands that take everything back.
    """

    model: str
    folder: Path
    directions: Path | None = None
    evidence: tuple[Mapping[str, Any], ...] = ()
    choice: Choice | None = None
    edited: EditedModel | None = None
    evaluation: Mapping[str, Any] | None = None
    report: Path | None = None
    landed: LandedModel | None = None
    undo: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    is_dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        edited = self.edited
        return {
            "model": self.model,
            "folder": str(self.folder),
            "plan": dict(self.plan),
            "directions": str(self.directions) if self.directions else None,
            "layers": list(self.evidence),
            "choice": self.choice.document() if self.choice else None,
            "output": str(edited.path) if edited else None,
            "sha256": edited.sha256 if edited else None,
            "matrices": dict(edited.matrices) if edited else {},
            "evaluation": dict(self.evaluation) if self.evaluation else None,
            "report": str(self.report) if self.report else None,
            "landed": self.landed.document() if self.landed else None,
            "undo": list(self.undo),
            "warnings": list(self.warnings),
            "dry_run": self.is_dry_run,
        }


def run_abliteration(
    request: AbliterateRequest,
    options: LandOptions,
    stages: Sequence[str] = STAGES,
    *,
    on_step: OnStep | None = None,
) -> AbliterationResult:
    """Do the whole job, or some of its stages; each stage that is done already is not done again.

    Args:
        stages: which of `STAGES`, in their order; the ones before must be done by then.

    Raises:
        MissingExtraError: training's extra is not installed.
        ExistsError: the name is taken, or the folder is another job's.
        DatasetError: prompts that cannot be used, or files that are swapped.
        CheckError: the edit did nothing or broke the model.
        UsageError: a stage is asked for whose input is not there.
    """
    require_packages()
    work = AbliterationWork(request, options, JOB, on_step)
    require_free_name(work)
    if options.dry_run:
        return AbliterationResult(
            request.model, request.folder, plan=plan_run(work), warnings=tuple(work.warnings), is_dry_run=True
        )
    work.folder.claim()
    if COMPUTE not in stages and not work.has_directions:
        raise _missing(work, "directions", "--only-compute")
    work.directions()
    if COMPUTE in stages or APPLY in stages:
        choice = choose(work)
    else:
        choice = _kept_choice(work)
    result = AbliterationResult(
        request.model,
        request.folder,
        directions=work.directions_path,
        evidence=tuple(work.evidence()),
        choice=choice,
        undo=(removal_of(request.folder),),
    )
    if stages[-1] == COMPUTE:
        return replace(result, warnings=tuple(work.warnings))
    if APPLY not in stages and not work.has_edited(choice.options):
        raise _missing(work, "edited model", "--only-apply")
    edited = work.apply(choice.options)
    result = replace(result, edited=edited)
    if stages[-1] == APPLY:
        return replace(result, warnings=(*work.warnings, *edited.notes))
    return finish(work, result, layer=choice.options.layer)


def finish(work: AbliterationWork, result: AbliterationResult, **facts: Any) -> AbliterationResult:
    """Ask before and after, judge, and land what the result has edited.

    Raises:
        CheckError: the edit did nothing or broke the model, and that was not accepted.
    """
    assert result.edited is not None and result.choice is not None
    applied = result.choice.options
    request, edited = work.request, result.edited
    work.warnings += edited.notes
    evaluation = None
    if request.verify:
        evaluation = evaluate_result(work, edited)
        result = replace(result, evaluation=evaluation, report=request.folder / PAGE_FILE)
    else:
        work.warnings.append("Nobody has asked the result anything: it may refuse as before, or be broken.")
    if request.name is not None:
        scores = evaluation["scores"] if evaluation else {}
        landed = land_result(work, edited, applied, scores, **facts)
        work.warnings += landed.warnings
        result = replace(result, landed=landed, undo=(removal_command(landed.name, work.options), *result.undo))
    return replace(result, warnings=tuple(dict.fromkeys(work.warnings)))


def choose(work: AbliterationWork) -> Choice:
    """The layer whose direction does most, tried on prompts that no direction was computed from.

    A layer that was asked for, and directions for each layer, are taken as they are.
    """
    wanted = work.request.ablation
    if wanted.layer is not None or wanted.per_layer:
        return Choice(wanted)
    key = _choice_key(work)
    if not work.folder.has("choose", key):
        with work.bench() as bench:
            layers = _candidates(bench.n_layers, work.request.compute.layer_fracs, work.directions().best_layer)
            tried = _try_layers(work, bench, layers)
            best = min(tried, key=lambda item: (item.score.bad_rate, item.score.kl))
            facts = Choice(replace(wanted, layer=best.layer), tuple(tried), bench.untouched).document()
        work.folder.note("choose", key, facts)
    return _parse_choice(work.folder.facts("choose"), wanted)


def _try_layers(work: AbliterationWork, bench: AblationBench, layers: Sequence[int]) -> list[Candidate]:
    tried: list[Candidate] = []
    for layer in layers:
        work.tell("trying layers", len(tried), len(layers))
        tried.append(Candidate(layer, bench.measure(replace(work.request.ablation, layer=float(layer)))))
    work.tell("trying layers", len(tried), len(layers))
    return tried


def _candidates(n_layers: int, fractions: Sequence[float], best_layer: int) -> list[int]:
    """The layers at `fractions`; without them all of a small model, and twelve of a large one."""
    if fractions:
        return sorted(layers_at(fractions, n_layers))
    if n_layers <= MOST_CANDIDATES:
        return list(range(n_layers))
    first, last = round(_SHALLOWEST * (n_layers - 1)), round(_DEEPEST * (n_layers - 1))
    step = (last - first) / (MOST_CANDIDATES - 1)
    return sorted({best_layer, *(round(first + index * step) for index in range(MOST_CANDIDATES))})


def _choice_key(work: AbliterationWork) -> str:
    return hash_key(work.bench_key, asdict(work.request.ablation), list(work.request.compute.layer_fracs))


def _kept_choice(work: AbliterationWork) -> Choice:
    """What an earlier run chose; the stage that needs it does not choose anew."""
    wanted = work.request.ablation
    if wanted.layer is not None or wanted.per_layer:
        return Choice(wanted)
    if not work.folder.has("choose", _choice_key(work)):
        raise _missing(work, "choice of a layer", "--only-compute")
    return _parse_choice(work.folder.facts("choose"), wanted)


def _parse_choice(facts: Mapping[str, Any], wanted: AblationOptions) -> Choice:
    candidates = tuple(Candidate(item["layer"], _parse_score(item)) for item in facts["candidates"])
    options = replace(wanted, layer=facts["options"]["layer"])
    return Choice(options, candidates, _parse_score(facts["untouched"]))


def _parse_score(item: Mapping[str, Any]) -> TrialScore:
    return TrialScore(Tally(item["asked"], item["refused"], item["degenerate"]), item["first_kl"], item["kl"])


def plan_run(work: AbliterationWork, *, is_written: bool = True) -> dict[str, Any]:
    """What would be done; nothing is loaded.

    Args:
        is_written: an edited model is made, too.
    """
    request = work.request
    resolved = work.resolved
    paths = [resolved.gguf_path] if resolved.gguf_path else sorted((resolved.folder or Path()).glob("*.safetensors"))
    parts = {"harmful": work.harmful, "harmless": work.harmless}
    source_bytes = sum(path.stat().st_size for path in paths if path is not None)
    return {
        "source_bytes": source_bytes,
        **_plan_sizes(work, source_bytes, is_written=is_written),
        "seconds": None,  # answers end when the model ends them
        "output_dir": str(request.folder),
        "prompts": {
            name: {
                "computing": len(part.computing),
                "choosing": len(part.choosing),
                "judging": len(part.judging),
            }
            for name, part in parts.items()
        },
        "ablation": asdict(request.ablation),
        "quant": work.quant,
        "name": request.name,
    }


def _plan_sizes(work: AbliterationWork, source_bytes: int, *, is_written: bool) -> dict[str, int]:
    """Memory of the hungriest stage: the packed model and the states of its prompts. Disk: a converted folder, the
    edited model and the landed one, each about as large as the source.
    """
    request = work.request
    if request.directions is not None:
        found = {"memory_bytes": packed_memory_bytes(source_bytes), "tokens": 0}
        scratch_bytes = 0 if work.resolved.gguf_path else source_bytes
    else:
        plan = plan_directions(
            work.resolved,
            work.harmful.computing,
            work.harmless.computing,
            work.directions_path,
            request.compute,
            overwrite=True,
        )
        found = {"memory_bytes": plan.memory_bytes, "tokens": plan.tokens}
        scratch_bytes = plan.scratch_bytes
    n_written = 0 if not is_written else 2 if request.name else 1
    return {**found, "disk_bytes": scratch_bytes + source_bytes * n_written}


def _missing(work: AbliterationWork, what: str, option: str) -> UsageError:
    return UsageError(
        f"There is no {what} in {str(work.request.folder)!r} that belongs to this command",
        why="The stage before it was not run, or with another model, other prompts or options.",
        next=f"Run the same command with {option} first, or without --only-... for all stages.",
    )
