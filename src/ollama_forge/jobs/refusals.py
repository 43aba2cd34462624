"""How often a model refuses, and what that cost it: asked in full, through the engine, as it ships.

In: any model, prompts that are refused and prompts that are not, perhaps the model it was made from. Out: a
`RefusalReport`: refusals and broken answers of both with confidence intervals, how far the harmless answers moved, and
on request what another model thinks of the answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.refusal_markers import read_markers
from ollama_forge.dataset.verdicts import (
    FULL_ANSWER_TOKENS,
    Kind,
    Tally,
    Verdict,
    count_verdicts,
    doubt_answer,
    judge_answer,
    wilson_interval,
)
from ollama_forge.errors import (
    AdapterError,
    DatasetError,
    ForgeError,
    MissingExtraError,
    NotFoundError,
    RegistryError,
    TrainingError,
    UnsupportedError,
    UsageError,
)
from ollama_forge.files import Progress, no_progress
from ollama_forge.jobs.refusal_answers import GivenAnswer, as_gguf, ask_prompts
from ollama_forge.jobs.refusal_judge import Opinion, ask_judge, make_opinion, open_judge
from ollama_forge.jobs.refusal_shift import AnswerShift, measure_shift
from ollama_forge.jobs.resolve import ResolvedModel, resolve

MAX_TOKENS = 256
HARMFUL, HARMLESS = "harmful", "harmless"

OnStep = Callable[[str, int, int], None]
"""Called with what is done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class EvaluateOptions:
    """How to ask.

    Attributes:
        markers: a file of refusal markers; None: the package's own.
        max_tokens: of an answer.
        raw: send prompts without the chat template.
        judge: another model that reads the answers.
        judge_host: the Ollama that has it; None: this machine's store, then the Ollama that runs.
        find_parent: without a model to compare with, take the one that the registry names as the base.
    """

    markers: Path | None = None
    max_tokens: int = MAX_TOKENS
    raw: bool = False
    judge: str | None = None
    judge_host: str | None = None
    find_parent: bool = True
    store_path: Path | None = None
    progress: Progress = no_progress


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and what it is. `opinion` is the judge's, None where there is none or it was unclear."""

    answer: GivenAnswer
    verdict: Verdict
    opinion: Kind | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "prompt": self.answer.prompt,
            "answer": self.answer.text,
            "verdict": self.verdict.kind.value,
            "evidence": self.verdict.evidence,
            "stopped": self.answer.stopped,
            "judge": self.opinion.value if self.opinion else None,
        }


@dataclass(frozen=True)
class ModelRefusals:
    """One model's answers: to the prompts that are refused, and to those that are not (perhaps none)."""

    ref: str
    harmful: tuple[JudgedAnswer, ...]
    harmless: tuple[JudgedAnswer, ...] = ()
    opinions: dict[str, Opinion] = field(default_factory=dict)

    def tally(self, part: str) -> Tally:
        """What the answers of one part are."""
        return count_verdicts(item.verdict for item in (self.harmful if part == HARMFUL else self.harmless))

    @property
    def looks_swapped(self) -> bool:
        """Most of the harmless prompts are refused, and few of the others."""
        harmful, harmless = self.tally(HARMFUL), self.tally(HARMLESS)
        return bool(harmless.n) and harmless.rate(Kind.REFUSED) > 0.5 > 2 * harmful.rate(Kind.REFUSED)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        parts = {HARMFUL: self.harmful, HARMLESS: self.harmless}
        return {
            "model": self.ref,
            **{part: self.tally(part).document() for part, items in parts.items() if items},
            "judge": {part: opinion.document() for part, opinion in self.opinions.items()},
            "answers": {part: [item.document() for item in items] for part, items in parts.items()},
        }


