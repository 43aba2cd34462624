"""`fetch`: a GGUF of the Hugging Face Hub becomes an Ollama model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options
from ollama_forge.cli.options import modelfile_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command("fetch", epilog="Example: ollama-forge fetch Qwen/Qwen3-0.6B-GGUF --quant Q8_0 --name qwen-small")
@click.argument("repo")
@click.option("--name", help="The Ollama model to make (default: after the repo).")
@click.option("--quant", metavar="TYPE", help="Exactly this one: Q4_K_M, Q8_0, ... (default: the best that fits).")
@click.option("--gguf-file", metavar="PATH", help="Exactly this file of the repo.")
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit (default: main).")
@click.option(
    "--projector/--no-projector",
    default=None,
    help="Land the mmproj too (default: where the repo has one, so that the model sees or hears).",
)
@modelfile_options
@landing_options
def command(
    repo: str,
    name: str | None,
    quant: str | None,
    gguf_file: str | None,
    revision: str | None,
    projector: bool | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Download a GGUF of REPO (org/name, or a page of huggingface.co) and land it in Ollama.

    The commit is pinned, the bytes are verified by their hash, a cut download goes on where it ended, and what is in
    the cache is not downloaded again.
    """
    from ollama_forge.cli.hub_report import report_hub_landing
    from ollama_forge.jobs.hub import default_name, fetch_model
    from ollama_forge.source.hub_files import parse_repo

    named = parse_repo(repo)
    if quant and gguf_file:
        raise UsageError("--quant and --gguf-file both say which file", next="Give one of them.")
    if quant:
        named = replace(named, quant=quant, file="")
    if gguf_file:
        named = replace(named, quant="", file=gguf_file)
    if revision:
        named = replace(named, revision=revision)
    done = fetch_model(named, name or default_name(named.repo), changes, options, console.say, projector=projector)
    report_hub_landing(console, done)
