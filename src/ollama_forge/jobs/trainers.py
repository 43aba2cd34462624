"""Fine-tuning by whichever trainer: the built-in one, or a program that somebody else wrote, with the same words.

In: a `FinetuneRequest` and `TrainerOptions`. Out: `FinetuneResult` from the built-in trainer, `TrainerResult` from the
others: data checked and written in the form that the trainer takes, the trainer run, its adapter or model landed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ollama_forge.dataset.formats import FORMATS
from ollama_forge.dataset.prepare import PreparedFile, prepare_files
from ollama_forge.dataset.read import find_data_files
from ollama_forge.errors import ExistsError, MissingExtraError, UsageError
from ollama_forge.files import hash_file, make_folder, refuse_existing
from ollama_forge.jobs.external_program import Output, quoted, run_program
from ollama_forge.jobs.finetune import FinetuneResult, finetune
from ollama_forge.jobs.finetune_setup import FinetuneRequest, as_trainable, require_free_name, twin_of
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.jobs.trainer_job import TrainerJob, TrainerOptions, TrainerResult, check_claim, write_claim
from ollama_forge.jobs.trainer_landing import finish
from ollama_forge.jobs.trainer_llama_cpp import Kind, find_finetune, plan_llama_cpp, require_finetune
from ollama_forge.jobs.trainer_python import plan_axolotl, plan_unsloth
from ollama_forge.jobs.training_plan import TrainingPlan
from ollama_forge.train.options import Watch
from ollama_forge.transform.folder import atomic_folder
from ollama_forge.weights.adapter_config import CONFIG_NAME

TRAINERS = ("auto", "builtin", "llama.cpp", "axolotl", "unsloth")
PREPARED_NAME = "train_prepared.txt"
ADAPTER_NAME = "adapter_out"
_FORMAT_OF = {"llama.cpp": "llama.cpp", "axolotl": "axolotl", "unsloth": "unsloth"}


def choose_trainer(trainer: TrainerOptions) -> str:
    """The trainer that is meant; `auto` looks for a program only where a GGUF was named for it.

    Raises:
        UsageError: words that contradict each other.
    """
    if trainer.trainer not in TRAINERS:
        raise UsageError(f"There is no trainer {trainer.trainer!r}", why=f"Known: {', '.join(TRAINERS)}.")
    if trainer.run_trainer:
        if trainer.base_gguf is None:
            raise UsageError(
                "--run-trainer needs --base-gguf",
                why="llama.cpp's finetune trains on a GGUF file.",
                next="Example: --base-gguf base.gguf --run-trainer; or leave both out: the built-in trainer needs "
                "neither.",
            )
        if trainer.trainer not in ("auto", "llama.cpp"):
            raise UsageError(
                f"--run-trainer is for llama.cpp's finetune, not for --trainer {trainer.trainer}",
                next="Leave one of the two out.",
            )
        return "llama.cpp"
    if trainer.trainer != "auto":
        return trainer.trainer
    wants_program = trainer.base_gguf is not None and find_finetune(Kind.LORA) is not None
    return "llama.cpp" if wants_program else "builtin"


def train(
    request: FinetuneRequest,
    trainer: TrainerOptions,
    options: LandOptions,
    *,
    output: Output,
    on_plan: Callable[[TrainingPlan], None] | None = None,
    on_command: Callable[[TrainerJob], None] | None = None,
    watch: Watch | None = None,
) -> FinetuneResult | TrainerResult:
    """Train and land; see `jobs.finetune.finetune` for what the built-in trainer raises.

    Args:
        output: gets what another trainer writes.
        on_command: is told what will be run, before it is.

    Raises:
        UsageError: options that contradict each other.
        MissingExtraError: the trainer is not here; all that it needs was written, and the error says how to run it.
        TrainingError: the trainer failed, or trained nothing.
    """
    name = choose_trainer(trainer)
    trainer = replace(trainer, format=require_format(name, trainer))
    if name == "builtin":
        return _train_builtin(request, trainer, options, on_plan, watch)
    return _train_outside(name, request, trainer, options, output, on_command)


def _train_builtin(
    request: FinetuneRequest,
    trainer: TrainerOptions,
    options: LandOptions,
    on_plan: Callable[[TrainingPlan], None] | None,
    watch: Watch | None,
) -> FinetuneResult:
    target = trainer.adapter_output
    if target is not None:
        _refuse_adapter_folder(target, overwrite=options.overwrite)
    if trainer.prepared_output is not None:
        _prepare(request, _form(trainer), trainer.prepared_output, options)
    result = finetune(replace(request, base_gguf=trainer.base_gguf), options, on_plan=on_plan, watch=watch)
    if target is not None and result.trained is not None:
        with atomic_folder(target.absolute(), overwrite=True) as folder:
            shutil.copytree(result.trained.folder, folder, dirs_exist_ok=True)
    return result


def _refuse_ours(name: str, request: FinetuneRequest) -> None:
    """What only the built-in trainer does is not left out in silence."""
    asked = {"--packing": bool(request.loop.packed_length), "--report-to": bool(request.loop.report_to)}
    for option in (option for option, is_asked in asked.items() if is_asked):
        raise UsageError(
            f"{option} is for the built-in trainer, not for {name}",
            why="Other trainers have settings of their own for it.",
            next="Leave it out, or add --trainer builtin.",
        )


def _refuse_adapter_folder(folder: Path, *, overwrite: bool) -> None:
    """Now, rather than after hours of training."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if overwrite and (folder / CONFIG_NAME).is_file():
        return
    raise ExistsError(
        f"{str(folder)!r} is there already",
        why="It may hold something that would be lost.",
        next="Choose another --adapter-output; an old adapter is replaced with --force.",
    )


