"""Everything about a distillation that can be checked before it starts: both models, their words, data, folder, sums.

In: a `DistillRequest`. Out: a `PreparedDistillation`, or an error before any work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.dataset.align import AlignedRow, align_rows
from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.examples import hash_examples
from ollama_forge.dataset.render import RenderOptions
from ollama_forge.dataset.tokenize import TokenizedDataset, tokenize_examples
from ollama_forge.errors import DatasetError, TrainingError, UsageError
from ollama_forge.files import is_same_disk
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.jobs.conversion import quantize_options
from ollama_forge.jobs.finetune_setup import (
    FinetuneRequest,
    PreparedRun,
    as_trainable,
    prepare_run,
    require_extra,
    require_free_name,
    require_trainable,
)
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.lineage import weights_digest
from ollama_forge.jobs.processes import is_first_process
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.run_folder import claim_folder
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.jobs.teacher_answers import AskOptions
from ollama_forge.jobs.training_disk import FLOAT_BYTES, TrainingDisk, checkpoint_bytes
from ollama_forge.jobs.training_plan import TrainingPlan, training_seconds
from ollama_forge.tokenizer.compare import match_vocabularies
from ollama_forge.train.distill_options import DistillOptions, Divergence

TEACHER_FOLDER = "teacher"
_LEARNT_FLOATS = 4  # a number, its gradient, and Adam's two moments


@dataclass(frozen=True)
class StudentCut:
    """A student that is the teacher, cut smaller: layers and channels of the residual stream that stay."""

    n_layers: int | None = None
    hidden: int | None = None


@dataclass(frozen=True)
class DistillRequest:
    """Who teaches whom.

    Attributes:
        student: what is trained, on what, and what becomes of it; its `base` is the student.
        teacher: any model on this disk: an Ollama name, a GGUF, a Hugging Face folder.
        quant: land the student in this quantization; None: as it is.
        cache: folder for the teacher's predictions; None: in the working folder.
        ask: the teacher first answers the questions of the data, and its answers are what both read.
        cut: the student is made of the teacher first, in the working folder; its `base` is then that file, and what
            the teacher says beside its weights stays.
    """

    student: FinetuneRequest
    teacher: str
    options: DistillOptions = field(default_factory=DistillOptions)
    quant: str | None = None
    cache: Path | None = None
    ask: AskOptions | None = None
    cut: StudentCut | None = None

    @property
    def folder(self) -> Path:
        return self.student.folder

    @property
    def is_aligned(self) -> bool:
        """Whether the two are compared where their tokenizers meet, by sorted probabilities."""
        return self.options.loss.divergence is Divergence.SORTED


@dataclass(frozen=True)
class DistillPlan:
    """The sums of a distillation, beside those of the student's training.

    Attributes:
        training: the student's; its memory is that of LoRA on packed weights.
        memory_bytes: of everything at once, on each process.
        seconds: as the student's, with the teacher's reading.
        disk: what is written, and where; its `cache_bytes` is what the teacher's predictions take.
        n_words: of the vocabulary that both share.
    """

    training: TrainingPlan
    teacher: str
    teacher_bytes: int
    memory_bytes: int
    seconds: float | None
    disk: TrainingDisk
    n_words: int
    is_full: bool

    @property
    def light(self) -> str:
        return replace(self.training, memory_bytes=self.memory_bytes).light

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            **self.training.document(),
            "student": self.training.base,
            "teacher": self.teacher,
            "teacher_bytes": self.teacher_bytes,
            "memory_bytes": self.memory_bytes,
            "cache_bytes": self.disk.cache_bytes,
            **self.disk.document(),
            "seconds": None if self.seconds is None else round(self.seconds),
            "shared_words": self.n_words,
            "full": self.is_full,
            "light": self.light,
        }


@dataclass(frozen=True)
class PreparedDistillation:
    """What is needed, checked; the files stay open. `teacher` is as it was named, before a folder became a GGUF."""

    run: PreparedRun
    teacher: ResolvedModel
    teacher_gguf: GGUFFile
    plan: DistillPlan
    warnings: tuple[str, ...]
    aligned: tuple[AlignedRow, ...] = ()


@contextlib.contextmanager
def prepare_distillation(request: DistillRequest, options: LandOptions) -> Iterator[PreparedDistillation]:
    """Check all there is to check; headers and the data are read, no weight is.

    Raises:
        TrainingError: the vocabularies differ, or a model cannot be trained.
        UsageError: options that do not go together.
        As `finetune_setup.prepare_run`.
    """
    teacher, n_words = check_models(request, options)
    with contextlib.ExitStack() as files:
        place = request.folder / TEACHER_FOLDER
        if options.dry_run:
            place = files.enter_context(scratch_folder())
        packed = as_trainable(teacher, place, options)
        assert packed.gguf_path is not None
        gguf = files.enter_context(open_gguf(packed.gguf_path))
        run = files.enter_context(prepare_run(request.student, options))
        if request.cut is not None:
            run = replace(run, model=replace(run.model, modelfile=teacher.modelfile))
        require_trainable(gguf, request.teacher)
        if gguf.path == run.gguf.path:
            raise UsageError(
                f"{request.teacher!r} is its own student",
                why="It predicts what it predicts already.",
                next="Make a smaller one first: ollama-forge downsize prune REF --keep 70% --name NAME",
            )
        aligned: tuple[AlignedRow, ...] = ()
        if request.is_aligned:
            run, aligned = _align(request, run, gguf)
        plan = _plan(request, run, gguf, n_words)
        yield PreparedDistillation(run, teacher, gguf, plan, _warnings(request, run, gguf, plan), aligned)


def _align(request: DistillRequest, run: PreparedRun, teacher: GGUFFile) -> tuple[PreparedRun, tuple[AlignedRow, ...]]:
    """The run with labels only where both tokenizers begin a token, and the teacher's side of each row."""
    student = request.student
    chat_format = chat_format_of(teacher.metadata)
    found: list[AlignedRow] = []
    parts: list[TokenizedDataset | None] = []
    for examples, part in ((run.examples, run.train), (run.held, run.validation)):
        if part is None:
            parts.append(None)
            continue
        theirs = tokenize_examples(
            examples,
            chat_format,
            max_length=student.max_length,
            options=RenderOptions(learn=student.learn),
            overlong=student.overlong,
        )
        rows = align_rows(part.rows, theirs.rows, run.chat_format.tokenizer, chat_format.tokenizer)
        if not rows:
            raise DatasetError(
                f"In none of {len(part.rows)} examples do the tokenizers of both models meet",
                why="Their answers are shown differently, or cut off.",
                next="Let the teacher write answers instead: --align text",
            )
        found += rows
        parts.append(replace(part, rows=tuple(row.student for row in rows)))
    train, validation = parts
    assert train is not None
    return replace(run, train=train, validation=validation), tuple(found)


