"""`export`: a model leaves Ollama's store as a file."""

from __future__ import annotations

from pathlib import Path

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, write_options


@click.command("export", epilog="Example: ollama-forge export llama3.2 -o llama3.2.gguf")
@click.argument("ref")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The GGUF file to write.")
@click.option("--modelfile", "with_modelfile", is_flag=True, help="Write OUTPUT.Modelfile beside it.")
@write_options
@store_option
@console_options
def command(
    ref: str, output: Path, with_modelfile: bool, force: bool, dry_run: bool, store_path: Path | None, console: Console
) -> None:
    """Write REF's weights as a GGUF file: by reflink or hard link where the file system can, else a copy."""
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