def _train_outside(
    name: str,
    request: FinetuneRequest,
    trainer: TrainerOptions,
    options: LandOptions,
    output: Output,
    on_command: Callable[[TrainerJob], None] | None,
) -> TrainerResult:
    _refuse_ours(name, request)
    require_free_name(request, options)
    program = require_finetune() if name == "llama.cpp" else None
    if options.dry_run:
        return _plan_only(name, request, trainer, options)
    if program is None:
        _refuse_base_gguf(name, trainer)
    original = resolve(request.base, options.store_path)
    claim = check_claim(request, name, original, trainer.base_gguf, overwrite=options.overwrite)
    prepared = _prepare(request, _form(trainer), _prepared_path(name, request, trainer), options)
    write_claim(request, claim)
    if program is not None or original.folder is None:
        target = _trainable(request, options)  # refuses what has adapters already
    if program is not None:
        source = _training_base(trainer, target, options)
        adapter_dir = (trainer.adapter_output or Path(ADAPTER_NAME)).absolute()
        job = plan_llama_cpp(program, request, prepared, source, target, adapter_dir, options)
    else:
        adapter_dir = (trainer.adapter_output or request.folder / "adapter").absolute()
        plan = plan_axolotl if name == "axolotl" else plan_unsloth
        job = plan(request, prepared, original, adapter_dir, options)
    if on_command:
        on_command(job)
    if job.program is None:
        if request.skip_landing:
            return TrainerResult(job)
        raise _missing(job, request)
    _run(job, request.folder, output)
    return finish(job, request, _trainable(request, options), options)


def _trainable(request: FinetuneRequest, options: LandOptions) -> ResolvedModel:
    return as_trainable(resolve(request.base, options.store_path), request.folder, options)


def _run(job: TrainerJob, folder: Path, output: Output) -> None:
    make_folder(job.result.parent)
    if job.partial is None:
        run_program(job.command, folder, output)
        return
    _remove(job.partial)
    run_program(job.command, folder, output)
    if not job.partial.exists():
        return  # `finish` says that nothing came of it
    _remove(job.result)
    job.partial.rename(job.result)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _training_base(trainer: TrainerOptions, target: ResolvedModel, options: LandOptions) -> ResolvedModel:
    if trainer.base_gguf is None:
        return target
    return ResolvedModel(str(trainer.base_gguf), gguf_path=twin_of(target, trainer.base_gguf, options))


