"""`import`: a Hugging Face folder becomes a landed Ollama model in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.options import (
    OUTTYPES,
    modelfile_options,
    threads_option,
)

if TYPE_CHECKING:
    from ollama_forge.jobs.landing import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command("import", epilog="Example: ollama-forge import ./my-model --name my-model --quant Q4_K_M")
@click.argument("source")
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option(
    "--quant", default="Q4_K_M", show_default=True, metavar="TYPE", help="Quantization; 'none' keeps 16 bits."
)
@click.option("--outtype", type=click.Choice(OUTTYPES, case_sensitive=False), default="auto", show_default=True)
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix for --quant.")
@threads_option
@modelfile_options
@landing_options
def command(
    source: str,
    name: str,
    quant: str,
    outtype: str,
    imatrix: Path | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Convert, quantize and land SOURCE (a Hugging Face folder) in one pass, without a 16-bit file in between."""
    from ollama_forge.jobs.conversion import convert_options, quantize_options
    from ollama_forge.jobs.landing import import_folder
    from ollama_forge.jobs.resolve import resolve_folder

    quantize = None if quant.lower() == "none" else quantize_options(quant, imatrix=imatrix, n_threads=n_threads)
    landed = import_folder(
        resolve_folder(source),
        name,
        changes,
        options,
        convert_options(outtype, quantize, n_threads=n_threads),
    )
    report_landed(console, landed)
