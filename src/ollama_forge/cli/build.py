"""`build`: a recipe becomes a model in Ollama; what is done already is not done again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import landing_options, note_landed, show_landed
from ollama_forge.cli.options import parse_assignments

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.recipe.build import Build
    from ollama_forge.train.options import StepReport


_WORTH_TELLING_BYTES = 100_000_000


@click.command("build", epilog="Example: ollama-forge build recipe.yaml   (then again: nothing is left to do)")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A variable of the recipe.")
@click.option("--locked", is_flag=True, help="Refuse whatever differs from recipe.lock: commits, files, versions.")
@click.option(
    "--keep-steps/--no-keep-steps",
    default=True,
    help="Keep what the steps made, for the next build (default), or remove it once the model is landed.",
)
@click.option("--validate-only", is_flag=True, help="Only look for errors, as validate-recipe does.")
@landing_options
def command(
    recipe: Path,
    settings: tuple[str, ...],
    locked: bool,
    keep_steps: bool,
    validate_only: bool,
    options: LandOptions,
    console: Console,
) -> None:
    """Make the model that RECIPE (YAML or JSON) describes: a source, steps in order, what the model says.

    Each step is kept under the hash of all that went into it: a second build does nothing, a killed one goes on.
    recipe.lock, beside the recipe, records what it was made of.
    """
    from ollama_forge.recipe.build import build_recipe
    from ollama_forge.recipe.read import read_recipe

    if validate_only:
        from ollama_forge.cli.validate_recipe import report_validity

        report_validity(console, recipe, settings, is_remote=False)
        return
    read = read_recipe(recipe, dict(parse_assignments(settings, "--set")))
    line = ProgressLine(console)
    done = build_recipe(read, options, locked=locked, keep_steps=keep_steps, say=console.say, watch=line)
    line.end()
    note_landed(done.landed.name if done.landed else read.name)
    for warning in dict.fromkeys((*done.warnings, *(done.landed.warnings if done.landed else ()))):
        console.warn(warning)
    console.result(done.document(), lambda: _show(console, done))


class ProgressLine:
    """One line on stderr while a step trains."""

    def __init__(self, console: Console) -> None:
        self._is_live = sys.stderr.isatty() and not (console.as_json or console.is_quiet)
        self._is_open = False

    def __call__(self, report: StepReport) -> None:
        if self._is_live:
            self._is_open = True
            click.echo(f"\r  step {report.step}/{report.total_steps}  loss {report.loss:.4f}   ", nl=False, err=True)

    def end(self) -> None:
        if self._is_open:
            click.echo("", err=True)


def _show(console: Console, done: Build) -> None:
    name = done.landed.name if done.landed else done.plan.recipe.name
    if done.is_up_to_date:
        console.line(
            f"{name} is up to date: it was built from the same recipe and the same inputs. Nothing was written."
        )
        return
    if done.estimate is not None:
        rows = [
            (
                step.kind,
                "unknown" if step.disk_bytes is None else human_bytes(step.disk_bytes),
                human_bytes(step.memory_bytes) if step.memory_bytes else "",
                human_seconds(step.seconds),
            )
            for step in done.estimate.steps
        ]
        console.table(("TO DO", "DISK", "MEMORY", "ABOUT"), rows, right=("DISK", "MEMORY", "ABOUT"))
        n_cached = sum(step.state == "cached" for step in done.steps)
        if n_cached:
            console.line(f"{n_cached} steps are there already.")
        console.line(f"{name} would be made. Nothing was changed.")
        return
    for step in done.steps:
        words = "there already" if step.state == "cached" else f"{step.seconds:.1f} s" if step.state == "done" else ""
        console.line(f"{step.kind:<10} {words}")
    assert done.landed is not None
    show_landed(console, done.landed)
    if done.kept_bytes > _WORTH_TELLING_BYTES:
        kept = human_bytes(done.kept_bytes)
        console.say(
            f"  {kept} of steps are kept in {done.plan.work.root} for the next build; --no-keep-steps removes them"
        )
    if done.is_lock_written:
        console.say(f"  {done.lock.name} records what it was made of; build --locked makes exactly this again.")


def human_seconds(seconds: float) -> str:
    """90 -> '2 min': an estimate is not more exact than that."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
