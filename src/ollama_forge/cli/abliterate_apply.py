"""`abliterate apply`: directions are taken out of a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.ablation_options import ablation_options
from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.options import modelfile_options, threads_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.abliteration import AblatedModel
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.store.modelfile import Modelfile
    from ollama_forge.transform.ablation import AblationOptions

_SHOWN = 6


@click.command(
    "apply",
    epilog="Examples: ollama-forge abliterate apply llama3.2 --directions direction.safetensors --name mine"
    "   |   ollama-forge abliterate apply model.gguf --directions direction.safetensors -o edited.gguf",
)
@click.argument("ref", required=False)
@click.option("--model", metavar="REF", help="The same as REF.")
@click.option(
    "--directions", "--direction", "--refusal-pt", "directions", required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The file that compute-dir has written.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file (or folder) to write.")
@click.option("--name", help="The Ollama model to make.")
@click.option("--as-lora", is_flag=True, help="An adapter that can be switched off, instead of edited weights.")
@ablation_options
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix for what is edited.")
@threads_option
@modelfile_options
@landing_options
def command(
    ref: str | None,
    model: str | None,
    directions: Path,
    output: Path | None,
    name: str | None,
    as_lora: bool,
    ablation: AblationOptions,
    imatrix: Path | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Everything that writes the residual stream is made unable to write along the directions.

    A GGUF stays in its quantization: embedding, attention outputs, MLP outputs (of every expert) and their biases are
    edited, all other tensors stay as they are, byte for byte. A folder becomes a folder.
    """
    from ollama_forge.jobs.abliteration import ApplyOptions, ablate_and_land, apply_ablation
    from ollama_forge.jobs.resolve import resolve

    if (ref is None) == (model is None):
        raise UsageError(
            "apply needs one model", next="ollama-forge abliterate apply REF --directions FILE --name NAME"
        )
    text = ref or model or ""
    if output is None and name is None:
        raise UsageError(
            "apply needs -o OUT.gguf or --name NAME",
            next=f"ollama-forge abliterate apply {text} --directions {directions} -o edited.gguf",
        )
    if output is not None and name is not None:
        raise UsageError(
            "-o and --name do not go together here",
            why="The model is written once: as a file, or straight into Ollama's store.",
            next=f"Leave out -o, or afterwards: ollama-forge convert --gguf {output} --name {name}",
        )
    found = resolve(text, options.store_path)
    wanted = ApplyOptions(ablation, as_lora=as_lora, imatrix=imatrix, n_threads=n_threads)
    if name is not None:
        ablated, landed = ablate_and_land(found, directions, name, changes, options, wanted)
        _talk(console, ablated)
        if not console.as_json:
            show_ablated(console, ablated)
        report_landed(console, landed, {"ablated": ablated.document()})
        return
    assert output is not None
    ablated = apply_ablation(
        found, directions, output, wanted,
        overwrite=options.overwrite, dry_run=options.dry_run, progress=options.progress,
    )  # fmt: skip
    _talk(console, ablated)
    console.result(ablated.document(), lambda: _show_written(console, ablated))


def _talk(console: Console, ablated: AblatedModel) -> None:
    for warning in ablated.warnings:
        console.warn(warning)
    for note in ablated.notes:
        console.say(note)


def show_ablated(console: Console, ablated: AblatedModel) -> None:
    """How many matrices of each role were edited, and what storing the edits cost."""
    console.table(("ROLE", "EDITED"), [(role, str(count)) for role, count in ablated.counts.items()], right=("EDITED",))
    worst = sorted(ablated.losses, key=lambda loss: loss.survived)[:_SHOWN]
    if worst:
        console.table(
            ("TENSOR", "TYPE", "CHANGE", "SURVIVED", "ERROR"),
            [
                (loss.name, loss.type, f"{loss.change:.2%}", f"{loss.survived:.1%}", f"{loss.relative_error:.3%}")
                for loss in worst
            ],
            right=("CHANGE", "SURVIVED", "ERROR"),
        )
    if len(ablated.losses) > len(worst):
        console.line(f"... and {len(ablated.losses) - len(worst)} more, of which more survived (all with --json).")


def _show_written(console: Console, ablated: AblatedModel) -> None:
    show_ablated(console, ablated)
    counts = f"{ablated.edited} tensors edited, {ablated.untouched} untouched"
    if ablated.is_dry_run:
        console.line(f"Would write {ablated.output}, {human_bytes(ablated.size_bytes)}: {counts}. Nothing was changed.")
        return
    console.line(f"{ablated.output}  {human_bytes(ablated.size_bytes)}  {counts}")
    verb = "import" if ablated.output and ablated.output.is_dir() else "convert --gguf"
    if ablated.is_lora:
        console.done(
            f"Written in {ablated.seconds:.1f} s. Next: "
            f"ollama-forge retrain --base REF --adapter {ablated.output} --name NAME"
        )
    else:
        console.done(f"Written in {ablated.seconds:.1f} s. Next: ollama-forge {verb} {ablated.output} --name NAME")
