"""The search for an ablation as a whole job: directions, trials on the loaded model, the Pareto front, and its pick.

In: an `OptimizeRequest`. Out: `OptimizeResult`. The study lies in the working folder and is written after every trial.
What is picked is applied, asked before and after in full answers, and landed, as `abliteration_run` does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.jobs.ablation_bench import TrialScore
from ollama_forge.jobs.abliteration_result import require_free_name
from ollama_forge.jobs.abliteration_run import AbliterationResult, Choice, finish, plan_run
from ollama_forge.jobs.abliteration_search import (
    OnTrial,
    SearchResult,
    Trial,
    dominates,
    parse_pick,
    require_search_packages,
    search_ablations,
)
from ollama_forge.jobs.abliteration_work import AbliterateRequest, AbliterationWork
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.measure_models import require_packages
from ollama_forge.jobs.refusals import OnStep
from ollama_forge.jobs.run_folder import removal_of

JOB = "abliterate optimize"
STUDY_FILE = "study.jsonl"
DEFAULT_TRIALS = 60


@dataclass(frozen=True)
class OptimizeRequest:
    """How to look.

    Attributes:
        work: model, prompts, folder, and what is not searched.
        n_trials: trials that the study has in the end; one that has them already only shows its front.
        timeout_seconds: for this call; the trial that runs is finished.
        pick: `best`, or a trial's number: applied and, with a name, landed. None: the front is all.
    """

    work: AbliterateRequest
    n_trials: int = DEFAULT_TRIALS
    timeout_seconds: float | None = None
    seed: int = 0
    pick: str | None = None


@dataclass(frozen=True)
class OptimizeResult:
    """What was found.

    Attributes:
        search: all trials and the front; None in a dry run.
        plan: what would be done, in a dry run.
        untouched: the model as it is, on the same prompts.
        picked: what was picked.
        result: what became of the pick.
    """

    model: str
    study: Path
    search: SearchResult | None
    untouched: TrialScore | None
    picked: Trial | None = None
    result: AbliterationResult | None = None
    warnings: tuple[str, ...] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        search = self.search
        return {
            "model": self.model,
            "plan": dict(self.plan),
            "study": str(self.study),
            "trials": len(search.trials) if search else 0,
            "resumed": search.is_resumed if search else False,
            "untouched": self.untouched.document() if self.untouched else None,
            "default": search.trials[0].document() if search else None,
            "front": [trial.document() for trial in search.front] if search else [],
            "dominates_default": any(dominates(trial, search.trials[0]) for trial in search.front) if search else False,
            "picked": self.picked.number if self.picked else None,
            "result": self.result.document() if self.result else None,
            "warnings": list(self.warnings),
            "seconds": round(search.seconds, 3) if search else 0.0,
            "dry_run": search is None,
        }


def optimize_ablation(
    request: OptimizeRequest,
    options: LandOptions,
    *,
    on_step: OnStep | None = None,
    on_trial: OnTrial | None = None,
) -> OptimizeResult:
    """Look for ablations, and apply and land one if it was picked.

    Raises:
        MissingExtraError: training's extra is not installed.
        ExistsError: the study is about something else, or the name is taken.
        DatasetError: prompts that cannot be used, or files that are swapped.
        CheckError: what was picked did nothing or broke the model, asked in full answers.
    """
    require_packages()
    require_search_packages()
    work = AbliterationWork(request.work, options, JOB, on_step)
    require_free_name(work)
    study = request.work.folder / STUDY_FILE
    if options.dry_run:
        plan = {**plan_run(work, is_written=request.pick is not None), "trials": request.n_trials, "pick": request.pick}
        return OptimizeResult(request.work.model, study, None, None, warnings=tuple(work.warnings), plan=plan)
    work.folder.claim()
    search, untouched = _search(work, request, study, on_trial)
    if request.pick is None:
        return OptimizeResult(request.work.model, study, search, untouched, warnings=tuple(work.warnings))
    picked = parse_pick(request.pick, search)
    choice = Choice(picked.options(request.work.ablation), untouched=untouched)
    result = AbliterationResult(
        request.work.model,
        request.work.folder,
        directions=work.directions_path,
        evidence=tuple(work.evidence()),
        choice=choice,
        edited=work.apply(choice.options),
        undo=(removal_of(request.work.folder),),
    )
    facts: Mapping[str, Any] = {"trial": picked.number, "seed": request.seed}
    result = finish(work, result, **facts)
    return OptimizeResult(request.work.model, study, search, untouched, picked, result, tuple(work.warnings))


def _search(
    work: AbliterationWork, request: OptimizeRequest, study: Path, on_trial: OnTrial | None
) -> tuple[SearchResult, TrialScore]:
    key = {"bench": work.bench_key, "base": asdict(request.work.ablation)}
    best_layer = work.directions().best_layer
    with work.bench() as bench:
        search = search_ablations(
            bench,
            request.work.ablation,
            best_layer,
            study,
            key,
            n_trials=request.n_trials,
            seed=request.seed,
            timeout_seconds=request.timeout_seconds,
            on_trial=on_trial,
        )
        return search, bench.untouched
