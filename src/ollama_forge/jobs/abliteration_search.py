"""The search for an ablation: which direction, where and how strongly, with two aims: few refusals, little harm.

In: an `AblationBench` and how long to look. Out: `SearchResult`: all trials, and among them the Pareto front. Each
trial is drawn from the trials before it and its own number alone, so a search that was broken off goes on as if it had
not been, and the same seed finds the same again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.verdicts import Tally
from ollama_forge.errors import ExistsError, FormatError, NotFoundError, UsageError
from ollama_forge.files import write_bytes
from ollama_forge.jobs.ablation_bench import AblationBench, TrialScore
from ollama_forge.transform.ablation import KERNELS, AblationOptions

if TYPE_CHECKING:
    import optuna

FORMAT = "ollama-forge abliteration study 1"
STRONGEST = 1.5
_N_RANDOM = 10
_SEARCHED = (
    "layer",
    "per_layer",
    "kernel",
    "kernel_center",
    "kernel_width",
    "attention_strength",
    "mlp_strength",
    "embedding",
)

OnTrial = Callable[["Trial", int], None]
"""Called after each trial, with how many there will be."""


@dataclass(frozen=True)
class Trial:
    """One ablation and what it does. `number` counts from 0; 0 is the default."""

    number: int
    parameters: Mapping[str, Any]
    score: TrialScore

    @property
    def aims(self) -> tuple[float, float]:
        """(refused or broken, divergence): both should be small."""
        return self.score.bad_rate, self.score.kl

    def options(self, base: AblationOptions | None = None) -> AblationOptions:
        """The ablation, with everything that is not searched as in `base`."""
        values = dict(self.parameters)
        if values.get("per_layer"):
            values["layer"] = None
        return replace(base or AblationOptions(), **values)

    def document(self) -> dict[str, Any]:
        """The JSON form, as the study keeps it."""
        return {"number": self.number, "parameters": dict(self.parameters), **self.score.document()}


@dataclass(frozen=True)
class SearchResult:
    """All trials, and those that none other beats in both aims (fewest refusals first)."""

    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    is_resumed: bool
    seconds: float

    @property
    def best(self) -> Trial:
        """The point of the front with the fewest refused and broken answers."""
        return self.front[0]

    def find(self, number: int) -> Trial:
        """A trial by its number.

        Raises:
            NotFoundError: there is no such trial.
        """
        for trial in self.trials:
            if trial.number == number:
                return trial
        raise NotFoundError(
            f"There is no trial {number}",
            why=f"The study has {len(self.trials)} trials, counted from 0.",
            next="Pick one of the front: " + ", ".join(str(trial.number) for trial in self.front),
        )


def search_ablations(
    bench: AblationBench,
    base: AblationOptions,
    best_layer: int,
    study_path: Path,
    key: Mapping[str, Any],
    *,
    n_trials: int,
    seed: int = 0,
    timeout_seconds: float | None = None,
    on_trial: OnTrial | None = None,
) -> SearchResult:
    """Look on until there are `n_trials` trials, or the time is over; every trial is kept in the study at once.

    Args:
        base: what is not searched (number of directions, norms, layers to skip ...).
        best_layer: the layer of the default point, which is tried first.
        study_path: read if it is there, and written after each trial.
        key: what the study is about; a study about something else is refused.

    Raises:
        ExistsError: the study is about something else.
        FormatError: it is damaged.
    """
    started = time.monotonic()
    header = {"format": FORMAT, "seed": seed, "key": dict(key)}
    trials = list(read_study(study_path, header)) if study_path.exists() else []
    is_resumed = bool(trials)
    while len(trials) < n_trials:
        if timeout_seconds is not None and trials and time.monotonic() - started >= timeout_seconds:
            break
        number = len(trials)
        parameters = default_point(base, best_layer) if not number else _draw(trials, number, seed, bench.n_layers)
        trials.append(Trial(number, parameters, _measure(bench, number, parameters, base)))
        write_study(study_path, header, trials)
        if on_trial:
            on_trial(trials[-1], n_trials)
    return SearchResult(tuple(trials), pareto_front(trials), is_resumed, time.monotonic() - started)


def _measure(bench: AblationBench, number: int, parameters: Mapping[str, Any], base: AblationOptions) -> TrialScore:
    try:
        return bench.measure(Trial(number, parameters, bench.untouched).options(base))
    except UsageError:
        if not number:
            raise
        return bench.untouched  # a narrow kernel between two layers edits nothing


def default_point(base: AblationOptions, best_layer: int) -> dict[str, Any]:
    """What `abliterate apply` does without being told more."""
    strengths = {
        "attention_strength": base.strength if base.attention_strength is None else base.attention_strength,
        "mlp_strength": base.strength if base.mlp_strength is None else base.mlp_strength,
    }
    layer = float(best_layer) if base.layer is None else float(base.layer)
    values = {**asdict(base), **strengths, "layer": layer, "per_layer": bool(base.per_layer)}
    return {name: values[name] for name in _SEARCHED}


def pareto_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that no other beats: none is as good in both aims and better in one. Of equals the first stays."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda item: (*item.aims, item.number)):
        if not front or trial.aims[1] < front[-1].aims[1]:
            front.append(trial)
    return tuple(front)


def dominates(one: Trial, other: Trial) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    return all(a <= b for a, b in zip(one.aims, other.aims, strict=True)) and one.aims != other.aims


def _draw(trials: Sequence[Trial], number: int, seed: int, n_layers: int) -> dict[str, Any]:
    """The parameters of the next trial, by Optuna's tree-structured Parzen estimator."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        # A sampler for each trial: what it draws depends on the trials so far and on nothing that a pause forgets.
        sampler = optuna.samplers.TPESampler(seed=seed * 1_000_003 + number, n_startup_trials=_N_RANDOM)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        space = search_space(n_layers)
        for trial in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    params=_placed(trial.parameters, space), distributions=space, values=list(trial.aims)
                )
            )
        return dict(study.ask(space).params)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _placed(parameters: Mapping[str, Any], space: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters within the space; a default point may lie outside of it."""
    placed = {}
    for name, place in space.items():
        value = parameters[name]
        is_range = not isinstance(value, (bool, str))
        placed[name] = min(max(value, place.low), place.high) if is_range else value
    return placed


def search_space(n_layers: int) -> dict[str, optuna.distributions.BaseDistribution]:
    """What is searched, and between which bounds."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        "layer": FloatDistribution(0.0, float(max(1, n_layers - 1))),
        "per_layer": CategoricalDistribution((False, True)),
        "kernel": CategoricalDistribution(KERNELS),
        "kernel_center": FloatDistribution(0.0, 1.0),
        "kernel_width": FloatDistribution(0.1, 1.0),
        "attention_strength": FloatDistribution(0.0, STRONGEST),
        "mlp_strength": FloatDistribution(0.0, STRONGEST),
        "embedding": CategoricalDistribution((True, False)),
    }