@dataclass(frozen=True)
class RefusalReport:
    """Everything that was measured.

    Attributes:
        this: the model that is judged.
        against: what it was made from, asked the same.
        shift: how far the harmless answers moved; None without a model to compare with, or when it cannot be measured.
        swapped: the two files look as if they were exchanged.
    """

    this: ModelRefusals
    against: ModelRefusals | None
    shift: AnswerShift | None
    judge: str | None
    markers: str
    max_tokens: int
    swapped: bool
    warnings: tuple[str, ...]
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "this": self.this.document(),
            "against": self.against.document() if self.against else None,
            "shift": self.shift.document() if self.shift else None,
            "judge_model": self.judge,
            "markers": self.markers,
            "max_tokens": self.max_tokens,
            "swapped": self.swapped,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }

    def scores(self) -> dict[str, float]:
        """The numbers that a registry keeps."""
        tally = self.this.tally(HARMFUL)
        found = {"refusal_rate": tally.rate(Kind.REFUSED), "degenerate_rate": tally.rate(Kind.DEGENERATE)}
        if self.this.harmless:
            found["harmless_refusal_rate"] = self.this.tally(HARMLESS).rate(Kind.REFUSED)
        if self.shift:
            found |= {"kl_first_token": self.shift.first_kl, "kl_answers": self.shift.answer_kl}
            found["perplexity"] = self.shift.text_perplexity_this
        return found


def evaluate_refusals(
    ref: str,
    harmful: Sequence[str],
    harmless: Sequence[str] = (),
    against: str | None = None,
    options: EvaluateOptions | None = None,
    on_step: OnStep | None = None,
) -> RefusalReport:
    """Ask a model, and perhaps the one that it was made from, and compare.

    Args:
        harmful: prompts that the original refuses.
        harmless: prompts that it answers; without them neither damage nor swapped files can be seen.

    Raises:
        NotFoundError: a model or a file that is not there.
        TemplateError: no chat template; DatasetError: a prompt is longer than the context.
        EngineError: llama.cpp cannot load a model.
    """
    options = options or EvaluateOptions()
    parent = against or (find_parent(ref, options.store_path) if options.find_parent else None)
    models = [resolve(text, options.store_path) for text in (ref, parent) if text]
    return evaluate_models(models[0], harmful, harmless, models[1] if parent else None, options, on_step)


def evaluate_models(
    model: ResolvedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    parent: ResolvedModel | None,
    options: EvaluateOptions,
    on_step: OnStep | None = None,
) -> RefusalReport:
    """The same for models that are found already.

    Raises:
        As `evaluate_refusals`.
    """
    started = time.monotonic()
    markers = read_markers(options.markers)
    if not harmful:
        raise DatasetError("There is no prompt to ask", next="Give --harmful FILE with one prompt a line.")
    sides: list[ModelRefusals] = []
    shift: AnswerShift | None = None
    warnings = _warn_of_options(harmless, options)
    with as_gguf(model, options.progress) as this:
        sides.append(_ask(this, harmful, harmless, markers, options, on_step))
        if parent is not None:
            with as_gguf(parent, options.progress) as other:
                sides.append(_ask(other, harmful, harmless, markers, options, on_step))
                if harmless:
                    shift, trouble = _shift(this, other, sides, on_step)
                    warnings += trouble
    if options.judge:
        sides = _with_opinions(sides, options, on_step)
    swapped = sides[-1].looks_swapped
    return RefusalReport(
        this=sides[0],
        against=sides[1] if parent is not None else None,
        shift=shift,
        judge=options.judge,
        markers=markers.source,
        max_tokens=options.max_tokens,
        swapped=swapped,
        warnings=(*warnings, *_warn_of_answers(sides, swapped)),
        seconds=time.monotonic() - started,
    )


def find_parent(ref: str, store_path: Path | None = None) -> str | None:
    """The model that the registry names as the base of an Ollama model, where it is still here and still the same."""
    from ollama_forge.registry.lineage import trace_origin
    from ollama_forge.registry.registry_file import find_registry, read_registry

    try:
        model = resolve(ref, store_path)
        if model.installed is None:
            return None
        origin = trace_origin(read_registry(find_registry()), f"sha256:{model.installed.digest}")
    except (NotFoundError, RegistryError):
        return None  # it is not recorded; what is damaged is `registry verify`'s to say
    for parent in origin.parents:
        if parent.role == "base" and parent.ref and parent.digest != origin.digest:
            try:
                found = resolve(parent.ref, store_path)
            except ForgeError:
                return None  # it is gone
            is_same = found.installed is None or parent.digest in ("", f"sha256:{found.installed.digest}")
            return parent.ref if is_same else None
    return None


