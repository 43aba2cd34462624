"""`downsize prune`: cut away what matters least."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ollama_forge.cli.console import Console, human_bytes, human_count
from ollama_forge.cli.landing import landing_options, report_landed
from ollama_forge.cli.options import modelfile_options, threads_option
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.land_options import LandOptions
    from ollama_forge.jobs.pruning import PrunedModel
    from ollama_forge.jobs.pruning_request import PruneOptions
    from ollama_forge.store.modelfile import Modelfile
    from ollama_forge.transform.ranking import KeptPart

_BAR = 24


@click.command(
    "prune",
    epilog="Examples: ollama-forge downsize prune llama3.2 --keep 70% --dry-run"
    "   |   ollama-forge downsize prune ./model.gguf --width ffn=50%,heads=75% -o small.gguf",
)
@click.argument("ref")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The GGUF file (or folder) to write.")
@click.option("--name", help="The Ollama model to make.")
@click.option("--keep", metavar="SHARE", help="Keep this share of the model by cutting whole layers: 70%.")
@click.option("--layers", "n_layers", type=int, metavar="N", help="Keep so many layers.")
@click.option("--drop-layers", metavar="LIST", help="Cut these layers, counted from 0, unmeasured: 8-10,14.")
@click.option(
    "--width",
    metavar="LIST",
    help="Keep so much of ffn, heads, hidden, experts: ffn=50%,heads=8 (a share, or a count).",
)
@click.option(
    "--by",
    type=click.Choice(["influence", "distance"]),
    default="influence",
    show_default=True,
    help="Choose layers: each by its own influence, or the neighbouring ones over which the stream turns least.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text or training data (.jsonl) to measure with; else a text of ours.",
)
@click.option(
    "--tokens", "n_tokens", type=click.IntRange(2), default=8192, show_default=True, help="Read at most so many."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which parts of a long text are read.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to measure."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the ranking: a .png or .html file.")
@threads_option
@modelfile_options
@landing_options
def command(
    ref: str,
    output: Path | None,
    name: str | None,
    keep: str | None,
    n_layers: int | None,
    drop_layers: str | None,
    width: str | None,
    by: str,
    text: Path | None,
    n_tokens: int,
    seed: int,
    device: str,
    plot: Path | None,
    n_threads: int | None,
    changes: Modelfile,
    options: LandOptions,
    console: Console,
) -> None:
    """Cut away the layers, channels, heads or experts that matter least to a model.

    What matters is measured: the model reads a text once. A GGUF's layers that stay are copied byte for byte. The
    result is damaged until it is healed by distillation.
    """
    from ollama_forge.jobs.pruning import land_pruned, prune_and_land, prune_model
    from ollama_forge.jobs.pruning_plot import require_plot, write_plot
    from ollama_forge.jobs.pruning_request import CalibrationOptions, PruneOptions
    from ollama_forge.jobs.resolve import resolve
    from ollama_forge.transform.cut_request import parse_share, parse_width

    if output is None and name is None and not options.dry_run:
        raise UsageError(
            "downsize prune needs -o OUT.gguf or --name NAME",
            next=f"ollama-forge downsize prune {ref} --keep 70% -o small.gguf, or --dry-run to look first",
        )
    wanted = PruneOptions(
        keep=None if keep is None else parse_share(keep),
        n_layers=n_layers,
        drop=() if drop_layers is None else parse_layers(drop_layers),
        width={} if width is None else parse_width(width),
        by=by,
        calibration=CalibrationOptions(text=text, n_tokens=n_tokens, seed=seed, device=device),
        n_threads=n_threads,
    )
    if plot is not None:
        if wanted.drop and not wanted.width:
            raise UsageError(
                "There is no ranking to draw",
                why="--drop-layers says which layers go, so nothing is measured.",
                next="Leave --plot out, or let the layers be chosen: --layers N",
            )
        require_plot(plot, overwrite=options.overwrite)
    if output is not None and name is not None and output.suffix.lower() != ".gguf":
        raise UsageError(
            f"-o {str(output)!r} is a folder, and --name makes an Ollama model of a GGUF",
            why="One command does one of them.",
            next=f"Leave out one of them; afterwards: ollama-forge import {output} --name {name}",
        )
    model = resolve(ref, options.store_path)
    landed = None
    if output is None and name is not None:
        pruned, landed = prune_and_land(model, name, changes, options, wanted)
    else:
        target = output or _unnamed(wanted, model.folder is not None)
        pruned = prune_model(
            model, target, wanted, overwrite=options.overwrite, dry_run=options.dry_run, progress=options.progress
        )
    if plot is not None:
        write_plot(pruned, plot, overwrite=options.overwrite)
    if output is not None and name is not None and not options.dry_run:
        landed = land_pruned(output, name, model, changes, options, wanted, pruned)
    for warning in pruned.warnings:
        console.warn(warning)
    if landed is None:
        console.result(pruned.document(), lambda: show_pruned(console, pruned))
        return
    if not console.as_json:
        show_ranking(console, pruned)
    report_landed(console, landed, {"pruned": pruned.document()})


def _unnamed(options: PruneOptions, is_folder: bool) -> Path:
    """Where a dry run without -o says that it would write."""
    return Path("pruned" if is_folder else "pruned.gguf")


def parse_layers(text: str) -> tuple[int, ...]:
    """`8-10,14` -> (8, 9, 10, 14).

    Raises:
        UsageError: something else.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, sign, last = part.strip().partition("-")
        if not (first.isascii() and first.isdecimal() and (not sign or (last.isascii() and last.isdecimal()))):
            raise UsageError(f"--drop-layers {text!r} is not a list of layers", next="Example: --drop-layers 8-10,14")
        if len(first) > 5 or len(last) > 5 or (sign and int(last) < int(first)):
            raise UsageError(f"--drop-layers {part.strip()!r} is no range", next="Example: --drop-layers 8-10,14")
        layers += range(int(first), int(last or first) + 1)
    return tuple(sorted(set(layers)))


