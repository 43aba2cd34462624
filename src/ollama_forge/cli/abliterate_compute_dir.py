"""`abliterate compute-dir`: the directions in which two sets of prompts differ, and the evidence for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import console_options, store_option, write_options
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.jobs.directions import ComputedDirections, DirectionPlan


class JoinsFractions(click.Command):
    """A command that takes all numbers behind `--layer-fracs`: `0.4 0.5 0.6` means the same as `0.4,0.5,0.6`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        is_open = False
        for word in args:
            is_number = word.replace(",", "").replace(".", "").isdecimal()
            if is_open and is_number and joined[-1] != "--layer-fracs":
                joined[-1] += f",{word}"
                continue
            is_open = word == "--layer-fracs" or (is_open and is_number)
            joined.append(word)
        return super().parse_args(ctx, joined)


@click.command(
    "compute-dir",
    cls=JoinsFractions,
    epilog="Example: ollama-forge abliterate compute-dir --model llama3.2 --harmful refused.txt "
    "--harmless answered.txt -o direction.safetensors",
)
@click.argument("ref", required=False)
@click.option("--model", metavar="REF", help="The same as REF.")
@click.option(
    "--harmful", multiple=True, type=click.Path(path_type=Path), help="Prompts that it refuses: .txt, .jsonl."
)
@click.option("--harmless", multiple=True, type=click.Path(path_type=Path), help="Prompts that it answers.")
@click.option("--harmful-dir", multiple=True, type=click.Path(path_type=Path), help="All .txt and .jsonl of a folder.")
@click.option("--harmless-dir", multiple=True, type=click.Path(path_type=Path), help="All .txt and .jsonl of a folder.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option(
    "--num-instructions",
    "n_instructions",
    type=click.IntRange(2),
    default=128,
    show_default=True,
    help="Prompts of each list, drawn with --seed.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which prompts are drawn.")
@click.option("--layer-frac", "fraction", metavar="F", help="Take the layer at this share of the depth.")
@click.option("--layer-fracs", "fractions", multiple=True, metavar="F,F,...", help="Choose among the layers at these.")
@click.option("--per-layer-directions", "per_layer", is_flag=True, help="Each layer will use its own direction.")
@click.option(
    "--num-directions",
    "n_directions",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Beside the difference of the means, the strongest of the paired differences.",
)
@click.option(
    "--method",
    type=click.Choice(["mean", "median"]),
    default="mean",
    show_default=True,
    help="Difference of means, or of geometric medians.",
)
@click.option("--projected", is_flag=True, help="Without what lies along the mean of the harmless prompts.")
@click.option(
    "--position",
    "positions",
    multiple=True,
    type=int,
    metavar="P",
    help="Token of the prompt, from its end: -1 is the last (default). Of several the best is taken.",
)
@click.option("--load-in-8bit", is_flag=True, help="Read a Hugging Face folder as Q8_0, in half the memory.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--try/--no-try", "try_prompts", default=True, help="Ask the model a few prompts first (default: yes).")
@write_options
@store_option
@console_options
def command(
    ref: str | None,
    model: str | None,
    harmful: tuple[Path, ...],
    harmless: tuple[Path, ...],
    harmful_dir: tuple[Path, ...],
    harmless_dir: tuple[Path, ...],
    output: Path,
    fraction: str | None,
    fractions: tuple[str, ...],
    per_layer: bool,
    n_directions: int,
    method: str,
    projected: bool,
    positions: tuple[int, ...],
    force: bool,
    dry_run: bool,
    store_path: Path | None,
    console: Console,
    **settings: Any,
) -> None:
    """Run both lists of prompts through the model and compare what each layer hands on at the last token.

    Prints for each layer how far the lists are apart, writes the directions, and a picture beside them. The prompts
    are yours: a list that the model refuses, and one of like kind that it answers.
    """
    from ollama_forge.dataset.prompts import read_prompts
    from ollama_forge.jobs.directions import ComputeOptions, compute_direction, plan_directions
    from ollama_forge.jobs.resolve import resolve
    from ollama_forge.train.direction_options import DirectionOptions

    if (ref is None) == (model is None):
        raise UsageError("compute-dir needs one model", next="Example: compute-dir --model llama3.2 --harmful ...")
    wanted = DirectionOptions(method, n_directions, projected, per_layer, positions=positions or (-1,))
    wanted.validate()
    options = ComputeOptions(wanted, layer_fracs=parse_fractions(fraction, fractions), **settings)
    lists = []
    for option, paths in (("--harmful", (*harmful, *harmful_dir)), ("--harmless", (*harmless, *harmless_dir))):
        if not paths:
            raise UsageError(
                f"There is no {option}",
                why="This package has no lists of such prompts: bring your own, one prompt a line.",
                next="Example: --harmful refused.txt --harmless answered.txt",
            )
        lists.append(read_prompts(paths))
    found = resolve(ref or model or "", store_path)
    if dry_run:
        plan = plan_directions(found, lists[0], lists[1], output, options, overwrite=force)
        console.result(plan.document(), lambda: _show_plan(console, plan))
        return
    computed = compute_direction(found, lists[0], lists[1], output, options, overwrite=force, progress=console.progress)
    for warning in computed.warnings:
        console.warn(warning)
    console.result(computed.document(), lambda: show_evidence(console, computed))
    console.done(
        f"{computed.output} in {computed.seconds:.1f} s; a picture: {computed.picture}. "
        f"Next: ollama-forge abliterate apply {found.text} --directions {computed.output} --name NAME"
    )


def parse_fractions(fraction: str | None, fractions: tuple[str, ...]) -> tuple[float, ...]:
    """`0.4,0.5` and `0.6` -> (0.4, 0.5, 0.6).

    Raises:
        UsageError: something that is no number.
    """
    words = [
        word for text in (*((fraction,) if fraction else ()), *fractions) for word in text.replace(",", " ").split()
    ]
    try:
        return tuple(float(word) for word in words)
    except ValueError as exc:
        raise UsageError(f"A layer fraction is not a number: {exc}", next="Example: --layer-fracs 0.4,0.5,0.6") from exc


def _show_plan(console: Console, plan: DirectionPlan) -> None:
    console.line(
        f"Would run {plan.harmful} and {plan.harmless} prompts ({plan.tokens:,} tokens, the longest {plan.longest:,}) "
        f"once, in about {human_bytes(plan.memory_bytes)} of memory, and write {plan.output}. Nothing was changed."
    )
    if plan.scratch_bytes:
        console.line(f"The folder is read through a temporary GGUF of {human_bytes(plan.scratch_bytes)}.")


def show_evidence(console: Console, computed: ComputedDirections) -> None:
    """One line for each layer; the chosen one is marked."""
    best = computed.report.directions.best_layer
    columns = ("LAYER", "SILHOUETTE", "COS MEANS", "COS CHOSEN", "HARMFUL", "HARMLESS", "GAP", "")
    rows = [
        (
            str(item.layer),
            f"{item.silhouette:.3f}",
            f"{item.means_cosine:.3f}",
            f"{item.best_cosine:.3f}",
            f"{item.harmful_norm:.3g}",
            f"{item.harmless_norm:.3g}",
            f"{item.gap:.3g}",
            "chosen" if item.layer == best else "" if item.is_candidate else "not a candidate",
        )
        for item in computed.report.layers
    ]
    console.table(columns, rows, right=columns[:-1])
