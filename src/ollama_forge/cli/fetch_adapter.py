"""`fetch-adapter`: an adapter of the Hugging Face Hub on a base of this machine becomes an Ollama model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import modelfile_options

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "fetch-adapter", epilog="Example: ollama-forge fetch-adapter org/my-lora --base llama3.2 --name my-model"
)
@click.argument("repo")
@click.option("--base", required=True, metavar="REF", help="The base: an Ollama name, a .gguf file or a folder.")
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option("--file", "file", metavar="PATH", help="The adapter's GGUF, where the repo has several.")
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit (default: main).")
@click.option("--merge", is_flag=True, help="Merge into the weights, in the same quantization, instead of a layer.")
@modelfile_options
@landing_options
def command(
    repo: str,
    base: str,
    name: str,
    file: str | None,
    revision: str | None,
    merge: bool,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Download the LoRA adapter of REPO and land it on a base; one that does not fit is refused, and why."""
    from ollama_forge.cli.hub_report import report_hub_landing
    from ollama_forge.jobs.hub import land_adapter
    from ollama_forge.source.hub_files import parse_repo

    named = parse_repo(repo)
    if file:
        named = replace(named, file=file)
    if revision:
        named = replace(named, revision=revision)
    report_hub_landing(console, land_adapter(named, base, name, changes, options, merge=merge))
