"""A student learns to predict what its teacher predicts: two models and data in, a checked model in Ollama out.

In: a `DistillRequest`. Out: `DistillResult`. The order is that of `jobs.finetune`: refuse, plan, ask, train, ask again,
land, report. Under `accelerate launch` every process trains, and the first one alone writes and lands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.read import find_data_files
from ollama_forge.files import no_progress, write_bytes
from ollama_forge.jobs.adapters import prepare_adapter
from ollama_forge.jobs.calibration import DATA_SUFFIXES, CalibrationOptions
from ollama_forge.jobs.conversion import quantize_options
from ollama_forge.jobs.distillation_setup import (
    TEACHER_FOLDER,
    DistillPlan,
    DistillRequest,
    PreparedDistillation,
    check_models,
    claim_distillation,
    prepare_distillation,
)
from ollama_forge.jobs.finetune import (
    ask_all,
    choose_questions,
    land_adapter,
    matching_template,
    name_for_others,
    recorded_settings,
)
from ollama_forge.jobs.finetune_setup import require_extra, require_free_name
from ollama_forge.jobs.land_options import LandOptions, removal_command
from ollama_forge.jobs.landing import LandedModel, land_gguf
from ollama_forge.jobs.lineage import hashed_ingredient, modelfile_text, weights_digest, working
from ollama_forge.jobs.merging import MergeInput, MergeOptions, inherited, merge_model
from ollama_forge.jobs.processes import count_processes, is_first_process, shares_blocks, wait_for_first_process
from ollama_forge.jobs.pruning import PruneOptions, prune_model
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.run_folder import RUN_FILE, name_after, removal_of
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.jobs.teacher_answers import (
    ANSWERS_FILE,
    ANSWERS_FOLDER,
    DONE_FILE,
    OnAnswered,
    asking_work,
    gather_answers,
    read_questions,
)
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.distill_options import TrainedStudent
from ollama_forge.train.options import IMPORTANCE_FILE, Watch
from ollama_forge.transform.cut_request import Amount

if TYPE_CHECKING:
    from ollama_forge.train.report import AnswerPair

MERGED_FILE = "merged.gguf"


@dataclass(frozen=True)
class DistillResult:
    """What came of it. `landed` is None in a dry run and with `skip_landing`."""

    plan: DistillPlan
    trained: TrainedStudent | None = None
    result: Path | None = None
    landed: LandedModel | None = None
    answers: tuple[AnswerPair, ...] = ()
    report: Path | None = None
    undo: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        trained = self.trained
        return {
            "plan": self.plan.document(),
            "dry_run": trained is None,
            "result": str(self.result) if self.result else None,
            "steps": trained.steps if trained else 0,
            "base_divergence": trained.base_divergence if trained else None,
            "final_divergence": trained.final_divergence if trained else None,
            "base_loss": trained.base_loss if trained else None,
            "final_loss": trained.final_loss if trained else None,
            "losses": [[point.step, point.loss] for point in trained.train_losses] if trained else [],
            "validation_losses": [[point.step, point.loss] for point in trained.validation_losses] if trained else [],
            "answers": [asdict(pair) for pair in self.answers],
            "landed": self.landed.document() if self.landed else None,
            "report": str(self.report) if self.report else None,
            "undo": list(self.undo),
            "warnings": list(self.warnings),
            "seconds": round(trained.seconds, 3) if trained else 0,
        }


def distill(
    request: DistillRequest,
    options: LandOptions,
    *,
    on_plan: Callable[[DistillPlan], None] | None = None,
    on_answer: OnAnswered | None = None,
    watch: Watch | None = None,
) -> DistillResult:
    """Do the whole job; with `options.dry_run` only the plan.

    Raises:
        UnsupportedError: processes that were started in a way that cannot work here.
        TrainingError: the vocabularies differ, a model cannot be trained, or training did nothing.
        DatasetError, TemplateError: data that cannot be used.
        ExistsError: the name or the working folder is taken.
        DiskError: no room for checkpoints and results, before the work or in the middle of it.
        MissingExtraError: torch and its friends are not installed.
    """
    shares_blocks(writes_answers=bool(request.options.on_policy.share))
    if not options.dry_run:
        wait_for_first_process(request.folder / RUN_FILE)
    with contextlib.ExitStack() as stack:
        request = _with_student(request, options, stack)
        if request.ask is not None and not options.dry_run:
            request = _with_answers(request, options, on_answer, stack)
        return _distill(request, options, on_plan, watch)


def _distill(
    request: DistillRequest,
    options: LandOptions,
    on_plan: Callable[[DistillPlan], None] | None,
    watch: Watch | None,
) -> DistillResult:
    with prepare_distillation(request, options) as prepared:
        if on_plan and is_first_process():
            on_plan(prepared.plan)
        if is_first_process():
            prepared.plan.disk.require()
        if options.dry_run:
            return DistillResult(prepared.plan, warnings=prepared.warnings)
        if is_first_process():
            claim_distillation(request, prepared)
        return _train_and_land(request, options, prepared, watch)


def _with_student(request: DistillRequest, options: LandOptions, stack: contextlib.ExitStack) -> DistillRequest:
    """The same request with a student on disk; a dry run makes it in a folder that goes away again."""
    if request.cut is None:
        return request
    student = request.student
    if is_first_process():
        require_free_name(student, options)
    require_extra(student.loop)
    data = find_data_files(student.data, student.include)
    text = next((path for path in data if path.suffix.lower() in DATA_SUFFIXES), None)
    path = request.folder / name_after("cut", request.teacher, request.cut, text)
    if options.dry_run and not path.exists():
        path = stack.enter_context(scratch_folder()) / path.name
    if not path.exists():
        width = {"hidden": Amount(count=request.cut.hidden)} if request.cut.hidden is not None else {}
        wanted = PruneOptions(
            n_layers=request.cut.n_layers,
            width=width,
            calibration=CalibrationOptions(text=text, device=student.loop.device),
        )
        prune_model(resolve(request.teacher, options.store_path), path, wanted, progress=options.progress)
    return replace(request, student=replace(student, base=str(path)))


def _with_answers(
    request: DistillRequest, options: LandOptions, on_answer: OnAnswered | None, stack: contextlib.ExitStack
) -> DistillRequest:
    """The same request, its data the teacher's own answers to their questions."""
    assert request.ask is not None
    teacher, _ = check_models(request, options)
    folder = request.folder / ANSWERS_FOLDER
    student = request.student
    if is_first_process():
        questions = read_questions(student.data, student.include)
        gather_answers(questions, request.ask, folder, model=teacher, on_answer=on_answer)
        write_bytes(folder / DONE_FILE, b"", overwrite=True)
    else:
        wait_for_first_process(folder / DONE_FILE)
    stack.enter_context(asking_work(student.data, student.include, request.ask, folder))
    return replace(request, student=replace(student, data=(folder / ANSWERS_FILE,), include=()))


