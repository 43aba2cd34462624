"""`finetune` (also `train-run`): data and a base in, a trained and checked Ollama model out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.config_file import config_option
from ollama_forge.cli.console import Console, human_bytes, human_count, human_time
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import FiniteRange, modelfile_options
from ollama_forge.cli.trainer_options import TrainerTalk, report_option, show_trained_elsewhere, trainer_options
from ollama_forge.errors import UsageError
from ollama_forge.files import free_bytes

if TYPE_CHECKING:
    from ollama_forge.jobs.finetune import FinetuneResult
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.trainer_job import TrainerOptions
    from ollama_forge.jobs.training_disk import TrainingDisk
    from ollama_forge.jobs.training_plan import TrainingPlan
    from ollama_forge.store.modelfile import Modelfile
    from ollama_forge.train.options import StepReport

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")


@click.command(
    "finetune",
    epilog="Example: ollama-forge finetune --data ./data --base llama3.2 --name my-model"
    "   (ollama-forge train-run is the same)",
)
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="JSONL, CSV or Parquet; or a folder.")
@click.option("--include", multiple=True, metavar="GLOB", help="Other files of a --data folder than *.jsonl.")
@click.option("--base", help="The model to train: an Ollama name, a .gguf file, a folder.")
@click.option("--name", help="The Ollama model to make.")
@click.option("--epochs", type=FiniteRange(0, min_open=True), default=3.0, show_default=True)
@click.option("--max-steps", type=click.IntRange(0), default=0, help="Optimizer steps at most (0: no limit).")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=2e-4, show_default=True, help="Learning rate.")
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Rank of the LoRA matrices.")
@click.option("--alpha", type=FiniteRange(0, min_open=True), help="LoRA alpha (default: twice the rank).")
@click.option("--dropout", type=FiniteRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option(
    "--target-modules",
    multiple=True,
    metavar="NAME",
    help="Linear layers to adapt (default: all but the head and the experts of a mixture).",
)
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of an example.")
@click.option("--overlong", type=click.Choice(("truncate", "drop")), default="truncate", show_default=True)
@click.option("--learn", type=click.Choice(("assistant", "all")), default="assistant", show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--grad-accum", type=click.IntRange(1), help="Batches per optimizer step (default: 8, fewer for few).")
@click.option("--warmup", type=FiniteRange(0), default=0.03, show_default=True, help="Steps, or a share below 1.")
@click.option("--scheduler", type=click.Choice(SCHEDULERS), default="cosine", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--val-split", type=FiniteRange(0, 1, max_open=True), default=0.0, help="Share held back to judge by.")
@click.option("--early-stop", type=click.IntRange(0), default=0, help="Evaluations without progress before it ends.")
@click.option("--checkpoint-every", type=click.IntRange(0), default=0, help="Optimizer steps (default: ten in a run).")
@click.option("--no-checkpointing", is_flag=True, help="Keep activations: faster, and much more memory.")
@click.option("--packing", is_flag=True, help="Several short examples in one row of --max-length tokens, kept apart.")
@report_option
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --workdir.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option(
    "--workdir", type=click.Path(path_type=Path), help="Checkpoints, adapter, report (default: finetune-NAME)."
)
@click.option("--merge", is_flag=True, help="Land merged weights instead of an adapter layer.")
@click.option("--skip-retrain", is_flag=True, help="Train only; land nothing.")
@trainer_options
@modelfile_options
@config_option
@landing_options
def command(
    data: tuple[Path, ...],
    base: str | None,
    name: str | None,
    workdir: Path | None,
    trainer: TrainerOptions,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
    **settings: Any,
) -> None:
    """Fine-tune the model that Ollama runs, on its own packed weights; land it, checked. CPU or NVIDIA."""
    if not data or base is None or (name is None and not settings["skip_retrain"]):
        raise UsageError(
            "finetune needs --data, --base and --name",
            next="Example: ollama-forge finetune --data ./data --base llama3.2 --name my-model",
        )
    from ollama_forge.jobs.finetune_setup import FinetuneRequest
    from ollama_forge.jobs.processes import is_first_process
    from ollama_forge.jobs.trainer_job import TrainerResult
    from ollama_forge.jobs.trainers import train

    folder = workdir or default_folder(name)
    request = FinetuneRequest(
        data=data,
        base=base,
        name=name,
        folder=folder.absolute(),
        lora=lora_options(settings),
        loop=loop_options(settings),
        include=settings["include"],
        max_length=settings["max_length"],
        overlong=settings["overlong"],
        learn=settings["learn"],
        validation_share=settings["val_split"],
        merge=settings["merge"],
        skip_landing=settings["skip_retrain"],
        resume=settings["resume"],
        changes=changes,
    )
    line, talk = ProgressLine(console), TrainerTalk(console)
    result = train(
        request,
        trainer,
        options,
        output=talk.pass_on,
        on_command=talk.announce,
        on_plan=lambda plan: _show_plan(console, plan),
        watch=line if is_first_process() else None,
    )
    if not is_first_process():
        return
    line.end()
    for warning in result.warnings:
        console.warn(warning)
    if isinstance(result, TrainerResult):
        show_trained_elsewhere(console, result)
    else:
        trained = result
        console.result(trained.document(), lambda: show_finetuned(console, trained))


def default_folder(name: str | None) -> Path:
    """Where a run works that was not told where."""
    return Path(f"finetune-{(name or 'run').replace('/', '-').replace(':', '-')}")


def lora_options(settings: dict[str, Any]) -> Any:
    """The adapter as its options say."""
    from ollama_forge.train.options import LoraOptions

    names = tuple(part for word in settings["target_modules"] for part in word.split(",") if part)
    return LoraOptions(settings["rank"], settings["alpha"], settings["dropout"], names)


def loop_options(settings: dict[str, Any]) -> Any:
    """The loop as its options say."""
    from ollama_forge.train.options import LoopOptions

    return LoopOptions(
        epochs=settings["epochs"],
        max_steps=settings["max_steps"],
        learning_rate=settings["lr"],
        batch_size=settings["batch_size"],
        grad_accum=settings["grad_accum"] or 0,
        warmup=settings["warmup"],
        scheduler=settings["scheduler"],
        seed=settings["seed"],
        early_stop=settings["early_stop"],
        checkpoint_every=settings["checkpoint_every"],
        checkpointing=not settings["no_checkpointing"],
        device=settings["device"],
        packed_length=settings["max_length"] if settings.get("packing") else 0,
        report_to=settings["report_to"],
    )


class ProgressLine:
    """One line on stderr with loss, rate and time left."""

    def __init__(self, console: Console) -> None:
        self._is_live = sys.stderr.isatty() and not (console.as_json or console.is_quiet)

    def __call__(self, report: StepReport) -> None:
        if self._is_live:
            minutes, seconds = divmod(int(report.seconds_left), 60)
            click.echo(
                f"\r  step {report.step}/{report.total_steps}  loss {report.loss:.4f}  "
                f"{report.tokens_per_second:,.0f} tokens/s  {minutes}:{seconds:02d} left   ",
                nl=False,
                err=True,
            )

    def end(self) -> None:
        if self._is_live:
            click.echo("", err=True)


_LIGHTS = {"green": "green", "yellow": "yellow", "red": "red", "unknown": "yellow"}


def _show_plan(console: Console, plan: TrainingPlan) -> None:
    light = click.style(f"● {plan.light}", fg=_LIGHTS[plan.light])
    free = human_bytes(plan.available_bytes) if plan.available_bytes else "unknown"
    console.say(
        f"{plan.base} ({plan.family}, {human_bytes(plan.base_bytes)}): {plan.n_examples} examples, "
        f"{plan.n_tokens:,} tokens an epoch, {plan.n_learnt_tokens:,} of them learnt"
        + (f"; packed into {plan.n_rows} rows" if plan.n_rows < plan.n_examples else "")
    )
    console.say(
        f"{plan.steps} steps, {human_count(plan.n_trained_parameters)} trained numbers; {light} about "
        f"{human_bytes(plan.memory_bytes)} of memory, {free} free"
    )
    say_disk_and_time(console, plan.disk, plan.seconds)
    if plan.is_sparing_for_nothing:
        console.say(
            f"All activations would fit too (about {human_bytes(plan.unspared_bytes)} of memory): with "
            "--no-checkpointing nothing is computed twice"
        )


def say_disk_and_time(console: Console, disk: TrainingDisk, seconds: float | None) -> None:
    """Two lines of a plan: what is written where, and how long it takes, where that can be known."""
    parts = [f"{disk.n_checkpoints} x {human_bytes(disk.checkpoint_bytes)} of checkpoints"]
    parts.append(f"{human_bytes(disk.result_bytes)} of results")
    if disk.cache_bytes:
        parts.append(f"{human_bytes(disk.cache_bytes)} of kept predictions")
    if disk.landing_bytes:
        parts.append(f"{human_bytes(disk.landing_bytes)} in the store")
    console.say(
        f"about {human_bytes(disk.total_bytes)} of disk ({', '.join(parts)}), "
        f"{human_bytes(free_bytes(disk.folder))} free for {disk.folder}"
    )
    if seconds is None:
        console.say("how long it takes, the first steps show: the pace of the card is not known before")
    else:
        spoken = human_time(max(1.0, seconds))
        console.say(f"about {spoken} of computing on this processor; the first steps show it exactly")


def show_finetuned(console: Console, result: FinetuneResult) -> None:
    """The lines for people."""
    trained = result.trained
    if trained is None:
        console.line("Nothing was changed.")
        return
    for pair in result.answers:
        console.line(click.style(pair.prompt.strip()[:200], bold=True))
        console.line(f"  before  {pair.before.strip()[:300]}")
        console.line(f"  after   {pair.after.strip()[:300]}")
    console.line()
    console.line(f"loss     {trained.base_loss:.4f} -> {trained.final_loss:.4f} in {trained.steps} steps")
    console.line(f"adapter  {result.adapter_gguf}")
    console.line(f"report   {result.report}")
    if result.landed:
        written = human_bytes(result.landed.written_bytes)
        shared = human_bytes(result.landed.shared_bytes)
        console.line(f"landed   {result.landed.name}  {written} written, {shared} shared")
        console.done(f"Next: ollama run {result.landed.name}   (or: ollama-forge run {result.landed.name})")
    for step in result.undo:
        console.line(f"undo     {step}")
