"""`abliterate run`: compute, choose, apply, ask before and after, land, in one resumable command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.abliterate_compute_dir import JoinsFractions
from ollama_forge.cli.abliterate_job import job_options, make_request, show_evaluation, show_layers
from ollama_forge.cli.config_file import config_option
from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import modelfile_options
from ollama_forge.cli.prompt_options import PromptPaths, StepLine, prompt_options, read_prompt_files
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.cli.abliterate_job import JobSettings
    from ollama_forge.jobs.abliteration_run import AbliterationResult
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "run",
    cls=JoinsFractions,
    epilog="Example: ollama-forge abliterate run --model llama3.2 --name my-model --harmful harmful.txt "
    "--harmless harmless.txt",
)
@click.option("--model", metavar="REF", help="The model: an Ollama name, a .gguf file, a folder.")
@click.option("--name", help="The Ollama model to make.")
@click.option(
    "--from-checkpoint", metavar="REF", help="A model that is abliterated already: ask it and land it, nothing else."
)
@prompt_options
@job_options
@click.option("--only-compute", is_flag=True, help="Stop after the directions and the choice of a layer.")
@click.option("--only-apply", is_flag=True, help="Only write the edited model into the working folder.")
@click.option("--only-export", is_flag=True, help="Only ask and land what the working folder holds.")
@click.option("--no-verify", is_flag=True, help="Do not ask the model before and after.")
@modelfile_options
@config_option
@landing_options
def command(
    model: str | None,
    name: str | None,
    from_checkpoint: str | None,
    paths: PromptPaths,
    job: JobSettings,
    only_compute: bool,
    only_apply: bool,
    only_export: bool,
    no_verify: bool,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Take the refusal direction out of a model and land the result, with evidence before and after.

    The prompts are yours: of each list a half finds the direction, a quarter chooses the layer, a quarter judges. Every
    stage is kept in a working folder; the same command goes on where it was broken off. What did nothing or broke the
    model is not landed.
    """
    asked = {"compute": only_compute, "apply": only_apply, "export": only_export}
    chosen = [stage for stage, is_on in asked.items() if is_on]
    needs_name = not chosen or chosen[-1] == "export"
    if (model is None and from_checkpoint is None) or (name is None and needs_name):
        raise UsageError(
            "run needs --model and --name",
            next="Example: ollama-forge abliterate run --model llama3.2 --name my-model --harmful harmful.txt "
            "--harmless harmless.txt",
        )
    if from_checkpoint is not None:
        if chosen and chosen != ["export"]:
            raise UsageError(
                f"--from-checkpoint and --only-{chosen[0]} do not go together",
                why="A model that is abliterated already is only asked and landed.",
                next="Leave one of them out.",
            )
        _land_checkpoint(from_checkpoint, model, name or "", paths, job, changes, options, console)
        return
    from ollama_forge.jobs.abliteration_run import STAGES, run_abliteration

    harmful, harmless = read_prompt_files(paths, whole=True)
    request = make_request(model or "", name, paths, harmful, harmless, job, changes, verify=not no_verify)
    with StepLine(console) as line:
        result = run_abliteration(request, options, chosen or STAGES, on_step=line)
    for warning in result.warnings:
        console.warn(warning)
    console.result(result.document(), lambda: _show(console, result))


def _land_checkpoint(
    checkpoint: str,
    model: str | None,
    name: str,
    paths: PromptPaths,
    job: JobSettings,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    from ollama_forge.cli.landing import report_landed
    from ollama_forge.jobs.abliteration_checkpoint import land_checkpoint

    harmful, harmless = read_prompt_files(paths, needs_harmless=False) if paths.harmful else ([], [])
    with StepLine(console) as line:
        evaluation, landed = land_checkpoint(
            checkpoint, model, name, changes, options, harmful, harmless, quant=job.quant, on_step=line
        )
    if evaluation is not None:
        for warning in evaluation.warnings:
            console.warn(warning)
        if not console.as_json:
            show_evaluation(console, evaluation.document())
    else:
        console.warn("Nobody has asked it anything: give --harmful and --harmless to see what it refuses.")
    report_landed(console, landed, {"evaluation": evaluation.document() if evaluation else None})


def show_plan(console: Console, model: str, folder: Path, plan: Mapping[str, Any]) -> None:
    """What a dry run says: prompts by their use, and what it takes."""
    for name, part in plan["prompts"].items():
        console.line(
            f"{name:9} {part['computing']} prompts to compute, {part['choosing']} to choose, {part['judging']} to judge"
        )
    console.line(f"model     {model}, {human_bytes(plan['source_bytes'])}")
    console.line(f"folder    {folder}")
    console.line(
        f"needs     about {human_bytes(plan['memory_bytes'])} of memory and {human_bytes(plan['disk_bytes'])} of disk"
    )
    console.line("time      known after the first prompts: it depends on how long the answers become")


def _show(console: Console, result: AbliterationResult) -> None:
    if result.is_dry_run:
        show_plan(console, result.model, result.folder, result.plan)
        console.line("Nothing was changed.")
        return
    choice = result.choice
    if choice and choice.candidates:
        show_layers(console, choice)
    if result.directions:
        console.line(f"directions {result.directions}")
    if result.edited:
        counts = ", ".join(f"{count} {role}" for role, count in result.edited.matrices.items())
        console.line(f"edited     {result.edited.path}  {human_bytes(result.edited.size_bytes)}  ({counts})")
    show_result(console, result)


def show_result(console: Console, result: AbliterationResult) -> None:
    """The end of a run: what was measured, what was landed, how to take it back."""
    if result.evaluation:
        console.line()
        show_evaluation(console, result.evaluation)
        console.line()
        console.line(f"report     {result.report}")
    landed = result.landed
    if landed:
        console.line(f"landed     {landed.name}  {human_bytes(landed.written_bytes)} written")
        console.done(f"Next: ollama run {landed.name}   (or: ollama-forge run {landed.name})")
    for step in result.undo:
        console.line(f"undo       {step}")
