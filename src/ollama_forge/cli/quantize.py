"""`quantize`: arguments in, `jobs.conversion.quantize_file`, a table of types out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import landing_options, note_landed, report_landed, show_landed
from ollama_forge.cli.measured import measure_options, show_cost
from ollama_forge.cli.options import threads_option
from ollama_forge.cli.quantize_fit import FitWish, fit_document, fit_options, require_one_way, run_fit, show_fit
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.gguf.quantize import QuantizeOptions
    from ollama_forge.jobs.conversion import ConvertedFile
    from ollama_forge.jobs.fit_result import Fit
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.landing import LandedModel
    from ollama_forge.jobs.measure import Measurement, MeasureRequest
    from ollama_forge.jobs.resolve import ResolvedModel


@click.command(
    "quantize",
    epilog="Examples: ollama-forge quantize model-f16.gguf -o model-Q4_K_M.gguf --type Q4_K_M"
    "   |   ollama-forge quantize llama3.2:fp16 --name llama3.2-small --type Q4_K_M"
    "   |   ollama-forge quantize model-f16.gguf -o small.gguf --fit 6GB --context 8192",
)
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--name", help="The Ollama model to make; what else SOURCE says (template, parameters) is kept.")
@click.option("--type", "file_type", metavar="TYPE", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, ...")
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix (llama.cpp's GGUF).")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Another type for some tensors."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the output head.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="One type for every tensor that can have it.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already (quality suffers).")
@fit_options
@measure_options
@threads_option
@landing_options
def command(
    source: str,
    output: Path | None,
    name: str | None,
    file_type: str | None,
    imatrix: Path | None,
    tensor_types: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    allow_requantize: bool,
    fit: FitWish | None,
    measuring: MeasureRequest | None,
    n_threads: int | None,
    options: LandOptions,
    console: Console,
) -> None:
    """Make a GGUF file or an Ollama model smaller. Tensor for tensor equal to llama-quantize.

    With --type a mix of types is taken as it is; with --fit the mix that loses least within a size is found.
    """
    from ollama_forge.jobs.conversion import quantize_file, quantize_options
    from ollama_forge.jobs.resolve import resolve, resolve_gguf

    by_hand = {"--tensor-type": tensor_types, "--output-tensor-type": output_tensor_type, "--pure": pure}
    file_type = require_one_way(file_type, fit, {**by_hand, "--token-embedding-type": token_embedding_type})
    _require_target(source, output, name, fit, measuring, options)
    quantize = quantize_options(
        file_type,
        imatrix=imatrix,
        tensor_types=tensor_types,
        output_type=output_tensor_type,
        embedding_type=token_embedding_type,
        pure=pure,
        allow_requantize=allow_requantize,
        n_threads=n_threads,
    )
    if output is not None and name is not None:
        from ollama_forge.jobs.land_options import require_landable

        require_landable(name, options)
    if output is None:
        assert name is not None
        _quantize_and_land(console, resolve(source, options.store_path), name, quantize, measuring, options)
        return
    fitted = None
    if fit is not None:
        fitted = run_fit(
            console, source, output, fit, quantize,
            store_path=options.store_path, force=options.overwrite, dry_run=options.dry_run,
        )  # fmt: skip
        if fitted.written is None:
            console.result(fit_document(fitted, output), lambda: show_fit(console, fitted))
            return
        written = fitted.written
    else:
        gguf_path = resolve_gguf(source, options.store_path)
        written = quantize_file(
            gguf_path, output, quantize,
            overwrite=options.overwrite, dry_run=options.dry_run, progress=options.progress,
        )  # fmt: skip
    measured = _measure(output, source, measuring, options)
    landed = None
    if name is not None and not options.dry_run:
        from ollama_forge.jobs.landing import land_gguf
        from ollama_forge.jobs.merging import inherited
        from ollama_forge.store.modelfile import Modelfile

        model = resolve(source, options.store_path)
        wanted = inherited(model, Modelfile())
        landed = land_gguf(output, name, wanted, options, adapters=model.adapters, projector=model.projector)
        note_landed(landed.name)
    report_converted(console, written, dry_run=options.dry_run, measured=measured, fit=fitted, landed=landed)


def _require_target(
    source: str,
    output: Path | None,
    name: str | None,
    fit: FitWish | None,
    measuring: MeasureRequest | None,
    options: LandOptions,
) -> None:
    if output is None and name is None:
        raise UsageError(
            "quantize needs -o OUT.gguf or --name NAME",
            why="One writes a file, the other makes an Ollama model.",
            next=f"ollama-forge quantize {source} -o small.gguf --type Q4_K_M",
        )
    if output is None and fit is not None:
        raise UsageError(
            "--fit writes a file first",
            next=f"ollama-forge quantize {source} -o small.gguf --name {name} --fit SIZE",
        )
    if output is None and measuring is not None and options.server is not None:
        raise UsageError(
            "--measure cannot read a model that lies on another machine",
            next="Add -o small.gguf: the file is measured, then landed.",
        )


def _quantize_and_land(
    console: Console,
    model: ResolvedModel,
    name: str,
    quantize: QuantizeOptions,
    measuring: MeasureRequest | None,
    options: LandOptions,
) -> None:
    from ollama_forge.jobs.quantizing import quantize_and_land
    from ollama_forge.store.modelfile import Modelfile

    landed = quantize_and_land(model, name, Modelfile(), quantize, options)
    measured = _measure(landed.name, model.text, measuring, options)
    if measured is not None:
        from dataclasses import replace

        from ollama_forge.jobs.measure_after import record_scores

        measured = replace(measured, warnings=(*measured.warnings, *record_scores(landed.digest, measured.scores())))
        for warning in measured.warnings:
            console.warn(warning)
        if not console.as_json:
            show_cost(console, measured)
    report_landed(console, landed, {} if measured is None else {"measured": measured.document()})


def _measure(
    result: Path | str, source: str, measuring: MeasureRequest | None, options: LandOptions
) -> Measurement | None:
    if measuring is None or options.dry_run:
        return None
    from ollama_forge.jobs.measure_after import measure_quantized

    return measure_quantized(result, source, measuring, store_path=options.store_path, progress=options.progress)


def report_converted(
    console: Console,
    written: ConvertedFile,
    *,
    dry_run: bool,
    measured: Measurement | None = None,
    fit: Fit | None = None,
    landed: LandedModel | None = None,
) -> None:
    """Print what `quantize` or `convert` wrote: JSON, or the table of types for people."""
    for warning in (*written.warnings, *(measured.warnings if measured else ())):
        console.warn(warning)
    document = {**written.document(), "dry_run": dry_run}
    if measured is not None:
        document["measured"] = measured.document()
    if fit is not None:
        document["fit"] = fit.document()
    if landed is not None:
        document["landed"] = landed.document()

    def show() -> None:
        if fit is not None:
            show_fit(console, fit)
            console.line()
        _show(console, written, measured, landed, dry_run=dry_run)

    console.result(document, show)


def _show(
    console: Console,
    written: ConvertedFile,
    measured: Measurement | None,
    landed: LandedModel | None,
    *,
    dry_run: bool,
) -> None:
    console.table(
        ("TYPE", "TENSORS", "SIZE", "BITS/WEIGHT"),
        [
            (share.type, str(share.tensors), human_bytes(share.size_bytes), f"{share.bits_per_weight:.2f}")
            for share in written.types
        ],
        right=("TENSORS", "SIZE", "BITS/WEIGHT"),
    )
    if dry_run:
        console.line(f"Would write {written.output}, {human_bytes(written.size_bytes)}. Nothing was changed.")
    else:
        console.line(f"{written.output}  {human_bytes(written.size_bytes)}  sha256:{written.sha256[:12]}")
        if measured is not None:
            show_cost(console, measured)
        if landed is not None:
            show_landed(console, landed)
            return
        console.done(
            f"Written in {written.seconds:.1f} s. Next: ollama-forge convert --gguf {written.output} --name NAME"
        )
