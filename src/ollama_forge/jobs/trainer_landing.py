"""What another trainer made becomes an Ollama model, after the same doubts as the built-in trainer's adapter.

In: a finished `TrainerJob`. Out: `TrainerResult`. An adapter is landed as a layer; where a layer cannot hold all of it
(llama.cpp's old finetune trains norms too), it is merged, and that is said.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ollama_forge.dataset.read import find_data_files
from ollama_forge.dataset.tokenize import split_examples
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.errors import AdapterError, TrainingError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.adapters import base_path, prepare_adapter, require_numbers
from ollama_forge.jobs.conversion import quantize_options
from ollama_forge.jobs.finetune import ask_all, choose_questions, land_adapter
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.land_options import LandOptions, removal_command
from ollama_forge.jobs.landing import land_gguf
from ollama_forge.jobs.merging import MergeInput, inherited, merge_and_land
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.run_folder import removal_of
from ollama_forge.jobs.trainer_job import AnswerChange, TrainerJob, TrainerResult
from ollama_forge.transform.lora_gguf import require_expressible
from ollama_forge.weights.adapter import find_adapter, open_adapter
from ollama_forge.weights.adapter_base import describe_base
from ollama_forge.weights.adapter_fit import fit_adapter


def finish(job: TrainerJob, request: FinetuneRequest, target: ResolvedModel, options: LandOptions) -> TrainerResult:
    """Judge what the trainer left, and land it.

    Raises:
        TrainingError: nothing is there, or it changes nothing.
        AdapterError: it does not fit the base.
    """
    started = time.monotonic()
    if not job.result.exists() or (job.result.is_dir() and not any(job.result.iterdir())):
        raise TrainingError(
            f"{job.trainer} ended well, but there is nothing at {str(job.result)!r}",
            why="Its result was expected there.",
            next="Look at what it wrote above; if the adapter is elsewhere: "
            f"ollama-forge retrain --base {request.base} --adapter PATH --name {request.name or 'NAME'}",
        )
    result = (_finish_model if job.makes_model else _finish_adapter)(job, request, target, options)
    undo = (*((removal_command(result.landed.name, options),) if result.landed else ()), removal_of(request.folder))
    return replace(result, is_trained=True, undo=undo, seconds=time.monotonic() - started)


def _finish_adapter(
    job: TrainerJob, request: FinetuneRequest, target: ResolvedModel, options: LandOptions
) -> TrainerResult:
    place = find_adapter(job.result)
    with open_adapter(place.path) as adapter:
        if require_numbers(adapter) == 0.0 and not adapter.replacements:
            raise TrainingError(
                "Training changed nothing: every LoRA matrix is as it was at the start",
                why=f"{str(place.path)!r} holds only zeros in B.",
                next="Raise --lr or --epochs, or look at the data: ollama-forge train-data stats DATA --base REF",
            )
    warnings = list(job.warnings)
    reason = None if request.merge else _needs_merging(place.path, target)
    if reason:
        warnings.append(f"Merged into the weights, because an adapter layer cannot hold all of it. {reason}")
        if request.skip_landing:
            return TrainerResult(job, warnings=tuple(warnings))
        return _finish_merged(job, place.path, request, target, options, warnings)
    adapter_gguf = prepare_adapter(place.path, target, request.folder)
    questions = _questions(request)
    before = ask_all(target, questions)
    after = ask_all(target, questions, adapters=(adapter_gguf,))
    if before and before == after:
        warnings.append(_UNCHANGED.format(len(before)))
    landed = None if request.skip_landing else land_adapter(request, options, target, adapter_gguf)
    return TrainerResult(
        job,
        adapter_gguf=adapter_gguf,
        landed=landed,
        answers=_changes(questions, before, after),
        warnings=tuple(warnings),
    )


_UNCHANGED = "All {} answers are the same as before training: train longer, or raise the learning rate."


def _finish_model(
    job: TrainerJob, request: FinetuneRequest, target: ResolvedModel, options: LandOptions
) -> TrainerResult:
    trained = ResolvedModel(str(job.result), gguf_path=job.result)
    with open_gguf(job.result):
        pass  # a file that is no GGUF is told by its own error
    questions = _questions(request)
    before, after = ask_all(target, questions), ask_all(trained, questions)
    warnings = list(job.warnings)
    if before and before == after:
        warnings.append(_UNCHANGED.format(len(before)))
    landed = None
    if not request.skip_landing:
        assert request.name is not None
        quantize = quantize_options(job.file_type) if job.file_type else None
        landed = land_gguf(job.result, request.name, inherited(target, request.changes), options, quantize=quantize)
    return TrainerResult(job, landed=landed, answers=_changes(questions, before, after), warnings=tuple(warnings))


def _needs_merging(path: Path, target: ResolvedModel) -> str:
    """Why an adapter layer cannot hold it; empty when it can."""
    with open_adapter(path) as adapter:
        fitted = fit_adapter(adapter, describe_base(base_path(target)))
        try:
            require_expressible(fitted)
        except AdapterError as error:
            return f"{error.what}: {error.why}"
    return ""


def _finish_merged(
    job: TrainerJob,
    path: Path,
    request: FinetuneRequest,
    target: ResolvedModel,
    options: LandOptions,
    warnings: list[str],
) -> TrainerResult:
    assert request.name is not None
    merged, landed = merge_and_land(target, [MergeInput(path)], request.name, request.changes, options)
    warnings += merged.warnings
    if options.server is not None:
        return TrainerResult(job, landed=landed, warnings=tuple(warnings))
    questions = _questions(request)
    before, after = ask_all(target, questions), ask_all(resolve(request.name, options.store_path), questions)
    if before and before == after:
        warnings.append(_UNCHANGED.format(len(before)))
    return TrainerResult(job, landed=landed, answers=_changes(questions, before, after), warnings=tuple(warnings))


def _changes(
    questions: Sequence[Sequence[dict[str, Any]]], before: Sequence[str], after: Sequence[str]
) -> tuple[AnswerChange, ...]:
    rows = zip(questions, before, after, strict=True)
    return tuple(AnswerChange(str(turns[-1]["content"]), old, new) for turns, old, new in rows)


def _questions(request: FinetuneRequest) -> list[list[dict[str, Any]]]:
    dataset = read_dataset(find_data_files(request.data, request.include))
    examples, held = split_examples(dataset.examples, request.validation_share, request.loop.seed)
    return choose_questions([*held, *examples])
