"""`retrain`: a base and an adapter become an Ollama model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.options import modelfile_options, threads_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "retrain",
    epilog="Example: ollama-forge retrain --base llama3.2 --adapter ./my-adapter --name my-model",
)
@click.option("--base", required=True, metavar="REF", help="The base: an Ollama name, a .gguf file or a folder.")
@click.option(
    "--adapter",
    "adapters",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="A PEFT folder, a LoRA .gguf, llama.cpp's old .bin, or a folder with one of them.",
)
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option("--merge", is_flag=True, help="Merge into the weights, in the same quantization, instead of a layer.")
@click.option("--untie", is_flag=True, help="With --merge: give a model with a tied output head one of its own.")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path, exists=True),
    help="With --merge: importance matrix.",
)
@threads_option
@modelfile_options
@landing_options
def command(
    base: str,
    adapters: tuple[Path, ...],
    name: str,
    merge: bool,
    untie: bool,
    imatrix: Path | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Make an Ollama model from a base and a trained adapter: as a layer of a few megabytes, or merged (--merge)."""
    from ollama_forge.cli.merge import report_merged_and_landed, weighted
    from ollama_forge.jobs.merging import MergeOptions, merge_and_land, retrain
    from ollama_forge.jobs.resolve import resolve

    if not merge:
        if untie or imatrix is not None:
            raise UsageError(
                f"{'--untie' if untie else '--imatrix'} is only for --merge",
                why="An adapter layer changes no stored weight.",
                next="Add --merge, or leave it out.",
            )
        report_landed(console, retrain(base, adapters, name, changes, options))
        return
    model = resolve(base, options.store_path)
    wanted = MergeOptions(untie=untie, imatrix=imatrix, n_threads=n_threads)
    merged, landed = merge_and_land(model, weighted(adapters, ()), name, changes, options, wanted)
    report_merged_and_landed(console, merged, landed)