def show_pruned(console: Console, pruned: PrunedModel) -> None:
    """The lines for people."""
    show_ranking(console, pruned)
    size = f"{human_bytes(pruned.size_bytes)} ({pruned.size_bytes:,} bytes) of {human_bytes(pruned.source_bytes)}"
    if pruned.is_dry_run:
        console.line(f"Would write {size}. Nothing was changed.")
        return
    console.line(f"{pruned.output}  {size}")
    console.done(
        f"Written in {pruned.seconds:.1f} s: {pruned.untouched} tensors as they were, {pruned.sliced} cut, "
        f"{pruned.requantized} encoded anew."
    )


def show_ranking(console: Console, pruned: PrunedModel) -> None:
    """What was measured, layer by layer, and the sizes before and after."""
    from ollama_forge.transform.ranking import render_layers

    importance = pruned.importance
    if importance is not None and (pruned.dropped or not pruned.parts):
        most = max(float(importance.influence.max()), 1e-12)
        rows = []
        for layer, influence in enumerate(importance.influence.tolist()):
            bar = "#" * max(0, round(_BAR * influence / most))
            angle = f"{importance.distance[layer, layer + 1]:.4f}"
            rows.append((str(layer), f"{influence:.4f}", angle, "cut" if layer in pruned.dropped else "", bar))
        console.table(("LAYER", "INFLUENCE", "ANGLE", "", ""), rows, right=("LAYER", "INFLUENCE", "ANGLE"))
    if pruned.dropped:
        console.line(f"Layers that go: {render_layers(pruned.dropped)}")
    _show_parts(console, pruned.parts)
    before, after = pruned.before, pruned.after
    names = {"n_layers": "layers", "hidden": "hidden", "ffn": "ffn", "n_heads": "heads", "n_experts": "experts"}
    changed = [
        f"{words} {getattr(before, field):,} -> {getattr(after, field):,}"
        for field, words in names.items()
        if getattr(before, field) != getattr(after, field)
    ]
    console.line(
        f"{', '.join(changed)}; parameters {human_count(pruned.parameters_before)} -> "
        f"{human_count(pruned.parameters_after)} ({pruned.kept_share:.0%})"
    )


_PART_WORDS = {"ffn": "FFN", "kv_heads": "KV GROUPS", "experts": "EXPERTS"}


def _show_parts(console: Console, parts: Sequence[KeptPart]) -> None:
    """For each layer how much of what matters stays, and of heads and experts which; for hidden channels one line."""
    from ollama_forge.transform.ranking import COUNTED

    layered = [part for part in parts if part.layers]
    for part in parts:
        if part not in layered:
            console.line(
                f"Hidden channels: {part.n_kept:,} of {part.n_all:,} stay, with {part.shares[0]:.1%} of the importance"
            )
    if not layered:
        return
    columns = ["LAYER"]
    for part in layered:
        columns.append(f"{_PART_WORDS[part.name]} {part.n_kept:,}/{part.n_all:,}")
        columns += ["IMPORTANCE"] if part.name in COUNTED else []
    rows = []
    for number, layer in enumerate(layered[0].layers):
        row = [str(layer)]
        for part in layered:
            row.append(f"keeps {part.shares[number]:.1%}")
            row += [_each(part, number)] if part.name in COUNTED else []
        rows.append(row)
    console.table(columns, rows, right=("LAYER",))


def _each(part: KeptPart, number: int) -> str:
    """`0: 0.312, 1: 0.104 cut` for one layer."""
    kept = set(part.kept[number].tolist())
    values = enumerate(part.importance[number].tolist())
    return ", ".join(f"{index}: {value:.4g}{'' if index in kept else ' cut'}" for index, value in values)
