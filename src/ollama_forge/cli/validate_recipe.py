"""`validate-recipe`: everything that is wrong with a recipe, each with its line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.options import console_options, parse_assignments

if TYPE_CHECKING:
    from ollama_forge.recipe.read import Checked


@click.command("validate-recipe", epilog="Example: ollama-forge validate-recipe recipe.yaml")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A variable of the recipe.")
@click.option("--validate-remote", "is_remote", is_flag=True, help="Ask the Hub for the repos that it names, too.")
@console_options
def command(recipe: Path, settings: tuple[str, ...], is_remote: bool, console: Console) -> None:
    """Look for errors in RECIPE without building it; exit 1 when there are any. Nothing is written."""
    report_validity(console, recipe, settings, is_remote=is_remote)


def report_validity(console: Console, path: Path, settings: tuple[str, ...], *, is_remote: bool) -> None:
    """Print what is wrong with a recipe, or that nothing is; exit 1 when something is."""
    from ollama_forge.recipe.read import check_recipe, find_remote_problems

    checked = check_recipe(path, dict(parse_assignments(settings, "--set")))
    problems = checked.problems
    if is_remote and checked.recipe is not None:
        problems = find_remote_problems(checked.recipe)
    document = {
        "recipe": str(path),
        "valid": not problems,
        "problems": [problem.document() for problem in problems],
        "name": checked.recipe.name if checked.recipe else None,
        "steps": [step.model_dump()["kind"] for step in checked.recipe.steps] if checked.recipe else [],
    }

    def show() -> None:
        for problem in problems:
            console.line(f"{path}:{problem.line}: {problem.what}" + (f" ({problem.hint})" if problem.hint else ""))
        if not problems:
            console.line(f"{path} is valid: {_described(checked)}.")

    console.result(document, show)
    if problems:
        click.get_current_context().exit(1)


def _described(checked: Checked) -> str:
    recipe = checked.recipe
    assert recipe is not None
    kinds = [str(step.model_dump()["kind"]) for step in recipe.steps]
    return " -> ".join([f"{recipe.source.kind} {recipe.source.text}", *kinds, recipe.name])
