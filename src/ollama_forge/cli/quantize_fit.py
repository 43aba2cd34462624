"""`quantize --fit`: its options, and what it tells; the work is `jobs.quantize_fit`'s."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ollama_forge.cli.console import Console, human_bytes
from ollama_forge.cli.options import Command
from ollama_forge.errors import UsageError

if TYPE_CHECKING:
    from ollama_forge.gguf.mixture import QuantizeOptions
    from ollama_forge.jobs.fit_result import Fit

_SHOWN_GROUPS = 40
_COMPUTE = "Beside this llama.cpp needs memory to compute in, often 0.2 to 1 GB: leave room for it."


@dataclass(frozen=True)
class FitWish:
    """What was typed beside `--fit`."""

    limit_bytes: int
    context: int | None
    text: Path | None
    max_passes: int | None
    plot: Path | None
    device: str


def fit_options(function: Command) -> Command:
    """`--fit` and what goes with it; the command receives `fit`, a `FitWish` or None."""

    @click.option("--fit", "limit", metavar="SIZE", help="Find the mix of types that loses least within SIZE (6GB).")
    @click.option(
        "--context", type=click.IntRange(1), metavar="N", help="With --fit: tokens of context that go in, too."
    )
    @click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="With --fit: the text to measure on.")
    @click.option("--passes", "max_passes", type=click.IntRange(1), metavar="N", help="With --fit: runs at most (200).")
    @click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="With --fit: a .png or .html file.")
    @click.option("--device", type=click.Choice(("auto", "cpu", "cuda")), help="With --fit: where to measure.")
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        limit: str | None,
        context: int | None,
        text: Path | None,
        max_passes: int | None,
        plot: Path | None,
        device: str | None,
        **kwargs: Any,
    ) -> Any:
        if limit is None:
            given = {"--context": context, "--text": text, "--passes": max_passes, "--plot": plot, "--device": device}
            stray = [name for name, value in given.items() if value is not None]
            if stray:
                raise UsageError(f"{stray[0]} goes with --fit", next="Add --fit SIZE, for example --fit 6GB.")
            return function(*args, fit=None, **kwargs)
        from ollama_forge.jobs.fit_page import validate_plot_path
        from ollama_forge.jobs.fit_result import parse_limit

        wish = FitWish(parse_limit(limit), context, text, max_passes, plot, device or "auto")
        if plot is not None:
            validate_plot_path(plot)
        return function(*args, fit=wish, **kwargs)

    return wrapper


def require_one_way(file_type: str | None, fit: FitWish | None, by_hand: Mapping[str, object]) -> str:
    """The type to quantize to; with `--fit` any, because each tensor gets its own.

    Raises:
        UsageError: neither or both of `--type` and `--fit`, or types by hand beside `--fit`.
    """
    if fit is None:
        if file_type is None:
            raise UsageError(
                "quantize needs --type TYPE or --fit SIZE",
                why="One names the mix of types, the other finds the best one within a size.",
                next="Add --type Q4_K_M, or for example --fit 6GB.",
            )
        return file_type
    stray = [name for name, value in {"--type": file_type, **by_hand}.items() if value]
    if stray:
        raise UsageError(
            f"{stray[0]} does not go with --fit",
            why="--fit finds the type of every tensor.",
            next="Leave one of them out.",
        )
    return "Q4_K_M"


def fit_document(fit: Fit, output: Path) -> dict[str, Any]:
    """The JSON form of a dry run that ends before the file is decided."""
    return {"output": str(output), "bytes": None, "sha256": "", "dry_run": True, "fit": fit.document()}


def run_fit(
    console: Console,
    source: str,
    output: Path,
    wish: FitWish,
    options: QuantizeOptions,
    *,
    store_path: Path | None,
    force: bool,
    dry_run: bool,
) -> Fit:
    """Find, measure and write; and draw, where a picture was asked for."""
    from ollama_forge.files import refuse_existing
    from ollama_forge.jobs.fit_page import write_plot
    from ollama_forge.jobs.fit_result import DEFAULT_PASSES, FitRequest
    from ollama_forge.jobs.imatrix import read_text
    from ollama_forge.jobs.measure import built_in_text
    from ollama_forge.jobs.quantize_fit import fit_file
    from ollama_forge.jobs.resolve import resolve, resolve_gguf

    if wish.plot is not None:
        refuse_existing(wish.plot, overwrite=force)
    path = resolve_gguf(source, store_path)
    model = resolve(source, store_path)
    if model.adapters:
        console.warn(f"The adapter layers of {source!r} are left out: only its weights are quantized.")
    request = FitRequest(
        limit_bytes=wish.limit_bytes,
        text=built_in_text() if wish.text is None else read_text(wish.text),
        context=wish.context,
        max_passes=wish.max_passes or DEFAULT_PASSES,
        device=wish.device,
    )
    layer = model.installed.model_layer if model.installed is not None else None
    fit = fit_file(
        path, output, request, options, model_sha256=str(layer.digest).removeprefix("sha256:") if layer else "",
        overwrite=force, dry_run=dry_run, progress=console.progress, say=console.say,
    )  # fmt: skip
    for warning in fit.warnings:
        console.warn(warning)
    if wish.plot is not None and fit.points:
        write_plot(fit, f"{source} in {human_bytes(wish.limit_bytes)}", wish.plot, overwrite=force)
    return fit


def show_fit(console: Console, fit: Fit) -> None:
    """The tables for people."""
    kv = f"{human_bytes(fit.kv_bytes)} for the keys and values of {fit.context:,} tokens"
    room = human_bytes(max(0, fit.limit_bytes - fit.kv_bytes))
    console.line(f"{human_bytes(fit.limit_bytes)} wanted: {kv}, {room} for the weights. {_COMPUTE}")
    if fit.is_dry_run and not fit.chosen:
        plan = fit.plan
        console.line(
            f"Would measure {plan.groups} parts (the blocks in {plan.bands} bands) in {plan.passes_missing} runs of "
            f"the model over {plan.tokens_per_pass:,} tokens, then {plan.mixes} whole mixes."
        )
        console.line(
            f"The smallest mix has {human_bytes(plan.smallest_bytes)}, the source {human_bytes(plan.source_bytes)}. "
            "Nothing was changed."
        )
        return
    if fit.choices:
        _show_choices(console, fit)
    if fit.points:
        console.line()
        console.table(
            ("MIX", "FILE", "KL (NATS)", ""),
            [
                (point.name, human_bytes(point.size_bytes), f"{point.kl:.5f}", _mark(fit, point.name, point.fits))
                for point in fit.points
            ],
            right=("FILE", "KL (NATS)"),
        )
    if fit.is_dry_run and fit.predicted_kl is not None:
        console.line(f"Its parts add up to {fit.predicted_kl:.5f} nats. Nothing was changed.")


def _show_choices(console: Console, fit: Fit) -> None:
    """What the found mix gives to which part, the costliest parts first where there are too many to show."""
    shown = fit.choices
    if len(shown) > _SHOWN_GROUPS:
        costly = sorted(shown, key=lambda choice: choice.kl, reverse=True)[:_SHOWN_GROUPS]
        shown = tuple(choice for choice in shown if choice in costly)
    console.table(
        ("PART", "TYPE", "SIZE", "KL ALONE"),
        [(item.group, item.type, human_bytes(item.size_bytes), f"{item.kl:.6f}") for item in shown],
        right=("SIZE", "KL ALONE"),
    )
    if len(shown) < len(fit.choices):
        console.line(f"... and {len(fit.choices) - len(shown)} that cost less (all of them with --json).")


def _mark(fit: Fit, name: str, fits: bool) -> str:
    if name == fit.chosen:
        return "taken"
    return "" if fits else "too large"
