"""One distillation on open GGUFs: load the student packed, and its teacher or what was kept of it; train, close.

In: what `jobs.distillation` has prepared and checked. Out: `TrainedStudent`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ollama_forge.dataset.align import AlignedRow
from ollama_forge.gguf.imatrix import write_imatrix
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.train.distill import StudentRows, distil_student
from ollama_forge.train.distill_options import DistillOptions, TrainedStudent
from ollama_forge.train.importance import gather_importance
from ollama_forge.train.load import load_packed
from ollama_forge.train.options import IMPORTANCE_FILE, LoopOptions, LoraOptions, Watch
from ollama_forge.train.run import IMPORTANCE_ROWS, SMALL_MODEL_BYTES
from ollama_forge.train.teacher import AlignedTeacher, PackedTeacher, Teacher, packed_teacher
from ollama_forge.train.teacher_cache import CacheFacts, build_cache, hash_rows


@dataclass(frozen=True)
class TeacherFile:
    """The teacher's weights.

    Attributes:
        sha256: of the file; what the cache of its predictions is known by.
        n_words: of the vocabulary that it shares with the student.
        cache: where its predictions are kept, if they are.
        aligned: for a teacher with another tokenizer, all rows side by side, in the order of the student's.
    """

    gguf: GGUFFile
    sha256: str
    n_words: int
    cache: Path
    aligned: Sequence[AlignedRow] = ()


def run_distillation(
    student: GGUFFile,
    teacher: TeacherFile,
    rows: StudentRows,
    lora: LoraOptions,
    loop: LoopOptions,
    options: DistillOptions,
    folder: Path,
    *,
    base: str,
    end_ids: Sequence[int] = (),
    resume: bool = False,
    is_shared: bool = False,
    watch: Watch | None = None,
    on_asked: Callable[[int], None] | None = None,
) -> TrainedStudent:
    """Distil; see `distill.distil_student`. Beside an adapter an importance matrix is left, as `train.run` leaves one.

    Args:
        on_asked: called with the number of tokens that the teacher has read for its cache.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        if student.size_bytes < SMALL_MODEL_BYTES:
            # Threads that wait for each other cost more than they bring where a model fits the processor's cache.
            torch.set_num_threads(1)
        packed = load_packed(student)
        trained = distil_student(
            packed,
            _find_teacher(teacher, rows, loop, options, on_asked),
            rows,
            lora,
            loop,
            options,
            folder,
            base=base,
            end_ids=end_ids,
            resume=resume,
            is_shared=is_shared,
            watch=watch,
        )
        if trained.adapter is not None:
            imatrix = gather_importance(packed, packed.model, islice(rows.train, IMPORTANCE_ROWS))
            write_imatrix(folder / IMPORTANCE_FILE, imatrix, overwrite=True)
    return trained


def cache_facts(teacher: TeacherFile, rows: StudentRows, options: DistillOptions) -> CacheFacts:
    """What the cache of this run is known by."""
    return CacheFacts(
        teacher=teacher.sha256,
        rows=hash_rows(rows.all),
        n_rows=len(rows.all),
        n_kept=options.cached_words,
        n_words=teacher.n_words,
        temperature=options.loss.temperature,
    )


def _find_teacher(
    teacher: TeacherFile,
    rows: StudentRows,
    loop: LoopOptions,
    options: DistillOptions,
    on_asked: Callable[[int], None] | None,
) -> Teacher:
    def load() -> PackedTeacher:
        loaded = packed_teacher(load_packed(teacher.gguf))
        if torch.cuda.is_available() and loop.device != "cpu":
            loaded.to(torch.device("cuda", torch.cuda.current_device()))
        return loaded

    if teacher.aligned:
        return AlignedTeacher(load(), teacher.aligned)
    if not options.cached_words:
        return load()
    return build_cache(load, rows.all, cache_facts(teacher, rows, options), teacher.cache, advance=on_asked)
