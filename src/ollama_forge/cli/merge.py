"""`merge`: a base and adapters become one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.measured import measure_options, show_cost
from ollama_forge.cli.options import FiniteRange, modelfile_options, threads_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.landing import LandedModel
    from ollama_forge.jobs.measure import Measurement, MeasureRequest
    from ollama_forge.jobs.merging import MergedModel, MergeInput
    from ollama_forge.jobs.resolve import ResolvedModel
    from ollama_forge.store.modelfile import Modelfile

_SHOWN = 12


@click.command(
    "merge",
    epilog="Examples: ollama-forge merge llama3.2 ./my-adapter -o merged.gguf"
    "   |   ollama-forge merge llama3.2 ./one ./two --weight 0.7 --weight 0.3 --name mine",
)
@click.argument("base")
@click.argument("adapters", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file (or folder) to write.")
@click.option("--name", help="The Ollama model to make.")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    type=FiniteRange(),
    metavar="X",
    help="Strength of each adapter, in order (1.0).",
)
@click.option("--imatrix", type=click.Path(path_type=Path, exists=True), help="Importance matrix for what is edited.")
@click.option("--untie", is_flag=True, help="Give a model with a tied output head one of its own, where needed.")
@measure_options
@threads_option
@modelfile_options
@landing_options
def command(
    base: str,
    adapters: tuple[Path, ...],
    output: Path | None,
    name: str | None,
    weights: tuple[float, ...],
    imatrix: Path | None,
    untie: bool,
    measuring: MeasureRequest | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Merge adapters into a model (those of an Ollama model itself, too), back into the same quantization.

    Tensors that no adapter names stay as they are, byte for byte.
    """
    from ollama_forge.jobs.landing import land_gguf
    from ollama_forge.jobs.merging import MergeOptions, inherited, merge_and_land, merge_model
    from ollama_forge.jobs.resolve import resolve

    if output is None and name is None:
        raise UsageError(
            "merge needs -o OUT.gguf or --name NAME",
            next=f"ollama-forge merge {base} {adapters[0] if adapters else './adapter'} -o merged.gguf",
        )
    inputs = weighted(adapters, weights)
    model = resolve(base, options.store_path)
    if not adapters and not model.adapters:
        raise UsageError(
            f"{base!r} has no adapter of its own, and none was named",
            next=f"ollama-forge merge {base} ./adapter -o merged.gguf",
        )
    if measuring is not None and options.server is not None and output is None:
        raise UsageError(
            "--measure cannot read a model that lies on another machine",
            next="Add -o merged.gguf: the file is measured, then landed.",
        )
    wanted = MergeOptions(untie=untie, imatrix=imatrix, n_threads=n_threads)
    if output is None:
        assert name is not None
        merged, landed = merge_and_land(model, inputs, name, changes, options, wanted)
        measured = _measure(landed.name, model, inputs, measuring, options)
        report_merged_and_landed(console, merged, landed, _recorded(landed, measured))
        return
    if name is not None and model.folder is not None:
        raise UsageError(
            "-o and --name do not go together for a Hugging Face folder",
            why="The folder would have to be converted as well.",
            next=f"Merge it, then: ollama-forge import {output} --name {name}",
        )
    merged = merge_model(
        model, inputs, output, wanted, overwrite=options.overwrite, dry_run=options.dry_run, progress=options.progress
    )
    measured = _measure(output, model, inputs, measuring, options)
    if name is None or options.dry_run:
        _warn(console, merged, measured)
        document = {**merged.document(), **_measured_document(measured)}
        console.result(document, lambda: show_merged(console, merged, measured))
        return
    landed = land_gguf(output, name, inherited(model, changes), options)
    report_merged_and_landed(console, merged, landed, _recorded(landed, measured))


def _measure(
    result: Path | str,
    base: ResolvedModel,
    inputs: list[MergeInput],
    measuring: MeasureRequest | None,
    options: LandOptions,
) -> Measurement | None:
    if measuring is None or options.dry_run:
        return None
    from ollama_forge.jobs.measure_after import measure_merged

    return measure_merged(result, base, inputs, measuring, store_path=options.store_path, progress=options.progress)


def _recorded(landed: LandedModel, measured: Measurement | None) -> Measurement | None:
    """The measurement, once its scores stand beside the landing in the registry."""
    if measured is None:
        return None
    from dataclasses import replace

    from ollama_forge.jobs.measure_after import record_scores

    return replace(measured, warnings=(*measured.warnings, *record_scores(landed.digest, measured.scores())))


def _measured_document(measured: Measurement | None) -> dict[str, Any]:
    return {} if measured is None else {"measured": measured.document()}


def weighted(adapters: tuple[Path, ...], weights: tuple[float, ...]) -> list[MergeInput]:
    """Each adapter with its weight.

    Raises:
        UsageError: there are more weights than adapters, or one is not a finite number.
    """
    import math

    from ollama_forge.jobs.merging import MergeInput

    if weights and len(weights) != len(adapters):
        raise UsageError(
            f"{len(weights)} times --weight for {len(adapters)} adapters",
            why="Each adapter has one, in the order in which they are named.",
            next="Give --weight once for each adapter, or not at all.",
        )
    if not all(math.isfinite(weight) and weight != 0 for weight in weights):
        raise UsageError("--weight must be a finite number other than 0", next="Example: --weight 0.5")
    return [MergeInput(path, weight) for path, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True)]


def _warn(console: Console, merged: MergedModel, measured: Measurement | None) -> None:
    for warning in (*merged.warnings, *(measured.warnings if measured else ())):
        console.warn(warning)


def report_merged_and_landed(
    console: Console, merged: MergedModel, landed: LandedModel, measured: Measurement | None = None
) -> None:
    """Print a merge that ended in Ollama."""
    _warn(console, merged, measured)
    if not console.as_json:
        show_losses(console, merged)
        if measured is not None:
            show_cost(console, measured)
    report_landed(console, landed, {"merged": merged.document(), **_measured_document(measured)})


def show_merged(console: Console, merged: MergedModel, measured: Measurement | None = None) -> None:
    """The lines for people."""
    show_losses(console, merged)
    if measured is not None:
        show_cost(console, measured)
    counts = f"{merged.edited} tensors edited, {merged.untouched} untouched"
    if merged.is_dry_run:
        console.line(f"Would write {merged.output}, {human_bytes(merged.size_bytes)}: {counts}. Nothing was changed.")
        return
    console.line(f"{merged.output}  {human_bytes(merged.size_bytes)}  {counts}")
    verb = "convert --gguf" if merged.sha256 else "import"
    console.done(f"Written in {merged.seconds:.1f} s. Next: ollama-forge {verb} {merged.output} --name NAME")


def show_losses(console: Console, merged: MergedModel) -> None:
    """What storing the edits cost, the worst tensors first."""
    if not merged.losses:
        return
    worst = sorted(merged.losses, key=lambda loss: loss.survived)[:_SHOWN]
    console.table(
        ("TENSOR", "TYPE", "CHANGE", "SURVIVED", "ERROR"),
        [
            (loss.name, loss.type, f"{loss.change:.2%}", f"{loss.survived:.1%}", f"{loss.relative_error:.3%}")
            for loss in worst
        ],
        right=("CHANGE", "SURVIVED", "ERROR"),
    )
    if len(merged.losses) > _SHOWN:
        console.line(f"... and {len(merged.losses) - _SHOWN} more, of which more survived (all of them with --json).")