def _train_and_land(
    request: DistillRequest, options: LandOptions, prepared: PreparedDistillation, watch: Watch | None
) -> DistillResult:
    run, student = prepared.run, request.student
    questions = choose_questions([*run.held, *run.examples])
    before = ask_all(run.model, questions) if is_first_process() else []
    trained = _train(request, options, prepared, watch)
    if not is_first_process():
        return DistillResult(prepared.plan, trained)
    result = _finish(request, options, prepared, trained)
    adapters = (result,) if trained.adapter is not None and result.name != MERGED_FILE else ()
    told = run.model if adapters else replace(run.model, gguf_path=result, installed=None)
    after = ask_all(told, questions, adapters=adapters)
    warnings = [*prepared.warnings, *trained.warnings]
    landed = None
    if not student.skip_landing:
        student = replace(student, changes=matching_template(student.changes, run))
        with _work(replace(request, student=student), prepared, trained):
            landed = _land(request, student.changes, options, prepared, result)
    undo = (*([removal_command(landed.name, options)] if landed else []), removal_of(student.folder))
    from ollama_forge.train.report import AnswerPair, write_report

    answers = tuple(AnswerPair(str(q[-1]["content"]), b, a) for q, b, a in zip(questions, before, after, strict=True))
    report = write_report(
        student.folder,
        f"{student.base} taught by {request.teacher}" + (f": {student.name}" if student.name else ""),
        _facts(request, prepared, trained, landed),
        trained.train_losses,
        trained.validation_losses,
        answers,
        undo,
    )
    return DistillResult(prepared.plan, trained, result, landed, answers, report, undo, tuple(warnings))


