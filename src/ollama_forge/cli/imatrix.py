"""`imatrix`: arguments in, `jobs.imatrix.make_imatrix`, a few lines out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, write_options

if TYPE_CHECKING:
    from ollama_forge.jobs.imatrix import MadeImatrix


@click.command("imatrix", epilog="Example: ollama-forge imatrix model-bf16.gguf --text text.txt -o imatrix.gguf")
@click.argument("source")
@click.option("--text", type=click.Path(path_type=Path), help="The text to read, UTF-8 (default: a short one of ours).")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--context", type=int, default=512, show_default=True, metavar="N", help="Tokens in a chunk.")
@click.option("--chunks", "n_chunks", type=click.IntRange(min=1), metavar="N", help="Read at most so many chunks.")
@click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), default="auto", help="Where to compute.")
@write_options
@store_option
@console_options
def command(
    source: str,
    text: Path | None,
    output: Path,
    context: int,
    n_chunks: int | None,
    device: str,
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
) -> None:
    """Which weights matter: what reaches each matrix while a model reads a text, for `quantize --imatrix`.

    The file is what llama-imatrix makes of the same text. A model of any quantization will do; 10,000 tokens of text
    of the kind that the model will meet are enough.
    """
    from ollama_forge.jobs.imatrix import ImatrixOptions, make_imatrix

    made = make_imatrix(
        source,
        text,
        output,
        ImatrixOptions(context, n_chunks, device),
        store_path=store_path,
        overwrite=force,
        dry_run=dry_run,
        progress=console.progress,
    )
    for warning in made.warnings:
        console.warn(warning)
    console.result(made.document(), lambda: _show(console, made))


def _show(console: Console, made: MadeImatrix) -> None:
    read = f"{made.chunks} chunks of {made.context} tokens (the text has {made.text_tokens:,})"
    if made.is_dry_run:
        console.line(f"Would read {read} and write {made.output}, about {human_bytes(made.size_bytes)}.")
        console.line(f"It would speak of {made.entries} tensors. Nothing was changed.")
        return
    console.line(f"{made.output}  {human_bytes(made.size_bytes)}  {made.entries} tensors, {read}")
    console.done(
        f"Made in {made.seconds:.1f} s. Next: ollama-forge quantize MODEL -o OUT.gguf --type IQ3_XXS "
        f"--imatrix {made.output}"
    )
