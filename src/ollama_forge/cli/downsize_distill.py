"""`downsize distill` (also plain `downsize`): a teacher, a student and data in, a student that predicts alike out."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.config_file import config_option
from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import FiniteRange, modelfile_options
from ollama_forge.cli.trainer_options import report_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.cli.finetune import ProgressLine
    from ollama_forge.jobs.distillation import DistillResult
    from ollama_forge.jobs.distillation_setup import DistillPlan, DistillRequest
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.teacher_answers import AskReport
    from ollama_forge.store.modelfile import Modelfile

LOSSES = ("forward-kl", "reverse-kl", "jsd")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")


@click.command(
    "distill",
    epilog="Example: ollama-forge downsize distill --teacher llama3.1:8b --student ./pruned.gguf --data ./data "
    "--name small   (ollama-forge downsize --teacher ... is the same)",
)
@click.option("--teacher", metavar="REF", help="The model to learn from: an Ollama name, a .gguf file, a folder.")
@click.option("--student", metavar="REF", help="The model that learns: the same kinds.")
@click.option("--student-layers", type=click.IntRange(1), help="Make the student of the teacher: so many layers.")
@click.option("--student-hidden", type=click.IntRange(1), help="The same: so many channels of the residual stream.")
@click.option("--name", help="The Ollama model to make.")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="JSONL, CSV or Parquet; or a folder.")
@click.option("--include", multiple=True, metavar="GLOB", help="Other files of a --data folder than *.jsonl.")
@click.option("--loss", type=click.Choice(LOSSES), default="forward-kl", show_default=True, help="What is minimised.")
@click.option(
    "--beta", type=FiniteRange(), default=0.5, show_default=True, help="Of jsd: towards 0 forward, towards 1 reverse."
)
@click.option("--kd-temperature", type=FiniteRange(), default=1.0, show_default=True, help="Softens both predictions.")
@click.option(
    "--ce-weight", type=FiniteRange(), default=0.0, show_default=True, help="Share of plain cross-entropy, 0 to 1."
)
@click.option(
    "--on-policy", type=FiniteRange(), default=0.0, show_default=True, help="Share of batches the student answers."
)
@click.option("--on-policy-tokens", type=click.IntRange(1), default=64, show_default=True, help="Of such an answer.")
@click.option("--cache", is_flag=True, help="Ask the teacher once and keep its predictions on disk, compressed.")
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Where (default: in --workdir); implies --cache.")
@click.option("--cache-words", type=click.IntRange(1, 4096), default=48, show_default=True, help="Kept per position.")
@click.option(
    "--align",
    type=click.Choice(("text", "sorted")),
    help="Where the tokenizers differ. text: the teacher writes answers, the student learns them. sorted: sorted "
    "probabilities are compared where both begin a token.",
)
@click.option("--generate", is_flag=True, help="The teacher answers the questions of --data first.")
@click.option("--teacher-host", multiple=True, metavar="URL", help="Ask --teacher on this running Ollama; repeatable.")
@click.option("--parallel", type=click.IntRange(1, 64), default=4, show_default=True, help="Questions at once a host.")
@click.option("--answer-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of a teacher's answer.")
@click.option("--full", "is_full", is_flag=True, help="Train every weight, not LoRA matrices.")
@click.option("--quant", metavar="TYPE", help="Land the student in this quantization (default: as it is).")
@click.option("--merge", is_flag=True, help="Land merged weights instead of an adapter layer.")
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Rank of the LoRA matrices.")
@click.option("--alpha", type=FiniteRange(0, min_open=True), help="LoRA alpha (default: twice the rank).")
@click.option(
    "--target-modules",
    multiple=True,
    metavar="NAME",
    help="Linear layers to adapt (default: all but the head and the experts of a mixture).",
)
@click.option("--epochs", type=FiniteRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--max-steps", type=click.IntRange(0), default=0, help="Optimizer steps at most (0: no limit).")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=2e-4, show_default=True, help="Learning rate.")
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of an example.")
@click.option("--overlong", type=click.Choice(("truncate", "drop")), default="truncate", show_default=True)
@click.option("--learn", type=click.Choice(("assistant", "all")), help="Default: all; with --on-policy: assistant.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--grad-accum", type=click.IntRange(1), help="Batches per optimizer step (default: 8, fewer for few).")
@click.option("--warmup", type=FiniteRange(0), default=0.03, show_default=True, help="Steps, or a share below 1.")
@click.option("--scheduler", type=click.Choice(SCHEDULERS), default="cosine", show_default=True)
@click.option("--weight-decay", type=FiniteRange(0), default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--val-split", type=FiniteRange(0, 1, max_open=True), default=0.0, help="Share held back to judge by.")
@click.option("--early-stop", type=click.IntRange(0), default=0, help="Evaluations without progress before it ends.")
@click.option("--checkpoint-every", type=click.IntRange(0), default=0, help="Optimizer steps (default: ten in a run).")
@click.option("--no-checkpointing", is_flag=True, help="Keep activations: faster, and much more memory.")
@report_option
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --workdir.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--workdir", type=click.Path(path_type=Path), help="Checkpoints, result, report (default: distill-NAME).")
@click.option("--skip-landing", is_flag=True, help="Train only; land nothing.")
@modelfile_options
@config_option
@landing_options
def command(
    teacher: str | None,
    student: str | None,
    name: str | None,
    data: tuple[Path, ...],
    changes: Modelfile,
    options: LandOptions,
    console: Console,
    **settings: Any,
) -> None:
    """Teach a small model what a large one predicts, word by word; land it, checked. CPU or NVIDIA, one or many."""
    is_cut = settings["student_layers"] is not None or settings["student_hidden"] is not None
    if teacher is None or (student is None) != is_cut or not data or (name is None and not settings["skip_landing"]):
        raise UsageError(
            "distill needs --teacher, --data, --name, and either --student or --student-layers/--student-hidden",
            next="Example: ollama-forge downsize distill --teacher llama3.1:8b --student ./pruned.gguf --data ./data "
            "--name small",
        )
    from ollama_forge.cli.finetune import ProgressLine
    from ollama_forge.jobs.distillation import distill
    from ollama_forge.jobs.processes import is_first_process

    request = build_request(teacher, student, name, data, changes, settings)
    line = ProgressLine(console)
    watch = line if is_first_process() else None
    answering = _AnswerLine(console)
    if settings["align"] == "text" or settings["teacher_host"]:
        _distill_text(console, request, options, line, answering)
        return
    result = distill(request, options, on_plan=lambda plan: show_plan(console, plan), on_answer=answering, watch=watch)
    if not is_first_process():
        return
    line.end()
    for warning in result.warnings:
        console.warn(warning)
    console.result(result.document(), lambda: _show(console, result))


def _distill_text(
    console: Console, request: DistillRequest, options: LandOptions, line: ProgressLine, answering: _AnswerLine
) -> None:
    from ollama_forge.cli.finetune import show_finetuned
    from ollama_forge.jobs.processes import is_first_process
    from ollama_forge.jobs.text_distillation import TextDistillRequest, distill_text

    if request.options.is_full or request.options.on_policy.share or request.quant or request.options.cached_words:
        raise UsageError(
            "--full, --quant, --cache and --on-policy do not go with a teacher that only writes text",
            why="Its predictions are not seen; the student learns its words as a fine-tune, through LoRA.",
            next="Leave them out; --merge lands merged weights.",
        )
    if request.cut is not None:
        raise UsageError(
            "--student-layers and --student-hidden make a student with the teacher's own words",
            why="Then their predictions can be compared, which teaches more than text.",
            next="Leave --align and --teacher-host out, or name another student: --student REF",
        )
    assert request.ask is not None
    result = distill_text(
        TextDistillRequest(request.student, request.ask),
        options,
        on_answer=answering,
        watch=line if is_first_process() else None,
    )
    if not is_first_process():
        return
    line.end()
    for warning in result.training.warnings if result.training else ():
        console.warn(warning)

    def show() -> None:
        sheet, training = result.answers, result.training
        if sheet is None or training is None:
            console.line(f"{request.ask.teacher if request.ask else ''} would be asked {result.n_questions} questions.")
            console.line("Nothing was changed.")
            return
        rate = sheet.n_tokens / sheet.seconds if sheet.seconds else 0.0
        console.line(f"answers  {sheet.n_asked} new, {sheet.n_kept} kept, {rate:.0f} tokens/s: {sheet.path}")
        show_finetuned(console, training)

    console.result(result.document(), show)


class _AnswerLine:
    """One line on stderr with how many answers there are, and how fast they come."""

    def __init__(self, console: Console) -> None:
        self._is_live = sys.stderr.isatty() and not (console.as_json or console.is_quiet)

    def __call__(self, report: AskReport) -> None:
        if self._is_live:
            click.echo(
                f"\r  {report.n_done}/{report.n_total} answers  {report.tokens_per_second:,.0f} tokens/s   ",
                nl=report.n_done == report.n_total,
                err=True,
            )


def build_request(
    teacher: str,
    student: str | None,
    name: str | None,
    data: tuple[Path, ...],
    changes: Modelfile,
    settings: dict[str, Any],
) -> DistillRequest:
    """What was typed, as a request.

    Raises:
        UsageError: a number out of range, or options that do not go together.
    """
    from ollama_forge.cli.finetune import loop_options, lora_options
    from ollama_forge.jobs.distillation_setup import DistillRequest, StudentCut
    from ollama_forge.jobs.finetune_setup import FinetuneRequest
    from ollama_forge.jobs.teacher_answers import AskOptions
    from ollama_forge.train.distill_options import DistillLoss, DistillOptions, Divergence, OnPolicy

    ask = None
    if settings["generate"] or settings["teacher_host"] or settings["align"] == "text":
        ask = AskOptions(
            teacher,
            settings["teacher_host"],
            max_tokens=settings["answer_tokens"],
            seed=settings["seed"],
            parallel=settings["parallel"],
        )
    is_cached = settings["cache"] or settings["cache_dir"] is not None
    distill_options = DistillOptions(
        DistillLoss(
            Divergence.SORTED if settings["align"] == "sorted" else Divergence(settings["loss"]),
            settings["beta"],
            settings["kd_temperature"],
            settings["ce_weight"],
        ),
        OnPolicy(settings["on_policy"], settings["on_policy_tokens"]),
        is_full=settings["is_full"],
        cached_words=settings["cache_words"] if is_cached else 0,
    )
    folder = settings["workdir"] or Path(f"distill-{(name or 'run').replace('/', '-').replace(':', '-')}")
    run = FinetuneRequest(
        data=data,
        base=student or "",
        name=name,
        folder=folder.absolute(),
        lora=lora_options({**settings, "dropout": 0.0}),
        loop=replace(loop_options(settings), weight_decay=settings["weight_decay"]),
        include=settings["include"],
        max_length=settings["max_length"],
        overlong=settings["overlong"],
        learn=_learnt(settings),
        validation_share=settings["val_split"],
        merge=settings["merge"],
        skip_landing=settings["skip_landing"],
        resume=settings["resume"],
        changes=changes,
    )
    cache = settings["cache_dir"]
    cut = None if student is not None else StudentCut(settings["student_layers"], settings["student_hidden"])
    return DistillRequest(
        run, teacher, distill_options, settings["quant"], cache.absolute() if cache else None, ask, cut
    )


def _learnt(settings: dict[str, Any]) -> str:
    """Where the two are compared."""
    if settings["on_policy"] and settings["learn"] == "all":
        raise UsageError(
            "--learn all does not go with --on-policy",
            why="The student answers what stands before the first learnt token, and that would be nothing.",
            next="Leave --learn out.",
        )
    if settings["align"] == "sorted" and settings["learn"] == "all":
        raise UsageError(
            "--learn all does not go with --align sorted",
            why="Each model keeps its own template; only answers are the same text to both.",
            next="Leave --learn out.",
        )
    return settings["learn"] or ("assistant" if settings["on_policy"] or settings["align"] == "sorted" else "all")


_LIGHTS = {"green": "green", "yellow": "yellow", "red": "red", "unknown": "yellow"}


def show_plan(console: Console, plan: DistillPlan) -> None:
    """A few lines about what will be done."""
    from ollama_forge.cli.finetune import say_disk_and_time

    light = click.style(f"● {plan.light}", fg=_LIGHTS[plan.light])
    training = plan.training
    free = human_bytes(training.available_bytes) if training.available_bytes else "unknown"
    console.say(
        f"{plan.teacher} ({human_bytes(plan.teacher_bytes)}) teaches {training.base} "
        f"({human_bytes(training.base_bytes)}): {training.n_examples} examples, {training.n_tokens:,} tokens an epoch"
    )
    trained = "all weights" if plan.is_full else f"{human_count(training.n_trained_parameters)} trained numbers"
    console.say(
        f"{training.steps} steps, {trained}; {light} about {human_bytes(plan.memory_bytes)} of memory, {free} free"
    )
    say_disk_and_time(console, plan.disk, plan.seconds)


def _show(console: Console, result: DistillResult) -> None:
    trained = result.trained
    if trained is None:
        console.line("Nothing was changed.")
        return
    for pair in result.answers:
        console.line(click.style(pair.prompt.strip()[:200], bold=True))
        console.line(f"  before  {pair.before.strip()[:300]}")
        console.line(f"  after   {pair.after.strip()[:300]}")
    console.line()
    distance = f"{trained.base_divergence:.4f} -> {trained.final_divergence:.4f} nats"
    console.line(f"teacher  {distance} away from it, in {trained.steps} steps")
    console.line(f"result   {result.result}")
    console.line(f"report   {result.report}")
    if result.landed:
        written = human_bytes(result.landed.written_bytes)
        shared = human_bytes(result.landed.shared_bytes)
        console.line(f"landed   {result.landed.name}  {written} written, {shared} shared")
        console.done(f"Next: ollama run {result.landed.name}   (or: ollama-forge run {result.landed.name})")
    for step in result.undo:
        console.line(f"undo     {step}")
