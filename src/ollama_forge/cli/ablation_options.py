"""How strongly, where and along what a model is ablated, as options that `apply`, `run` and `optimize` share."""

from __future__ import annotations

import functools
from typing import Any

import click

from ollama_forge.cli.options import Command, FiniteRange

KERNELS = ("constant", "linear_peak", "gaussian")


def ablation_options(function: Command) -> Command:
    """All of them; the command receives `ablation`, an `AblationOptions`."""
    at_least_0, number = click.IntRange(0), FiniteRange()
    declared = [
        click.option("--strength", type=number, default=1.0, show_default=True, help="1 takes out, 0 leaves, 2 turns."),
        click.option("--atten-strength", "--attention-strength", "attention", type=number, help="Of attention alone."),
        click.option("--mlp-strength", "mlp", type=number, help="Of the feed-forward parts alone."),
        click.option("--layer", type=number, metavar="L", help="Use this layer's direction everywhere; 3.5: between."),
        click.option(
            "--per-layer/--one-layer", "per_layer", default=None, help="Each layer its own (default: as the file says)."
        ),
        click.option("--num-directions", "n_directions", type=click.IntRange(1), help="The first N of the file's."),
        click.option("--direction-index", type=at_least_0, metavar="I", help="Only this one of them, from 0."),
        click.option(
            "--strength-kernel", "kernel", type=click.Choice(KERNELS), default="constant", show_default=True,
            help="How the strength runs over the layers.",
        ),
        click.option(
            "--kernel-center-frac", "kernel_center", type=number, default=0.5, show_default=True,
            help="Where it is strongest, as a share of the depth.",
        ),
        click.option(
            "--kernel-width-frac", "kernel_width", type=number, default=0.4, show_default=True,
            help="How wide it is, as a share of the depth.",
        ),
        click.option(
            "--skip-begin-layers", "skip_begin", type=at_least_0, default=0, show_default=True,
            help="Leave so many first layers, and the embedding.",
        ),
        click.option(
            "--skip-end-layers", "skip_end", type=at_least_0, default=0, show_default=True,
            help="Leave so many last layers.",
        ),
        click.option(
            "--norm-preserving/--no-norm-preserving", default=False, help="Rows keep their norm (default: no)."
        ),
        click.option("--projected", is_flag=True, help="Leave what lies along the mean harmless state."),
        click.option("--skip-embedding", is_flag=True, help="Leave the embedding (and a head that is tied to it)."),
    ]  # fmt: skip

    @functools.wraps(function)
    def wrapper(*args: Any, attention: float | None, mlp: float | None, skip_embedding: bool, **kwargs: Any) -> Any:
        from ollama_forge.transform.ablation import AblationOptions

        names = (
            *("strength", "layer", "per_layer", "n_directions", "direction_index", "kernel", "kernel_center"),
            *("kernel_width", "skip_begin", "skip_end", "norm_preserving", "projected"),
        )
        ablation = AblationOptions(
            attention_strength=attention,
            mlp_strength=mlp,
            embedding=not skip_embedding,
            **{name: kwargs.pop(name) for name in names},
        )
        ablation.validate()
        return function(*args, ablation=ablation, **kwargs)

    for option in reversed(declared):
        option(wrapper)
    return wrapper
