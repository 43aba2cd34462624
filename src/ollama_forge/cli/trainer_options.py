"""Who trains: the options of `finetune` and `train` about trainers, and what other trainers say and leave behind."""

from __future__ import annotations

import codecs
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import Command
from ollama_forge.train.options import LOGGERS

if TYPE_CHECKING:
    from ollama_forge.jobs.trainer_job import TrainerJob, TrainerResult

TRAINERS = ("auto", "builtin", "llama.cpp", "axolotl", "unsloth")


def report_option(function: Command) -> Command:
    """`--report-to`; the command receives `report_to`, the names of loggers."""
    return click.option(
        "--report-to",
        multiple=True,
        type=click.Choice(tuple(LOGGERS)),
        help="Tell a logger of every step: losses, learning rate, settings; repeatable (default: none).",
    )(function)


def trainer_options(function: Command) -> Command:
    """`--trainer` and what belongs to it; the command receives `trainer`, a `TrainerOptions`, and whole `data`."""
    declared = [
        click.argument("more_data", nargs=-1, type=click.Path(path_type=Path), metavar="[MORE_DATA]..."),
        click.option(
            "--trainer",
            "trainer_name",
            type=click.Choice(TRAINERS),
            default="auto",
            show_default=True,
            help="auto: the built-in one, or llama.cpp's finetune where --base-gguf is given and one with --lora-out "
            "is on PATH.",
        ),
        click.option(
            "--base-gguf",
            type=click.Path(path_type=Path),
            metavar="GGUF",
            help="Train on this GGUF of the base; the result is landed on --base.",
        ),
        click.option("--run-trainer", is_flag=True, help="With --base-gguf: llama.cpp's finetune, or an error."),
        click.option(
            "--prepared-output",
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Where the data goes in the trainer's form (llama.cpp: train_prepared.txt).",
        ),
        click.option(
            "--adapter-output",
            type=click.Path(path_type=Path),
            metavar="DIR",
            help="Where the adapter goes (llama.cpp: adapter_out; else WORKDIR/adapter).",
        ),
        click.option(
            "--format", "format_name", metavar="NAME", help="Form of the prepared data (default: the trainer's own)."
        ),
    ]

    @functools.wraps(function)
    def wrapper(
        *args: Any,
        data: tuple[Path, ...],
        more_data: tuple[Path, ...],
        trainer_name: str,
        base_gguf: Path | None,
        run_trainer: bool,
        prepared_output: Path | None,
        adapter_output: Path | None,
        format_name: str | None,
        **kwargs: Any,
    ) -> Any:
        from ollama_forge.jobs.trainer_job import TrainerOptions

        trainer = TrainerOptions(trainer_name, base_gguf, prepared_output, adapter_output, format_name, run_trainer)
        return function(*args, data=(*data, *more_data), trainer=trainer, **kwargs)

    for option in reversed(declared):
        option(wrapper)
    return wrapper


class TrainerTalk:
    """What another trainer writes goes to stderr at once, and nowhere with `--quiet`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_on(self, chunk: bytes) -> None:
        text = self._decoder.decode(chunk)
        if text and not self._console.is_quiet:
            click.echo(text, nl=False, err=True)

    def announce(self, job: TrainerJob) -> None:
        """Say what was written and what is run now."""
        from ollama_forge.jobs.external_program import quoted

        prepared = job.prepared
        self._console.say(
            f"Prepared {prepared.n_samples:,} samples in {prepared.path} ({human_bytes(prepared.size_bytes)})"
        )
        for path in job.files[1:]:
            self._console.say(f"Wrote {path}")
        if job.program is not None:
            self._console.say(f"Running {job.trainer}: {quoted(job.command)}")


def show_trained_elsewhere(console: Console, result: TrainerResult) -> None:
    """Print what came of another trainer's run."""
    console.result(result.document(), lambda: _show(console, result))


def _show(console: Console, result: TrainerResult) -> None:
    from ollama_forge.jobs.external_program import quoted

    job = result.job
    if result.is_dry_run:
        console.line(f"{job.trainer} would train on {job.prepared.n_samples:,} samples, {job.prepared.path}")
        console.line("Nothing was changed.")
        return
    if not result.is_trained:
        console.warn(f"{job.trainer} is not installed here; nothing was trained.")
        for path in job.files:
            console.line(str(path))
        console.line(f"run it  {quoted(job.command)}")
        return
    for pair in result.answers:
        console.line(click.style(pair.prompt.strip()[:200], bold=True))
        console.line(f"  before  {pair.before.strip()[:300]}")
        console.line(f"  after   {pair.after.strip()[:300]}")
    console.line()
    console.line(f"{'model' if job.makes_model else 'adapter'}    {job.result}")
    if result.landed:
        landed = result.landed
        sizes = f"{human_bytes(landed.written_bytes)} written, {human_bytes(landed.shared_bytes)} shared"
        console.line(f"landed     {landed.name}  {sizes}")
        console.done(f"Next: ollama run {landed.name}   (or: ollama-forge run {landed.name})")
    for step in result.undo:
        console.line(f"undo       {step}")
