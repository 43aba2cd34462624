"""`convert`: a Hugging Face folder into a GGUF file, or a GGUF file into an Ollama model."""

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
from ollama_forge.cli.quantize import report_converted
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.convert.plan import ConvertOptions
    from ollama_forge.gguf.quantize import QuantizeOptions
    from ollama_forge.jobs.conversion import ConvertedFile
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.landing import LandedModel
    from ollama_forge.store.modelfile import Modelfile

CONVERTERS = ("builtin", "llama.cpp")


@click.command(
    "convert",
    epilog="Examples: ollama-forge convert ./my-model -o my-model.gguf --quant Q4_K_M"
    "   |   ollama-forge convert --gguf my-model.gguf --name my-model",
)
@click.argument("source", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--gguf", type=click.Path(path_type=Path), help="A GGUF file (or a model) that becomes --name in Ollama.")
@click.option("--name", help="The Ollama model to make.")
@click.option("--outtype", type=click.Choice(OUTTYPES, case_sensitive=False), default="auto", show_default=True)
@click.option("--quant", "--quantize", "quant", metavar="TYPE", help="Quantize in the same pass: Q4_K_M, Q8_0, ...")
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix for --quant.")
@click.option("--allow-requantize", is_flag=True, help="Accept a --gguf that is quantized already.")
@click.option("--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="LoRA adapter to land too.")
@click.option("--converter", type=click.Choice(CONVERTERS), default="builtin", show_default=True)
@threads_option
@modelfile_options
@landing_options
def command(
    source: str | None,
    output: Path | None,
    gguf: Path | None,
    name: str | None,
    outtype: str,
    quant: str | None,
    imatrix: Path | None,
    allow_requantize: bool,
    adapters: tuple[Path, ...],
    converter: str,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Convert weights: a Hugging Face folder to GGUF (-o), or a GGUF file to an Ollama model (--gguf --name)."""
    from ollama_forge.jobs import conversion

    if (source is None) == (gguf is None):
        raise UsageError(
            "convert needs either a SOURCE folder or --gguf PATH",
            next="ollama-forge convert ./folder -o model.gguf, or ollama-forge convert --gguf model.gguf --name NAME",
        )
    quantize = (
        conversion.quantize_options(quant, imatrix=imatrix, allow_requantize=allow_requantize, n_threads=n_threads)
        if quant
        else None
    )
    if gguf is not None:
        if name is None or output is not None:
            raise UsageError(
                "convert --gguf makes an Ollama model, so it needs --name and takes no -o",
                next=f"ollama-forge convert --gguf {gguf} --name NAME"
                if output is None
                else f"ollama-forge quantize {gguf} -o {output} --type Q4_K_M",
            )
        report_landed(console, _land_gguf(gguf, name, changes, options, adapters, quantize))
        return
    assert source is not None
    if output is None:
        raise UsageError(
            "convert SOURCE needs -o OUT.gguf",
            next=f"ollama-forge convert {source} -o model.gguf; "
            f"to land it in Ollama at once: ollama-forge import {source} --name NAME",
        )
    if name is not None:
        from ollama_forge.jobs.land_options import require_landable

        require_landable(name, options)
    chosen = conversion.convert_options(outtype, quantize, n_threads=n_threads)
    written = _write(source, output, chosen, converter, options, console)
    if name is None:
        report_converted(console, written, dry_run=options.dry_run)
        return
    extra = {"converted": {**written.document(), "dry_run": options.dry_run}}
    if options.dry_run:
        if not console.as_json:
            report_converted(console, written, dry_run=True)
        planned = _plan_landing(source, name, changes, options, adapters, chosen)
        report_landed(console, planned if console.as_json else replace(planned, warnings=()), extra)
        return
    from ollama_forge.jobs.landing import land_gguf

    landed = land_gguf(output, name, changes, options, adapters=adapters)
    report_landed(console, replace(landed, warnings=(*written.warnings, *landed.warnings)), extra)


def _plan_landing(
    source: str,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: tuple[Path, ...],
    chosen: ConvertOptions,
) -> LandedModel:
    """What landing the file of a dry run would do."""
    from ollama_forge.jobs.landing import import_folder
    from ollama_forge.jobs.resolve import resolve_folder

    return import_folder(resolve_folder(source), name, changes, options, chosen, adapters=adapters)


def _write(
    source: str, output: Path, chosen: ConvertOptions, converter: str, options: LandOptions, console: Console
) -> ConvertedFile:
    """A folder becomes a GGUF file; nothing of landing is loaded."""
    from ollama_forge.jobs.conversion import convert_folder, convert_foreign_folder
    from ollama_forge.jobs.resolve import resolve_folder

    folder = resolve_folder(source)
    if converter == "llama.cpp":
        if options.dry_run:
            raise UsageError("llama.cpp's converter has no dry run", next="Leave --dry-run out.")
        return convert_foreign_folder(folder, output, chosen, overwrite=options.overwrite, progress=console.progress)
    return convert_folder(
        folder, output, chosen, overwrite=options.overwrite, dry_run=options.dry_run, progress=console.progress
    )


def _land_gguf(
    gguf: Path,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: tuple[Path, ...],
    quantize: QuantizeOptions | None,
) -> LandedModel:
    from ollama_forge.jobs.creation import Creation, create_model
    from ollama_forge.source.ref import looks_like_path

    base = str(gguf.absolute()) if gguf.exists() or looks_like_path(str(gguf)) else str(gguf)
    if quantize is None:
        return create_model(Creation(base, changes, adapters), name, options)
    return _land_smaller(base, name, changes, options, adapters, quantize)


def _land_smaller(
    base: str,
    name: str,
    changes: Modelfile,
    options: LandOptions,
    adapters: tuple[Path, ...],
    quantize: QuantizeOptions,
) -> LandedModel:
    """A GGUF quantized into the store; an Ollama model keeps its Modelfile, adapters and projector."""
    from ollama_forge.jobs.landing import land_gguf
    from ollama_forge.jobs.merging import inherited
    from ollama_forge.jobs.resolve import resolve

    model = resolve(base, options.store_path)
    if model.gguf_path is None:
        raise UsageError(
            f"{base!r} is a Hugging Face folder, not a GGUF",
            next=f"ollama-forge import {base} --name {name} --quant {quantize.file_type.name}",
        )
    return land_gguf(
        model.gguf_path,
        name,
        inherited(model, changes),
        options,
        adapters=(*model.adapters, *adapters),
        quantize=quantize,
        projector=model.projector,
    )