# --- the study file ---------------------------------------------------------------------------------------------------


def write_study(path: Path, header: Mapping[str, Any], trials: Sequence[Trial]) -> None:
    """Write the study whole; the same trials give the same bytes."""
    lines = [header, *(trial.document() for trial in trials)]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    write_bytes(path, text.encode(), overwrite=True)


def read_study(path: Path, header: Mapping[str, Any] | None = None) -> tuple[Trial, ...]:
    """The trials of a study.

    Raises:
        ExistsError: it is about something else than `header` says.
        FormatError: it is no study, or damaged.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines or lines[0].get("format") != FORMAT:
            raise ValueError("its first line does not say that it is one")
        trials = tuple(_parse_trial(line, number) for number, line in enumerate(lines[1:]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise FormatError(
            f"{str(path)!r} is no study of ablations: {exc}",
            why="It is written by `abliterate optimize`, one trial a line.",
            next="Move it away, or choose another --output-dir.",
        ) from exc
    if header is not None and lines[0] != json.loads(json.dumps(dict(header))):
        raise ExistsError(
            f"The study in {str(path)!r} is about something else",
            why="Model, prompts, directions, options or seed differ from those it began with.",
            next="Use the same command as before, or another --output-dir.",
        )
    return trials


def _parse_trial(line: Mapping[str, Any], number: int) -> Trial:
    if line["number"] != number:
        raise ValueError(f"trial {number} is missing")
    tally = Tally(int(line["asked"]), int(line["refused"]), int(line["degenerate"]))
    score = TrialScore(tally, float(line["first_kl"]), float(line["kl"]))
    parameters = {name: line["parameters"][name] for name in _SEARCHED}
    if not math.isfinite(score.kl) or tally.answered < 0:
        raise ValueError(f"trial {number} has impossible numbers")
    return Trial(number, parameters, score)


def require_search_packages() -> None:
    """Refuse to begin without Optuna.

    Raises:
        MissingExtraError: it is not installed.
    """
    import importlib.util

    from ollama_forge.errors import MissingExtraError

    if not importlib.util.find_spec("optuna"):
        raise MissingExtraError("The search needs optuna", next="pip install 'ollama-forge[train]'")


def parse_pick(text: str, result: SearchResult) -> Trial:
    """`best`, or the number of a trial.

    Raises:
        UsageError: neither. NotFoundError: no such trial.
    """
    if text == "best":
        return result.best
    if not text.isdecimal():
        raise UsageError(f"--pick {text!r} is neither 'best' nor a number", next="Example: --pick best, or --pick 12")
    return result.find(int(text))