def _plan_only(name: str, request: FinetuneRequest, trainer: TrainerOptions, options: LandOptions) -> TrainerResult:
    """What would be done: the data is checked and counted, nothing is written."""
    resolve(request.base, options.store_path)
    row = FORMATS[_form(trainer)]
    path = _prepared_path(name, request, trainer)
    done = prepare_files(
        find_data_files(request.data, request.include), path, [row], overwrite=path.exists(), dry_run=True
    )
    job = TrainerJob(name, (), None, done.written[0], (), path)
    return TrainerResult(job, is_dry_run=True)


def _form(trainer: TrainerOptions) -> str:
    assert trainer.format is not None
    return trainer.format


def _prepared_path(name: str, request: FinetuneRequest, trainer: TrainerOptions) -> Path:
    default = Path(PREPARED_NAME) if name == "llama.cpp" else request.folder / "train.jsonl"
    return (trainer.prepared_output or default).absolute()


def _prepare(request: FinetuneRequest, format_name: str, path: Path, options: LandOptions) -> PreparedFile:
    """Write the data in a trainer's form. A file that holds just that already is left as it is."""
    files = find_data_files(request.data, request.include)
    refuse_source(path, files)
    row = FORMATS[format_name]
    if not path.exists() or options.overwrite or options.dry_run:
        may_replace = options.overwrite or options.dry_run
        return prepare_files(files, path, [row], overwrite=may_replace, dry_run=options.dry_run).written[0]
    refuse_existing(path, overwrite=True)
    make_folder(request.folder)
    draft = request.folder / f"prepared.new{row.ending}"
    written = prepare_files(files, draft, [row], overwrite=True).written[0]
    try:
        if hash_file(path).sha256 != written.sha256:
            refuse_existing(path, overwrite=False)
    finally:
        draft.unlink()
    return replace(written, path=path)


def refuse_source(prepared: Path, data: Sequence[Path]) -> None:
    """Raises:
    UsageError: the prepared data would replace the data itself.
    """
    for path in data:
        is_inside = path.is_dir() and prepared.resolve().parent == path.resolve() and prepared.suffix == ".jsonl"
        if is_inside or prepared.resolve() == path.resolve():
            raise UsageError(
                f"--prepared-output {str(prepared)!r} is among the data",
                why="It would be read as data the next time, or replace what it is made from.",
                next="Choose another file, for example --prepared-output train_prepared.txt",
            )


def require_format(name: str, trainer: TrainerOptions) -> str:
    """The form in which a trainer's data is written.

    Raises:
        UsageError: another one than the trainer takes, or one that is not known.
    """
    wanted = _FORMAT_OF.get(name)
    if trainer.format is None:
        return wanted or "llama.cpp"
    if trainer.format not in FORMATS:
        raise UsageError(
            f"There is no format {trainer.format!r}",
            why=f"Known formats: {', '.join(FORMATS)}.",
            next="ollama-forge prepare-training-data --list-formats",
        )
    if wanted is not None and trainer.format != wanted:
        raise UsageError(
            f"--trainer {name} does not take the format {trainer.format!r}",
            why=f"It takes {wanted!r}.",
            next=f"Leave --format out, or say --format {wanted}.",
        )
    return trainer.format


def _refuse_base_gguf(name: str, trainer: TrainerOptions) -> None:
    if trainer.base_gguf is not None:
        raise UsageError(
            f"--trainer {name} does not train on a GGUF",
            why="It trains a Hugging Face folder, which is made from --base.",
            next="Leave --base-gguf out, or use --trainer builtin.",
        )


def _missing(job: TrainerJob, request: FinetuneRequest) -> MissingExtraError:
    retrain = ["ollama-forge", "retrain", "--base", request.base, "--adapter", str(job.result)]
    return MissingExtraError(
        f"{job.trainer} is not installed here, so nothing was trained and {request.name!r} was not made",
        why="What it needs was written: " + ", ".join(str(path) for path in job.files),
        next=f"Where it is installed: {quoted(job.command)}\n"
        f"        then: {quoted([*retrain, '--name', request.name or 'NAME'])}\n"
        "        or train here and now with --trainer builtin.",
    )
