"""`abliterate optimize`: look for the ablation with the fewest refusals and the least harm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.abliterate_compute_dir import JoinsFractions
from ollama_forge.cli.abliterate_job import job_options, make_request
from ollama_forge.cli.abliterate_run import show_plan, show_result
from ollama_forge.cli.config_file import config_option
from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import FiniteRange, modelfile_options
from ollama_forge.cli.prompt_options import PromptPaths, StepLine, prompt_options, read_prompt_files
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.cli.abliterate_job import JobSettings
    from ollama_forge.jobs.abliteration_optimize import OptimizeResult
    from ollama_forge.jobs.abliteration_search import Trial
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "optimize",
    cls=JoinsFractions,
    epilog="Examples: ollama-forge abliterate optimize --model llama3.2 --harmful harmful.txt --harmless harmless.txt"
    "   |   the same with --pick best --name my-model",
)
@click.option("--model", metavar="REF", help="The model: an Ollama name, a .gguf file, a folder.")
@click.option("--name", help="The Ollama model to make of the pick.")
@prompt_options
@click.option(
    "--n-trials", "--max-evals", type=click.IntRange(1), default=60, show_default=True, help="In the end, in all."
)
@click.option("--timeout", type=FiniteRange(0, min_open=True), metavar="SECONDS", help="Stop looking after this.")
@click.option("--pick", metavar="BEST|N", help="Apply 'best' (fewest refusals) or trial N; with --name land it.")
@click.option("--max-parallel", type=click.IntRange(1), default=1, hidden=True)
@click.option("--eval-prompt-set", type=click.Path(path_type=Path), hidden=True)
@click.option("--eval-base-url", hidden=True)
@click.option("--eval-model", hidden=True)
@job_options
@modelfile_options
@config_option
@landing_options
def command(
    model: str | None,
    name: str | None,
    paths: PromptPaths,
    n_trials: int,
    timeout: float | None,
    pick: str | None,
    max_parallel: int,
    eval_prompt_set: Path | None,
    eval_base_url: str | None,
    eval_model: str | None,
    job: JobSettings,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Search over layers, directions between layers, kernels and strengths, with two aims: few refusals, little harm.

    Each trial switches its edit on in the loaded model; no weight is rewritten. The study is kept in the working folder
    and goes on where it was broken off; the same seed finds the same. Broken answers count as refusals.
    """
    _refuse_old_words(max_parallel, eval_prompt_set, eval_base_url, eval_model)
    if model is None:
        raise UsageError(
            "optimize needs --model",
            next="Example: ollama-forge abliterate optimize --model llama3.2 --harmful harmful.txt "
            "--harmless harmless.txt",
        )
    if name is not None and pick is None:
        raise UsageError("--name needs --pick", why="Somebody has to choose.", next="Add --pick best.")
    from ollama_forge.jobs.abliteration_optimize import OptimizeRequest, optimize_ablation

    harmful, harmless = read_prompt_files(paths, whole=True)
    request = make_request(model, f"optimize-{Path(model).name}", paths, harmful, harmless, job, changes, verify=True)
    search = OptimizeRequest(replace(request, name=name), n_trials, timeout, job.seed, pick)
    with StepLine(console) as line:

        def tell(trial: Trial, total: int) -> None:
            tally = trial.score.tally
            line(f"trial {trial.number}: {tally.refused} refused, KL {trial.score.kl:.4f}", trial.number + 1, total)

        result = optimize_ablation(search, options, on_step=line, on_trial=tell)
    for warning in result.warnings:
        console.warn(warning)
    console.result(result.document(), lambda: _show(console, result))


def _refuse_old_words(parallel: int, prompts: Path | None, base_url: str | None, model: str | None) -> None:
    """Options of the predecessors that mean nothing here: what to do instead."""
    if parallel > 1:
        raise UsageError(
            f"--max-parallel {parallel}: trials run one after another",
            why="They share one loaded model, and each is drawn from those before it; so the same seed finds the same.",
            next="Leave it out.",
        )
    for option, value in (("--eval-prompt-set", prompts), ("--eval-base-url", base_url), ("--eval-model", model)):
        if value is not None:
            raise UsageError(
                f"{option} is not needed",
                why="Trials are judged on the loaded model, by a part of --harmful and --harmless that is kept aside.",
                next="For a model in Ollama: ollama-forge abliterate evaluate NAME --harmful FILE --harmless FILE",
            )


def _show(console: Console, result: OptimizeResult) -> None:
    search = result.search
    if search is None:
        show_plan(console, result.model, result.study.parent, result.plan)
        console.line(f"study     {result.study}, {result.plan['trials']} trials in the end")
        console.line("Nothing was changed.")
        return
    default = search.trials[0]
    rows = [_row(trial, "default" if trial is default else "") for trial in search.front]
    if default not in search.front:
        rows.append(_row(default, "default (beaten)"))
    columns = ["TRIAL", "REFUSED", "BROKEN", "KL", "KL FIRST", "LAYER", "ATTENTION", "MLP", "KERNEL", ""]
    console.table(columns, rows, right=columns[:8])
    console.line()
    if result.untouched:
        tally = result.untouched.tally
        console.line(f"untouched  {tally.refused} of {tally.n} refused")
    console.line(f"study      {result.study}  ({len(search.trials)} trials)")
    if result.result:
        show_result(console, result.result)
    else:
        console.done("Next: the same command with --pick best --name NAME (or --pick and the number of a trial).")


def _row(trial: Trial, note: str) -> list[str]:
    tally, parameters = trial.score.tally, trial.parameters
    kernel = parameters["kernel"]
    if kernel != "constant":
        kernel = f"{kernel} {parameters['kernel_center']:.2f}±{parameters['kernel_width']:.2f}"
    return [
        str(trial.number),
        f"{tally.refused}/{tally.n}",
        str(tally.degenerate),
        f"{trial.score.kl:.4f}",
        f"{trial.score.first_kl:.4f}",
        "own" if parameters["per_layer"] else f"{parameters['layer']:.2f}",
        f"{parameters['attention_strength']:.2f}",
        f"{parameters['mlp_strength']:.2f}",
        kernel,
        note,
    ]
