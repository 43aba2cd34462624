"""`quantize`: arguments in, `jobs.conversion.quantize_file`, a table of types out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, threads_option, write_options

if TYPE_CHECKING:
    from ollama_forge.jobs.conversion import ConvertedFile


@click.command(
    "quantize",
    epilog="Example: ollama-forge quantize model-f16.gguf -o model-Q4_K_M.gguf --type Q4_K_M",
)
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--type", "file_type", required=True, metavar="TYPE", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, IQ4_XS, ...")
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix (llama.cpp's GGUF).")
@click.option(
    "--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", help="Another type for some tensors."
)
@click.option("--output-tensor-type", metavar="TYPE", help="Type of the output head.")
@click.option("--token-embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="One type for every tensor that can have it.")
@click.option("--allow-requantize", is_flag=True, help="Accept a source that is quantized already (quality suffers).")
@threads_option
@write_options
@store_option
@console_options
def command(
    source: str,
    output: Path,
    file_type: str,
    imatrix: Path | None,
    tensor_types: tuple[str, ...],
    output_tensor_type: str | None,
    token_embedding_type: str | None,
    pure: bool,
    allow_requantize: bool,
    n_threads: int | None,
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Make a GGUF file or an Ollama model smaller. Tensor for tensor equal to llama-quantize."""
    from ollama_forge.jobs.conversion import quantize_file, quantize_options
    from ollama_forge.jobs.resolve import resolve_gguf

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
    gguf_path = resolve_gguf(source, store_path)
    written = quantize_file(gguf_path, output, options, overwrite=force, dry_run=dry_run, progress=console.progress)
    report_converted(console, written, dry_run=dry_run)


def report_converted(console: Console, written: ConvertedFile, *, dry_run: bool) -> None:
    """Print what `quantize` or `convert` wrote: JSON, or the table of types for people."""
    for warning in written.warnings:
        console.warn(warning)
    console.result({**written.document(), "dry_run": dry_run}, lambda: _show(console, written, dry_run=dry_run))


def _show(console: Console, written: ConvertedFile, *, dry_run: bool) -> None:
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
        console.done(
            f"Written in {written.seconds:.1f} s. Next: ollama-forge convert --gguf {written.output} --name NAME"
        )
