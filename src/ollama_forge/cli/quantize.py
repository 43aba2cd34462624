"""`quantize`: arguments in, `jobs.conversion.quantize_file`, a table of types out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.measured import measure_options, show_cost
from ollama_forge.cli.options import console_options, store_option, threads_option, write_options
from ollama_forge.cli.quantize_fit import FitWish, fit_document, fit_options, require_one_way, run_fit, show_fit

if TYPE_CHECKING:
    from ollama_forge.jobs.conversion import ConvertedFile
    from ollama_forge.jobs.fit_result import Fit
    from ollama_forge.jobs.measure import Measurement, MeasureRequest


@click.command(
    "quantize",
    epilog="Examples: ollama-forge quantize model-f16.gguf -o model-Q4_K_M.gguf --type Q4_K_M"
    "   |   ollama-forge quantize model-f16.gguf -o small.gguf --fit 6GB --context 8192",
)
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
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
@write_options
@store_option
@console_options
def command(
    source: str,
    output: Path,
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
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Make a GGUF file or an Ollama model smaller. Tensor for tensor equal to llama-quantize.

    With --type a mix of types is taken as it is; with --fit the mix that loses least within a size is found.
    """
    from ollama_forge.jobs.conversion import quantize_file, quantize_options
    from ollama_forge.jobs.resolve import resolve_gguf

    by_hand = {"--tensor-type": tensor_types, "--output-tensor-type": output_tensor_type, "--pure": pure}
    file_type = require_one_way(file_type, fit, {**by_hand, "--token-embedding-type": token_embedding_type})
    options = quantize_options(
        file_type,
        imatrix=imatrix,
        tensor_types=tensor_types,
        output_type=output_tensor_type,
        embedding_type=token_embedding_type,
        pure=pure,
        allow_requantize=allow_requantize,
        n_threads=n_threads,
    )
    fitted = None
    if fit is not None:
        fitted = run_fit(console, source, output, fit, options, store_path=store_path, force=force, dry_run=dry_run)
        if fitted.written is None:
            console.result(fit_document(fitted, output), lambda: show_fit(console, fitted))
            return
        written = fitted.written
    else:
        gguf_path = resolve_gguf(source, store_path)
        written = quantize_file(gguf_path, output, options, overwrite=force, dry_run=dry_run, progress=console.progress)
    measured = None
    if measuring is not None and not dry_run:
        from ollama_forge.jobs.measure_after import measure_quantized

        measured = measure_quantized(output, source, measuring, store_path=store_path, progress=console.progress)
    report_converted(console, written, dry_run=dry_run, measured=measured, fit=fitted)


def report_converted(
    console: Console,
    written: ConvertedFile,
    *,
    dry_run: bool,
    measured: Measurement | None = None,
    fit: Fit | None = None,
) -> None:
    """Print what `quantize` or `convert` wrote: JSON, or the table of types for people."""
    for warning in (*written.warnings, *(measured.warnings if measured else ())):
        console.warn(warning)
    document = {**written.document(), "dry_run": dry_run}
    if measured is not None:
        document["measured"] = measured.document()
    if fit is not None:
        document["fit"] = fit.document()

    def show() -> None:
        if fit is not None:
            show_fit(console, fit)
            console.line()
        _show(console, written, measured, dry_run=dry_run)

    console.result(document, show)


def _show(console: Console, written: ConvertedFile, measured: Measurement | None, *, dry_run: bool) -> None:
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
        console.done(
            f"Written in {written.seconds:.1f} s. Next: ollama-forge convert --gguf {written.output} --name NAME"
        )
