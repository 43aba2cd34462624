"""`import`: a Hugging Face folder or repo becomes a landed Ollama model in one pass."""

from __future__ import annotations

from dataclasses import replace
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
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.landing import LandedModel
    from ollama_forge.store.modelfile import Modelfile


@click.command(
    "import",
    epilog="Examples: ollama-forge import Qwen/Qwen3-0.6B --name qwen-small"
    "   |   ollama-forge import ./my-model --name my-model --quant Q4_K_M",
)
@click.argument("source")
@click.option("--name", required=True, help="The Ollama model to make.")
@click.option("--revision", metavar="REV", help="Of a repo: a branch, a tag or a commit (default: main).")
@click.option(
    "--keep-source/--no-keep-source",
    default=True,
    help="Of a repo: keep its files in the cache (default), or let each shard go once it is used.",
)
@click.option(
    "--quant", default="Q4_K_M", show_default=True, metavar="TYPE", help="Quantization; 'none' keeps 16 bits."
)
@click.option("--outtype", type=click.Choice(OUTTYPES, case_sensitive=False), default="auto", show_default=True)
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix for --quant.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the converted GGUF there too: model.gguf, or model-Q4_K_M.gguf when it is quantized.",
)
@threads_option
@modelfile_options
@landing_options
def command(
    source: str,
    name: str,
    revision: str | None,
    keep_source: bool,
    quant: str,
    outtype: str,
    imatrix: Path | None,
    output_dir: Path | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Convert, quantize and land SOURCE in one pass, without a 16-bit file in between.

    SOURCE is a Hugging Face folder, or a repo of the Hub (org/name, hf:org/name@revision), which is downloaded into the
    Hugging Face cache first.
    """
    from ollama_forge.jobs.conversion import convert_options, quantize_options
    from ollama_forge.jobs.landing import import_folder
    from ollama_forge.jobs.resolve import resolve_folder

    quantize = None if quant.lower() == "none" else quantize_options(quant, imatrix=imatrix, n_threads=n_threads)
    conversion = convert_options(outtype, quantize, n_threads=n_threads)
    kept = _kept_path(output_dir, quant, options)
    if is_repo(source):
        from ollama_forge.cli.hub_report import report_hub_landing
        from ollama_forge.jobs.hub import import_repo
        from ollama_forge.source.hub_files import parse_repo

        named = parse_repo(source)
        if revision:
            named = replace(named, revision=revision)
        done = import_repo(named, name, changes, options, conversion, keep_source=keep_source)
        _keep(kept, done.landed, options, console)
        report_hub_landing(console, done)
        return
    if revision:
        raise UsageError(
            f"--revision is for repos of the Hub, and {source!r} is a folder",
            next=f"Leave it out, or name the repo: ollama-forge import org/name --revision {revision} --name {name}",
        )
    landed = import_folder(resolve_folder(source), name, changes, options, conversion)
    _keep(kept, landed, options, console)
    report_landed(console, landed)


def _kept_path(output_dir: Path | None, quant: str, options: LandOptions) -> Path | None:
    """Where the GGUF is kept; refused before any work when something is there."""
    from ollama_forge.files import refuse_existing

    if output_dir is None:
        return None
    if options.server is not None:
        raise UsageError(
            "--output-dir keeps what lands in a store, and this lands in a server",
            next="Leave it out, or: ollama-forge convert SOURCE -o model.gguf",
        )
    kept = output_dir / ("model.gguf" if quant.lower() == "none" else f"model-{quant.upper()}.gguf")
    refuse_existing(kept, overwrite=options.overwrite)
    return kept


def _keep(kept: Path | None, landed: LandedModel, options: LandOptions, console: Console) -> None:
    if kept is None or options.dry_run:
        return
    from ollama_forge.jobs.export import export_model

    export_model(landed.name, kept, store_path=options.store_path, overwrite=options.overwrite)
    console.done(f"Kept {kept}")


def is_repo(source: str) -> bool:
    """Whether a SOURCE is meant as a repo of the Hub: what lies on this disk is not."""
    from ollama_forge.source.hub_files import looks_like_repo
    from ollama_forge.source.ref import looks_like_path

    return not looks_like_path(source) and not Path(source).exists() and looks_like_repo(source)
