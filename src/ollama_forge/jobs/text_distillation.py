"""Distillation through text: the teacher writes answers, the student learns them as its own training data.

In: a `TextDistillRequest`. Out: `TextDistillResult`. It needs no common tokenizer, and the teacher may be far away. The
training itself is `jobs.finetune`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.errors import UsageError
from ollama_forge.files import write_bytes
from ollama_forge.jobs.finetune import FinetuneResult, finetune
from ollama_forge.jobs.finetune_setup import FinetuneRequest, require_extra, require_free_name
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.lineage import Ingredient, hashed_ingredient
from ollama_forge.jobs.processes import is_first_process, wait_for_first_process
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.teacher_answers import (
    ANSWERS_FILE,
    ANSWERS_FOLDER,
    DONE_FILE,
    AnswerSheet,
    AskOptions,
    OnAnswered,
    asking_work,
    gather_answers,
    read_questions,
)
from ollama_forge.jobs.training_plan import TrainingPlan
from ollama_forge.store.server import OllamaServer
from ollama_forge.train.options import Watch


@dataclass(frozen=True)
class TextDistillRequest:
    """Who writes, who learns. The data of `student` are the questions; answers in them are not looked at."""

    student: FinetuneRequest
    ask: AskOptions


@dataclass(frozen=True)
class TextDistillResult:
    """What came of it; both None in a dry run.

    Attributes:
        n_questions: that the teacher is, or would be, asked.
    """

    n_questions: int
    answers: AnswerSheet | None = None
    training: FinetuneResult | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form: that of a fine-tune, and the answers."""
        training = self.training.document() if self.training else {"dry_run": True}
        return {
            **training,
            "questions": self.n_questions,
            "teacher_answers": self.answers.document() if self.answers else None,
        }


def distill_text(
    request: TextDistillRequest,
    options: LandOptions,
    *,
    on_answer: OnAnswered | None = None,
    on_plan: Callable[[TrainingPlan], None] | None = None,
    watch: Watch | None = None,
) -> TextDistillResult:
    """Gather the answers, then train and land.

    Raises:
        DatasetError: no questions, or no answers.
        NotFoundError, ServerError: no such teacher.
        As `jobs.finetune.finetune`.
    """
    student = request.student
    if is_first_process():
        require_free_name(student, options)
    require_extra(student.loop)
    base = resolve(student.base, options.store_path)
    teacher = _find_teacher(request, options)
    questions = read_questions(student.data, student.include)
    if options.dry_run:
        return TextDistillResult(len(questions))
    folder = student.folder / ANSWERS_FOLDER
    sheet = None
    if is_first_process():
        sheet = gather_answers(questions, request.ask, folder, model=teacher, on_answer=on_answer)
        write_bytes(folder / DONE_FILE, b"", overwrite=True)
    else:
        wait_for_first_process(folder / DONE_FILE)
    taught_by = hashed_ingredient(teacher, "teacher") if teacher else Ingredient("teacher", request.ask.teacher)
    models = [hashed_ingredient(base), taught_by]
    learning = replace(student, data=(folder / ANSWERS_FILE,), include=())
    with asking_work(student.data, student.include, request.ask, folder, models):
        return TextDistillResult(len(questions), sheet, finetune(learning, options, on_plan=on_plan, watch=watch))


def _find_teacher(request: TextDistillRequest, options: LandOptions) -> ResolvedModel | None:
    """The teacher on this disk; None where hosts are asked, after a look whether one of them has it."""
    ask = request.ask
    if not ask.hosts:
        return resolve(ask.teacher, options.store_path)
    if len(set(ask.hosts)) != len(ask.hosts):
        raise UsageError(
            "One --teacher-host is given twice", next="Name each host once; --parallel asks it more often."
        )
    for host in ask.hosts:
        with OllamaServer(host) as server:
            server.show(ask.teacher)
    return None
