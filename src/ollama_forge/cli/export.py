"""`export`: a model leaves Ollama's store as a GGUF file, or as a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.options import console_options, store_option, threads_option, write_options
from ollama_forge.errors import UsageError


@click.command(
    "export",
    epilog="Examples: ollama-forge export llama3.2 -o llama3.2.gguf   |   "
    "ollama-forge export llama3.2 --format hf -o ./llama3.2",
)
@click.argument("ref")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file, or the folder, to write."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "hf"]),
    default="gguf",
    show_default=True,
    help="hf: a Hugging Face folder (safetensors, tokenizer, template).",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    help="hf: type of the weights. auto keeps f32, f16 and bf16, and makes bf16 of quantized ones.  [default: auto]",
)
@click.option("--max-shard-size", metavar="SIZE", help="hf: where one file ends and the next begins.  [default: 5GB]")
@click.option("--modelfile", "with_modelfile", is_flag=True, help="Write OUTPUT.Modelfile beside it (hf: inside).")
@threads_option
@write_options
@store_option
@console_options
def command(
    ref: str,
    output: Path,
    form: str,
    dtype: str | None,
    max_shard_size: str | None,
    with_modelfile: bool,
    n_threads: int | None,
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Write REF's weights: as a GGUF file (by reflink or hard link where the file system can), or for transformers."""
    if form == "hf":
        _export_folder(
            console, ref, output, dtype, max_shard_size, with_modelfile, n_threads, force, dry_run, store_path
        )
        return
    if dtype is not None or max_shard_size is not None:
        raise UsageError(
            "--dtype and --max-shard-size belong to --format hf",
            why="A GGUF file leaves as it is.",
            next=f"ollama-forge export {ref} --format hf -o DIR, or ollama-forge quantize for another GGUF type.",
        )
    from ollama_forge.jobs.export import export_model

    exported = export_model(
        ref, output, store_path=store_path, with_modelfile=with_modelfile, overwrite=force, dry_run=dry_run
    )

    def show() -> None:
        for path in exported.files:
            console.line(str(path))
        words = "would be written" if dry_run else f"by {exported.how}"
        console.done(f"{human_bytes(exported.size_bytes)} {words}")

    console.result(exported.document(), show)


def _export_folder(
    console: Console,
    ref: str,
    output: Path,
    dtype: str | None,
    max_shard_size: str | None,
    with_modelfile: bool,
    n_threads: int | None,
    force: bool,
    dry_run: bool,
    store_path: Path | None,
) -> None:
    from ollama_forge.convert.to_hf import HFOptions
    from ollama_forge.jobs.export import export_folder
    from ollama_forge.weights.safetensors_writer import DEFAULT_SHARD_BYTES, parse_shard_size

    shard_bytes = parse_shard_size(max_shard_size) if max_shard_size is not None else DEFAULT_SHARD_BYTES
    exported = export_folder(
        ref,
        output,
        HFOptions(dtype or "auto", shard_bytes, n_threads),
        store_path=store_path,
        with_modelfile=with_modelfile,
        overwrite=force,
        dry_run=dry_run,
        progress=console.progress,
    )
    for warning in exported.warnings:
        console.warn(warning)

    def show() -> None:
        for name in exported.files:
            console.line(str(exported.output / name))
        parts = f"{human_count(exported.parameters)} parameters, {exported.dtype}, {human_bytes(exported.size_bytes)}"
        if dry_run:
            console.line(f"Would write {exported.output}: {parts}. Nothing was changed.")
        else:
            console.done(
                f"{parts}, in {exported.seconds:.1f} s. Next: AutoModelForCausalLM.from_pretrained('{output}')"
            )

    console.result(exported.document(), show)