def check_models(request: DistillRequest, options: LandOptions) -> tuple[ResolvedModel, int]:
    """The teacher, and how many words it shares with the student; only names and headers are looked at.

    Raises:
        TrainingError: the vocabularies differ.
        ExistsError, UsageError, NotFoundError: a name that is taken, wrong, or not there.
    """
    if is_first_process():
        require_free_name(request.student, options)
    require_extra(request.student.loop)
    if request.quant is not None:
        quantize_options(request.quant)
    teacher = resolve(request.teacher, options.store_path)
    if request.is_aligned:
        resolve(request.student.base, options.store_path)
        return teacher, 0
    return teacher, _shared_words(request, resolve(request.student.base, options.store_path), teacher)


def _shared_words(request: DistillRequest, student: ResolvedModel, teacher: ResolvedModel) -> int:
    match = match_vocabularies(metadata_of(student), metadata_of(teacher))
    if match.is_same:
        return match.n_words
    raise TrainingError(
        f"{request.teacher!r} and {request.student.base!r} do not read text as the same tokens",
        why=f"Their predictions cannot be compared word by word: {match.difference}.",
        next="Choose a way around it: --align text (the teacher writes answers, the student learns them), or "
        "--align sorted (compare sorted probabilities where both split the text alike).",
    )


def metadata_of(model: ResolvedModel) -> Mapping[str, Any]:
    """GGUF metadata of a model; of a folder, those that its GGUF would have."""
    if model.folder is not None:
        with plan_conversion(model.folder, ConvertOptions()) as conversion:
            return {item.key: item.value for item in conversion.fields}
    assert model.gguf_path is not None
    with open_gguf(model.gguf_path) as gguf:
        return dict(gguf.metadata)


