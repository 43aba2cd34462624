"""`create-from-base`: a new model from one that is there; the base's blobs are shared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.options import modelfile_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "create-from-base",
    epilog='Example: ollama-forge create-from-base --base llama3.2 --name pirate --system "Answer like a pirate."',
)
@click.option("--base", help="The model to start from: an Ollama name, a .gguf file or a folder.")
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option(
    "-f", "--file", "modelfile_path", type=click.Path(path_type=Path), help="Take everything from a Modelfile."
)
@click.option("--template-from", metavar="MODEL", help="Take the Ollama template of another model.")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="LoRA adapter (GGUF).")
@modelfile_options
@landing_options
def command(
    base: str | None,
    name: str,
    modelfile_path: Path | None,
    template_from: str | None,
    adapters: tuple[Path, ...],
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Make a model from another: prompt, parameters, messages, template, licence, adapter. Kilobytes are written."""
    from ollama_forge.jobs.creation import Creation, create_model, override, read_creation, take_template
    from ollama_forge.store.modelfile import Modelfile

    if (base is None) == (modelfile_path is None):
        raise UsageError(
            "create-from-base needs either --base MODEL or -f Modelfile",
            next='Example: ollama-forge create-from-base --base llama3.2 --name pirate --system "Arr."',
        )
    creation = read_creation(modelfile_path) if modelfile_path else Creation(str(base), Modelfile())
    creation = override(creation, changes, adapters)
    if template_from:
        creation = take_template(creation, template_from, options.store_path)
    report_landed(console, create_model(creation, name, options))