def _train(
    request: DistillRequest, options: LandOptions, prepared: PreparedDistillation, watch: Watch | None
) -> TrainedStudent:
    from ollama_forge.train.distill import StudentRows
    from ollama_forge.train.distill_run import TeacherFile, run_distillation

    run = prepared.run
    rows = StudentRows(run.train.rows, run.validation.rows if run.validation else ())
    is_cached = bool(request.options.cached_words)
    teacher = TeacherFile(
        prepared.teacher_gguf,
        weights_digest(prepared.teacher_gguf.path) if is_cached else "",
        prepared.plan.n_words,
        request.cache or request.folder / TEACHER_FOLDER,
        prepared.aligned,
    )
    n_tokens = sum(len(row.input_ids) for row in rows.all)
    progress = options.progress if is_cached and is_first_process() else no_progress
    with progress("Asking the teacher (tokens)", n_tokens) as advance:
        return run_distillation(
            run.gguf,
            teacher,
            rows,
            request.student.lora,
            run.loop,
            request.options,
            request.folder,
            base=name_for_others(run),
            end_ids=sorted(run.chat_format.end_ids),
            resume=request.student.resume,
            is_shared=shares_blocks(),
            watch=watch,
            on_asked=advance,
        )


def _finish(
    request: DistillRequest, options: LandOptions, prepared: PreparedDistillation, trained: TrainedStudent
) -> Path:
    """What is landed: a GGUF with all weights, or the adapter as a GGUF."""
    if trained.model is not None:
        return trained.model
    assert trained.adapter is not None
    if request.quant is None:
        return prepare_adapter(trained.adapter, prepared.run.model, request.folder)
    merged = request.folder / MERGED_FILE
    merge_model(
        prepared.run.model,
        [MergeInput(trained.adapter)],
        merged,
        MergeOptions(imatrix=request.folder / IMPORTANCE_FILE),
        overwrite=True,
        progress=options.progress,
    )
    return merged


def _land(
    request: DistillRequest, changes: Modelfile, options: LandOptions, prepared: PreparedDistillation, result: Path
) -> LandedModel:
    run, student = prepared.run, replace(request.student, changes=changes)
    assert student.name is not None
    if request.quant is None and not request.options.is_full:
        return land_adapter(student, options, run.model, result)
    quantize = quantize_options(request.quant, allow_requantize=True) if request.quant is not None else None
    wanted = inherited(run.model, changes)
    return land_gguf(result, student.name, wanted, options, quantize=quantize, projector=run.model.projector)


def _work(
    request: DistillRequest, prepared: PreparedDistillation, trained: TrainedStudent
) -> contextlib.AbstractContextManager[None]:
    """What the registry is told: student, teacher, data, settings, how near it came; enough to do it again."""
    student, run = request.student, prepared.run
    models = [hashed_ingredient(prepared.teacher)]  # a student that is made of its teacher has no other origin
    if request.cut is None:
        models = [hashed_ingredient(run.origin), hashed_ingredient(prepared.teacher, "teacher")]
    data = [hashed_ingredient(path, "data") for path in find_data_files(student.data, student.include)]
    return working(
        "distill",
        [*models, *data],
        {
            "base_divergence": trained.base_divergence,
            "final_divergence": trained.final_divergence,
            "base_loss": trained.base_loss,
            "final_loss": trained.final_loss,
        },
        seconds=trained.seconds,
        lora=asdict(student.lora),
        loop=asdict(run.loop),
        options=asdict(request.options),
        cut=request.cut and asdict(request.cut),
        steps=trained.steps,
        processes=count_processes(),
        quant=request.quant,
        modelfile=modelfile_text(student.changes),
        **recorded_settings(student),
    )


def _facts(
    request: DistillRequest, prepared: PreparedDistillation, trained: TrainedStudent, landed: LandedModel | None
) -> dict[str, str]:
    plan, options = prepared.plan.training, request.options
    facts = {
        "student": f"{plan.base} ({plan.family}, {plan.base_bytes:,} bytes)",
        "teacher": f"{request.teacher} ({prepared.plan.teacher_bytes:,} bytes)",
        "examples": f"{plan.n_examples} to learn, {plan.n_validation} held back",
        "tokens": f"{plan.n_tokens:,} per epoch, {plan.n_learnt_tokens:,} with loss",
        "from the teacher": f"{trained.base_divergence:.4f} before, {trained.final_divergence:.4f} after "
        "(nats per token)",
        "loss on the answers": f"{trained.base_loss:.4f} before, {trained.final_loss:.4f} after (nats per token)",
        "minimised": f"{options.loss.divergence.value} at temperature {options.loss.temperature:g}, "
        f"{options.loss.ce_weight:.0%} cross-entropy",
        "steps": str(trained.steps),
        "trained numbers": f"{trained.n_trained_parameters:,}" + (" (all)" if options.is_full else " (LoRA)"),
        "time": f"{trained.seconds:.1f} s",
        "learning rate": f"{request.student.loop.learning_rate:g}",
        "seed": str(request.student.loop.seed),
    }
    if landed:
        facts["landed"] = f"{landed.name} {landed.digest[:12]}, {landed.written_bytes:,} bytes written"
    return facts
