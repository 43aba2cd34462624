"""`downsize pipeline`: one command from a model to a smaller one in Ollama, cut, healed, measured and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.config_file import config_option
from ollama_forge.cli.console import Console, human_bytes, human_count, human_time
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import FiniteRange, modelfile_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.downsizing import DownsizeResult
    from ollama_forge.jobs.downsizing_plan import PipelinePlan, PipelineRequest
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.resolve import ResolvedModel
    from ollama_forge.store.modelfile import Modelfile

_HEALING = {"loss": "--loss", "epochs": "--epochs", "max_steps": "--max-steps", "lr": "--lr", "rank": "--rank"}
_HEALING |= {"max_length": "--max-length", "batch_size": "--batch-size", "grad_accum": "--grad-accum"}
_HEALING |= {"seed": "--seed", "device": "--device"}


@click.command(
    "pipeline",
    epilog="Examples: ollama-forge downsize pipeline llama3.1:8b --name small --target 60% --data ./data --dry-run"
    "   |   ... --target 2GB --quant Q4_K_M --write-script downsize.sh",
)
@click.argument("ref")
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option("--target", required=True, metavar="SIZE", help="3B (parameters), 2GB (bytes) or 40% (of parameters).")
@click.option("--data", multiple=True, type=click.Path(path_type=Path), help="Healed on this: JSONL, CSV, Parquet.")
@click.option("--include", multiple=True, metavar="GLOB", help="Other files of a --data folder than *.jsonl.")
@click.option("--text", type=click.Path(path_type=Path), help="Text or data (.jsonl) to rank and judge by; else ours.")
@click.option("--quant", metavar="TYPE", help="Quantize the result (default: as the model is).")
@click.option("--full", "is_full", is_flag=True, help="Heal every weight, not through LoRA matrices.")
@click.option("--cache", is_flag=True, help="Ask the original once and keep its predictions on disk, compressed.")
@click.option("--loss", type=click.Choice(("forward-kl", "reverse-kl", "jsd")), default="forward-kl", show_default=True)
@click.option("--epochs", type=FiniteRange(0, min_open=True), default=3.0, show_default=True, help="Of a healing.")
@click.option("--max-steps", type=click.IntRange(0), default=0, help="Of a healing: steps at most (0: no limit).")
@click.option("--lr", type=FiniteRange(0, min_open=True), default=2e-4, show_default=True, help="Learning rate.")
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Rank of the LoRA matrices.")
@click.option("--max-length", type=click.IntRange(2), default=1024, show_default=True, help="Tokens of an example.")
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--grad-accum", type=click.IntRange(1), help="Batches per optimizer step (default: 8, fewer for few).")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", show_default=True)
@click.option("--workdir", type=click.Path(path_type=Path), help="Where all is made (default: downsize-NAME).")
@click.option("--write-script", type=click.Path(path_type=Path), metavar="FILE", help="Write it as a bash script.")
@modelfile_options
@config_option
@landing_options
@click.pass_context
def command(
    ctx: click.Context,
    ref: str,
    write_script: Path | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
    **settings: Any,
) -> None:
    """Cut a model in steps of at most a third, heal each cut by distillation, quantize, compare, land.

    Every step is kept in --workdir: stopped at any moment, the same command goes on. The last table has the result
    beside the quantization of the original that is as small, and says which is better.
    """
    from ollama_forge.jobs.downsizing import downsize, prepare

    request = build_request(ref, changes, settings)
    if write_script is not None:
        plan, model = prepare(request, options)
        _write_script(console, ctx, request, plan, model, options, write_script)
        return
    from ollama_forge.cli.finetune import ProgressLine

    line = ProgressLine(console)
    result = downsize(request, options, on_plan=lambda plan: show_plan(console, plan), on_step=console.say, watch=line)
    line.end()
    for warning in result.warnings:
        console.warn(warning)
    console.result(result.document(), lambda: _show(console, result))


def build_request(ref: str, changes: Modelfile, settings: dict[str, Any]) -> PipelineRequest:
    """What was typed, as a request.

    Raises:
        UsageError: no data, or a target that is no size.
    """
    from ollama_forge.jobs.downsizing_plan import PipelineRequest, parse_goal
    from ollama_forge.train.distill_options import CACHED_WORDS, DistillLoss, DistillOptions, Divergence
    from ollama_forge.train.options import LoopOptions, LoraOptions

    if not settings["data"]:
        raise UsageError(
            "downsize pipeline needs --data",
            why="A model that was cut is damaged until it is healed, on data as diverse as what it should still know.",
            next="Give conversations or texts (JSONL), for example --data ./data",
        )
    name = settings["name"]
    folder = settings["workdir"] or Path(f"downsize-{name.replace('/', '-').replace(':', '-')}")
    return PipelineRequest(
        ref=ref,
        name=name,
        goal=parse_goal(settings["target"]),
        folder=folder.absolute(),
        data=settings["data"],
        text=settings["text"],
        include=settings["include"],
        quant=settings["quant"],
        lora=LoraOptions(settings["rank"]),
        loop=LoopOptions(
            epochs=settings["epochs"],
            max_steps=settings["max_steps"],
            learning_rate=settings["lr"],
            batch_size=settings["batch_size"],
            grad_accum=settings["grad_accum"] or 0,
            seed=settings["seed"],
            device=settings["device"],
        ),
        distill=DistillOptions(
            DistillLoss(Divergence(settings["loss"])),
            is_full=settings["is_full"],
            cached_words=CACHED_WORDS if settings["cache"] else 0,
        ),
        max_length=settings["max_length"],
        changes=changes,
    )


def _write_script(
    console: Console,
    ctx: click.Context,
    request: PipelineRequest,
    plan: PipelinePlan,
    model: ResolvedModel,
    options: LandOptions,
    path: Path,
) -> None:
    from ollama_forge.files import refuse_existing, write_bytes
    from ollama_forge.jobs.downsize_script import render_script
    from ollama_forge.jobs.merging import inherited

    text = render_script(
        request,
        plan,
        inherited(model, request.changes),
        distill_words=_healing_words(ctx, request),
        landing_words=() if options.check else ("--no-check",),
        store_path=options.store_path,
        is_folder=model.folder is not None,
    )
    if model.projector is not None:
        console.warn(
            f"The script lands a model that reads text only: a Modelfile cannot name the projector of {request.ref!r}. "
            "The command itself, without --write-script, keeps it."
        )
    refuse_existing(path, overwrite=options.overwrite)
    content = text.encode("utf-8", "surrogateescape")
    if not options.dry_run:
        write_bytes(path, content, overwrite=options.overwrite, mode=0o755)
    document = {"script": str(path), "bytes": len(content), "dry_run": options.dry_run, "text": text}

    def show() -> None:
        console.line(text.rstrip("\n") if options.dry_run else f"Wrote {path}. Next: bash {path}")

    console.result(document, show)


def _healing_words(ctx: click.Context, request: PipelineRequest) -> list[str]:
    """Options of healing that were given, as words for `downsize distill`."""
    from click.core import ParameterSource

    words = []
    for name, flag in _HEALING.items():
        if ctx.get_parameter_source(name) in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
            words += [flag, str(ctx.params[name])]
    words += ["--full"] if request.distill.is_full else []
    if request.distill.cached_words:
        words += ["--cache-dir", str(request.folder / "teacher")]
    return words


def show_plan(console: Console, plan: PipelinePlan) -> None:
    """What will be done, a line for each step."""
    free = human_bytes(plan.available_bytes) if plan.available_bytes else "unknown"
    console.say(
        f"{plan.ref} ({plan.family}): {human_count(plan.n_parameters)} parameters, {plan.n_layers} layers, "
        f"{human_bytes(plan.size_bytes)}"
    )
    for step in plan.steps:
        console.say(
            f"  {step.number}. cut to {step.n_layers} layers ({human_count(step.n_parameters)}, "
            f"{human_bytes(step.size_bytes)}), heal with {step.tokens:,} tokens: about "
            f"{human_bytes(step.memory_bytes)} of memory, {human_time(step.seconds)} at this processor's full speed"
        )
    console.say(
        f"  then {human_bytes(plan.final_bytes)} ({plan.final_bytes:,} bytes), compared with the original in "
        f"{plan.lower_type} ({human_bytes(plan.lower_bytes)})"
    )
    console.say(
        f"  {human_bytes(plan.memory_bytes)} of memory at most ({free} free), {human_bytes(plan.disk_bytes)} of disk"
    )


def _show(console: Console, result: DownsizeResult) -> None:
    if result.result is None:
        console.line("Nothing was changed.")
        return
    console.table(
        ("MODEL", "BYTES", "PERPLEXITY", "KL", "TOKENS/S"),
        [
            (
                row.name,
                f"{row.size_bytes:,}",
                f"{row.perplexity:.3f}",
                f"{row.kl_mean:.4f}",
                f"{row.tokens_per_second:.1f}",
            )
            for row in result.rows
        ],
        right=("BYTES", "PERPLEXITY", "KL", "TOKENS/S"),
    )
    console.line(result.verdict)
    console.line(f"report   {result.report}")
    if result.landed:
        written = human_bytes(result.landed.written_bytes)
        console.line(f"landed   {result.landed.name}  {written} written")
        console.done(f"Next: ollama run {result.landed.name}   (or: ollama-forge run {result.landed.name})")
    for step in result.undo:
        console.line(f"undo     {step}")
