"""Fine-tune the very model that Ollama runs: data in, a checked model with an adapter in Ollama out.

In: a `FinetuneRequest`. Out: `FinetuneResult`. The order: everything that can be refused is refused first; then
the plan; three questions, training, the same questions again; then landing and the report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.examples import Example
from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.render import ALPACA_GO_TEMPLATE
from ollama_forge.engine import GREEDY, open_engine
from ollama_forge.files import write_bytes
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.adapters import prepare_adapter
from ollama_forge.jobs.finetune_setup import (
    FinetuneRequest,
    PreparedRun,
    claim_run,
    prepare_run,
    require_extra,
    require_free_name,
)
from ollama_forge.jobs.land_options import LandOptions, removal_command
from ollama_forge.jobs.landing import LandedModel, land_gguf, land_installed
from ollama_forge.jobs.lineage import file_ingredient, hashed_ingredient, ingredient_of, modelfile_text, working
from ollama_forge.jobs.merging import MergeInput, MergeOptions, inherited, merge_and_land
from ollama_forge.jobs.processes import count_processes, is_first_process, shares_blocks, wait_for_first_process
from ollama_forge.jobs.resolve import STORED, ResolvedModel
from ollama_forge.jobs.run_folder import RUN_FILE, removal_of
from ollama_forge.jobs.training_plan import TrainingPlan
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.options import IMPORTANCE_FILE, TrainedAdapter, Watch
from ollama_forge.transform.origin import source_repo

if TYPE_CHECKING:
    from ollama_forge.train.report import AnswerPair

N_QUESTIONS = 3
ANSWER_TOKENS = 96
TWIN = "base_gguf"
"""Role of a GGUF that was trained on in place of the base itself."""
TEMPLATE_FILE = "template.txt"
"""Name of the Ollama template that an adapter needs, in the folder of a run that does not land it."""
RECORDED_SETTINGS = ("max_length", "overlong", "learn", "validation_share", "merge")


@dataclass(frozen=True)
class FinetuneResult:
    """What came of it. `adapter_gguf` and `landed` are None in a dry run; `landed` also with `skip_landing`."""

    plan: TrainingPlan
    trained: TrainedAdapter | None = None
    adapter_gguf: Path | None = None
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
            "adapter": str(trained.folder) if trained else None,
            "adapter_gguf": str(self.adapter_gguf) if self.adapter_gguf else None,
            "steps": trained.steps if trained else 0,
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


def finetune(
    request: FinetuneRequest,
    options: LandOptions,
    *,
    on_plan: Callable[[TrainingPlan], None] | None = None,
    watch: Watch | None = None,
) -> FinetuneResult:
    """Do the whole job; with `options.dry_run` only the plan. Of several processes the first one lands.

    Raises:
        DatasetError, TemplateError: data that cannot be used.
        TrainingError: the base cannot be trained, or training did nothing.
        UnsupportedError: processes that were started in a way that cannot work here.
        ExistsError: the name or the working folder is taken.
        UsageError: the device that was asked for is not here.
        DiskError: no room for checkpoints and results, before the work or in the middle of it.
        MissingExtraError: torch and its friends are not installed.
    """
    shares_blocks()
    if not options.dry_run:
        wait_for_first_process(request.folder / RUN_FILE)
    if is_first_process():
        require_free_name(request, options)
    require_extra(request.loop)
    with prepare_run(request, options) as prepared:
        if on_plan and is_first_process():
            on_plan(prepared.plan)
        if is_first_process():
            prepared.plan.disk.require()
        if options.dry_run:
            return FinetuneResult(prepared.plan, warnings=prepared.warnings)
        if is_first_process():
            claim_run(request, prepared)
        return _train_and_land(request, options, prepared, watch)


def _train_and_land(
    request: FinetuneRequest, options: LandOptions, prepared: PreparedRun, watch: Watch | None
) -> FinetuneResult:
    from ollama_forge.train.report import AnswerPair, write_report
    from ollama_forge.train.run import run_training

    questions = choose_questions([*prepared.held, *prepared.examples])
    before = ask_all(prepared.model, questions) if is_first_process() else []
    trained = run_training(
        prepared.gguf,
        prepared.chat_format.tokenizer,
        prepared.train.rows,
        prepared.validation.rows if prepared.validation else (),
        request.lora,
        prepared.loop,
        request.folder,
        base=name_for_others(prepared),
        resume=request.resume,
        is_shared=shares_blocks(),
        watch=watch,
    )
    if not is_first_process():
        return FinetuneResult(prepared.plan, trained)
    adapter_gguf = prepare_adapter(trained.folder, prepared.model, request.folder)
    after = ask_all(prepared.model, questions, adapters=(adapter_gguf,))
    answers = tuple(AnswerPair(_prompt_of(q), b, a) for q, b, a in zip(questions, before, after, strict=True))
    warnings = [*prepared.warnings, *trained.warnings]
    if answers and before == after:
        warnings.append(
            f"All {len(answers)} answers are the same as before training: train longer, or raise the learning rate."
        )
    request = replace(request, changes=matching_template(request.changes, prepared))
    if request.skip_landing and request.changes.template is not None:
        write_bytes(request.folder / TEMPLATE_FILE, request.changes.template.encode(), overwrite=True)
    with _training(request, prepared, trained):
        landed = None if request.skip_landing else land_adapter(request, options, prepared.model, adapter_gguf)
    undo = _undo(request, landed, options)
    report = write_report(
        request.folder,
        f"Fine-tune of {request.base}" + (f": {request.name}" if request.name else ""),
        _facts(request, prepared, trained, landed),
        trained.train_losses,
        trained.validation_losses,
        answers,
        undo,
    )
    return FinetuneResult(prepared.plan, trained, adapter_gguf, landed, answers, report, undo, tuple(warnings))


def _training(
    request: FinetuneRequest, prepared: PreparedRun, trained: TrainedAdapter
) -> contextlib.AbstractContextManager[None]:
    """What the registry is told of a fine-tune: base, data, settings, losses; enough to do it again."""
    sources = [hashed_ingredient(prepared.origin)]
    sources += [file_ingredient(path, "data") for path in find_data_files(request.data, request.include)]
    if request.base_gguf is not None:
        sources.append(file_ingredient(prepared.gguf.path, TWIN))
    return working(
        "finetune",
        sources,
        {"base_loss": trained.base_loss, "final_loss": trained.final_loss},
        seconds=trained.seconds,
        lora=asdict(request.lora),
        loop=asdict(prepared.loop),
        steps=trained.steps,
        processes=count_processes(),
        modelfile=modelfile_text(request.changes),
        **recorded_settings(request),
    )


def recorded_settings(request: FinetuneRequest) -> dict[str, Any]:
    """What a record of training holds beside adapter and loop."""
    return {key: getattr(request, key) for key in RECORDED_SETTINGS}


def name_for_others(prepared: PreparedRun) -> str:
    """The base as an adapter names it: its repo on the Hub where that is known; an Ollama name or a path is not one,
    however it was typed."""
    repo = source_repo(prepared.gguf.metadata)
    origin = ingredient_of(prepared.origin)
    if repo or origin.commit:
        return repo or origin.ref.removeprefix("hf:").partition(":")[0]
    return origin.ref if prepared.origin.installed is None else STORED + origin.ref


def matching_template(changes: Modelfile, prepared: PreparedRun) -> Modelfile:
    """A model without a chat template learns Alpaca blocks; Ollama must then send the same blocks."""
    is_chat = any(not example.is_plain for example in prepared.examples)
    has_template = prepared.chat_format.template is not None or prepared.model.modelfile.template is not None
    if has_template or changes.template is not None or not is_chat:
        return changes
    return replace(changes, template=ALPACA_GO_TEMPLATE)


def ask_all(
    model: ResolvedModel, questions: Sequence[Sequence[dict[str, Any]]], *, adapters: Sequence[Path] = ()
) -> list[str]:
    """What the model says to each conversation, greedily, through the engine."""
    if not questions:
        return []
    assert model.gguf_path is not None
    sampling = replace(GREEDY, max_tokens=ANSWER_TOKENS)
    with open_gguf(model.gguf_path) as gguf:
        has_template = "tokenizer.chat_template" in gguf.metadata
    with open_engine(model.gguf_path, adapters=[(path, 1.0) for path in adapters], context_length=2048) as engine:
        return [
            (engine.chat(turns, sampling) if has_template else engine.generate(turns[-1]["content"], sampling)).text
            for turns in questions
        ]


def choose_questions(examples: Sequence[Example]) -> list[list[dict[str, Any]]]:
    """The first few prompts, each a conversation that ends with the user; give held-out examples first."""
    questions = []
    for example in examples[:N_QUESTIONS]:
        turns = [dict(message) for message in example.messages()]
        while turns and turns[-1]["role"] != "user":
            turns.pop()
        if turns:
            questions.append(turns)
    return questions


def _prompt_of(turns: Sequence[dict[str, Any]]) -> str:
    return str(turns[-1]["content"])


def land_adapter(request: FinetuneRequest, options: LandOptions, model: ResolvedModel, adapter: Path) -> LandedModel:
    """The base with a trained adapter becomes an Ollama model: as a layer, or merged where that was asked."""
    assert request.name is not None and model.gguf_path is not None
    if request.merge:
        _, landed = merge_and_land(
            model,
            [MergeInput(adapter)],
            request.name,
            request.changes,
            options,
            MergeOptions(imatrix=request.folder / IMPORTANCE_FILE),
        )
        return landed
    if model.installed is not None:
        return land_installed(model.installed, request.name, request.changes, options, adapters=(adapter,))
    return land_gguf(model.gguf_path, request.name, inherited(model, request.changes), options, adapters=(adapter,))


def _undo(request: FinetuneRequest, landed: LandedModel | None, options: LandOptions) -> tuple[str, ...]:
    steps = [removal_command(landed.name, options)] if landed else []
    return (*steps, removal_of(request.folder))


def _facts(
    request: FinetuneRequest, prepared: PreparedRun, trained: TrainedAdapter, landed: LandedModel | None
) -> dict[str, str]:
    facts = {
        "base": f"{request.base} ({prepared.plan.family}, {prepared.plan.base_bytes:,} bytes)",
        "examples": f"{prepared.plan.n_examples} to learn, {prepared.plan.n_validation} held back",
        "tokens": f"{prepared.plan.n_tokens:,} per epoch, {prepared.plan.n_learnt_tokens:,} with loss",
        "loss": f"{trained.base_loss:.4f} before, {trained.final_loss:.4f} after (nats per token)",
        "steps": str(trained.steps),
        "trained numbers": f"{trained.n_trained_parameters:,}",
        "time": f"{trained.seconds:.1f} s",
        "rank, alpha": f"{request.lora.rank}, {request.lora.scaled_alpha:g}",
        "learning rate": f"{request.loop.learning_rate:g}",
        "seed": str(request.loop.seed),
    }
    if landed:
        facts["landed"] = f"{landed.name} {landed.digest[:12]}, {landed.written_bytes:,} bytes written"
    return facts