def _plan(request: DistillRequest, run: PreparedRun, teacher: GGUFFile, n_words: int) -> DistillPlan:
    options = request.options
    training = run.plan
    memory = run.plan.memory_bytes + teacher.size_bytes
    if options.is_full:
        n_numbers = _count_learnt(run.gguf)
        training = replace(training, n_trained_parameters=n_numbers)
        memory += n_numbers * FLOAT_BYTES * _LEARNT_FLOATS - run.plan.n_trained_parameters * FLOAT_BYTES * 4
    cache_bytes = 0
    if options.cached_words:
        learnt = run.train.n_learnt + (run.validation.n_learnt if run.validation else 0)
        cache_bytes = learnt * position_bytes(options.cached_words, n_words)
        memory -= teacher.size_bytes
    disk = _plan_disk(request, run, cache_bytes)
    seconds = training_seconds(run.gguf, run.train, run.loop, run.plan.steps, 3 if options.is_full else 2)
    asking = training_seconds(teacher, run.train, replace(run.loop, checkpointing=False), run.plan.steps, 1)
    return DistillPlan(
        training,
        request.teacher,
        teacher.size_bytes,
        memory,
        None if seconds is None or asking is None else seconds + asking,
        disk,
        n_words,
        options.is_full,
    )


def _plan_disk(request: DistillRequest, run: PreparedRun, cache_bytes: int) -> TrainingDisk:
    """The student's disk: with full training its weights and their optimizer; a merged model where it is quantized."""
    disk = run.plan.disk
    base_bytes = run.gguf.size_bytes
    if request.options.is_full:
        disk = replace(
            disk,
            checkpoint_bytes=checkpoint_bytes(run.gguf, _count_learnt(run.gguf)),
            result_bytes=disk.result_bytes - 2 * run.plan.n_trained_parameters * FLOAT_BYTES + base_bytes,
        )
    elif request.quant is not None:
        disk = replace(disk, result_bytes=disk.result_bytes + base_bytes)
    if disk.store is not None and (request.options.is_full or request.quant is not None):
        is_linked = request.quant is None and is_same_disk(disk.store, disk.folder)
        disk = replace(disk, landing_bytes=0 if is_linked else base_bytes)
    if cache_bytes:
        disk = replace(disk, cache_bytes=cache_bytes, cache=request.cache or request.folder / TEACHER_FOLDER)
    return disk


def position_bytes(n_kept: int, n_words: int) -> int:
    """Bytes of one position in the cache of a teacher's predictions (`train.teacher_cache`)."""
    kept = min(n_kept, n_words)
    return kept * (2 if n_words <= 1 << 16 else 3) + 2 * (kept + 1)


def _count_learnt(gguf: GGUFFile) -> int:
    """Numbers that full training changes: of all tensors that a layer of the model reads."""
    family = find_family_by_gguf(gguf.architecture)
    addresses = ((family.address_by_gguf_name(name), tensor) for name, tensor in gguf.tensors.items())
    return sum(math.prod(tensor.shape) for address, tensor in addresses if address and address.row.hf_name)


def _warnings(request: DistillRequest, run: PreparedRun, teacher: GGUFFile, plan: DistillPlan) -> tuple[str, ...]:
    warnings = [*run.data_warnings, *(() if plan.is_full else plan.training.expert_notes)]
    key = "tokenizer.chat_template"
    if run.gguf.metadata.get(key) != teacher.metadata.get(key) and not request.is_aligned:
        warnings.append(
            "Teacher and student have different chat templates: the teacher reads what the student's template renders."
        )
    if plan.light == "red":
        warnings.append(
            f"This run wants about {plan.memory_bytes / 1e9:.1f} GB; "
            f"{(plan.training.available_bytes or 0) / 1e9:.1f} GB are free: keep the teacher's predictions (--cache), "
            "lower --max-length or --batch-size, or leave --full out."
        )
    return tuple(warnings)


def claim_distillation(request: DistillRequest, prepared: PreparedDistillation) -> None:
    """Take the working folder for this run.

    Raises:
        ExistsError: there is another run in it, or this one and it is not to be resumed.
    """
    run = prepared.run
    asked = {
        "student": weights_digest(run.gguf.path),
        "teacher": weights_digest(prepared.teacher_gguf.path),
        "data": hash_examples(run.examples),
        "validation": hash_examples(run.held),
        "lora": asdict(request.student.lora),
        "loop": asdict(run.loop),
        "max_length": request.student.max_length,
        "overlong": request.student.overlong,
        "learn": request.student.learn,
        "options": asdict(request.options),
    }
    claim_folder(request.folder, asked, is_resumed=request.student.resume)