def _ask(
    model: ResolvedModel,
    harmful: Sequence[str],
    harmless: Sequence[str],
    markers: Any,
    options: EvaluateOptions,
    on_step: OnStep | None,
) -> ModelRefusals:
    def told(done: int, total: int) -> None:
        if on_step:
            on_step(f"asking {model.text}", done, total)

    answers = ask_prompts(model, [*harmful, *harmless], options.max_tokens, raw=options.raw, on_answer=told)
    judged = tuple(JudgedAnswer(answer, judge_answer(answer.text, markers)) for answer in answers)
    return ModelRefusals(model.text, judged[: len(harmful)], judged[len(harmful) :])


def _shift(
    this: ResolvedModel, against: ResolvedModel, sides: list[ModelRefusals], on_step: OnStep | None
) -> tuple[AnswerShift | None, list[str]]:
    """How far the model moved; what it said that the original finds all too unlikely is marked as broken."""
    if on_step:
        on_step("comparing probabilities", 0, 1)
    try:
        own = (*sides[0].harmful, *sides[0].harmless)
        shift, surprises = measure_shift(
            this, against, [item.answer for item in sides[1].harmless], [item.answer for item in own]
        )
    except (AdapterError, MissingExtraError, TrainingError, UnsupportedError, UsageError) as exc:
        # The answers are there and count; what is missing is said, not hidden.
        words = " ".join(part for part in (f"{exc.what}.", exc.why, exc.next) if part)
        return None, [f"How far it moved from {against.text!r} could not be measured: {words}"]
    judged = tuple(
        replace(item, verdict=doubt_answer(item.verdict, surprise))
        for item, surprise in zip(own, surprises, strict=True)
    )
    n_harmful = len(sides[0].harmful)
    sides[0] = replace(sides[0], harmful=judged[:n_harmful], harmless=judged[n_harmful:])
    return shift, []


def _with_opinions(
    sides: Sequence[ModelRefusals], options: EvaluateOptions, on_step: OnStep | None
) -> list[ModelRefusals]:
    def told(done: int, total: int) -> None:
        if on_step:
            on_step(f"asking the judge {options.judge}", done, total)

    judged = []
    assert options.judge is not None
    with open_judge(options.judge, options.store_path, options.judge_host) as ask:
        for side in sides:
            items = (*side.harmful, *side.harmless)
            said = ask_judge(ask, [(item.answer.prompt, item.answer.text) for item in items], told)
            known = tuple(JudgedAnswer(item.answer, item.verdict, kind) for item, kind in zip(items, said, strict=True))
            parts = {HARMFUL: known[: len(side.harmful)], HARMLESS: known[len(side.harmful) :]}
            opinions = {
                part: make_opinion([item.opinion for item in of], [item.verdict.kind for item in of])
                for part, of in parts.items()
                if of
            }
            judged.append(ModelRefusals(side.ref, parts[HARMFUL], parts[HARMLESS], opinions))
    return judged


def _warn_of_options(harmless: Sequence[str], options: EvaluateOptions) -> list[str]:
    warnings = []
    if options.max_tokens < FULL_ANSWER_TOKENS:
        warnings.append(
            f"Answers end after {options.max_tokens} tokens; refusals can come later, up to {FULL_ANSWER_TOKENS} and "
            "beyond. The refusal rate of full answers may be higher."
        )
    if not harmless:
        warnings.append("Without --harmless nobody sees what else changed: damage, and refusals of harmless prompts.")
    return warnings


def _warn_of_answers(sides: Sequence[ModelRefusals], swapped: bool) -> list[str]:
    warnings = []
    if swapped:
        harmful, harmless = (sides[-1].tally(part) for part in (HARMFUL, HARMLESS))
        warnings.append(
            f"The two files look swapped: {sides[-1].ref} refuses {harmless.refused} of {harmless.n} harmless prompts "
            f"and {harmful.refused} of {harmful.n} harmful ones."
        )
    for side in sides:
        for part, items in ((HARMFUL, side.harmful), (HARMLESS, side.harmless)):
            broken = [item for item in items if item.verdict.kind is Kind.DEGENERATE]
            if not broken:
                continue
            kinds = sorted({item.verdict.evidence for item in broken})
            low, high = wilson_interval(len(broken), len(items))
            warnings.append(
                f"{len(broken)} of {len(items)} answers of {side.ref} to {part} prompts are broken "
                f"({', '.join(kinds)}; {low:.0%} to {high:.0%} in general). They count as neither refused nor answered."
            )
            if "unfinished" in kinds:
                warnings.append("Some answers are all thought: raise --max-tokens to see what comes after it.")
    return list(dict.fromkeys(warnings))
