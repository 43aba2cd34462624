"""What a pruning is asked to do: options, and how they are refused or settled before any work.

In: options and an open checkpoint (headers only). Out: a `Target` in whole numbers, and with an `Importance` the `Cut`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ollama_forge.errors import UnsupportedError, UsageError
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.transform.cut import Cut, ModelSizes, read_sizes, validate_cut
from ollama_forge.transform.cut_request import Amount, largest_block, settle_layers, settle_width
from ollama_forge.transform.ranking import (
    DEFAULT_METHOD,
    Importance,
    Target,
    choose_cut,
    choose_layers,
    first_indices,
)
from ollama_forge.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class CalibrationOptions:
    """What is read.

    Attributes:
        text: a text file, or training data (`.jsonl`), which is rendered with the model's own template; None: the
            text of this package.
        n_tokens: read at most so many, evenly drawn from all of it.
        context: tokens that are read together.
        seed: which windows of a long text are drawn.
        device: `auto`, `cpu` or `cuda`.
    """

    text: Path | None = None
    n_tokens: int = 8192
    context: int = 512
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True)
class PruneOptions:
    """How much stays, and how it is chosen. One of the first four at least.

    Attributes:
        keep: share of the model's bytes, reached by cutting whole layers.
        n_layers: layers that stay.
        drop: these very layers go; nothing is measured for them.
        width: `ffn`, `heads`, `hidden`, `experts` -> how much of each stays; may be combined with layers.
        by: how layers are chosen, one of `ranking.METHODS`.
    """

    keep: float | None = None
    n_layers: int | None = None
    drop: tuple[int, ...] = ()
    width: Mapping[str, Amount] = field(default_factory=dict)
    by: str = DEFAULT_METHOD
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    n_threads: int | None = None


def require_prunable(model: ResolvedModel, options: PruneOptions) -> None:
    """Refuse what makes no sense whatever the model's sizes are.

    Raises:
        UnsupportedError: an adapter or a projector would no longer fit.
        UsageError: nothing is asked, or two things that contradict each other.
    """
    if model.adapters:
        raise UnsupportedError(
            f"{model.text!r} has an adapter, which fits the whole model only",
            why="It would change layers and channels that are gone.",
            next=f"Merge it first: ollama-forge merge {model.text} -o merged.gguf; then prune merged.gguf",
        )
    if model.projector is not None and "hidden" in options.width:
        raise UnsupportedError(
            f"The hidden channels of {model.text!r} cannot be cut: its projector feeds pictures into them",
            next="Cut something else: --layers N, or --width ffn=70%,heads=70%",
        )
    if options.keep is None and options.n_layers is None and not options.drop and not options.width:
        raise UsageError(
            "How much should stay?",
            why="Whole layers can go (--keep, --layers, --drop-layers), or channels, heads and experts (--width).",
            next=f"ollama-forge downsize prune {model.text} --keep 70% --dry-run",
        )
    if sum((options.keep is not None, options.n_layers is not None, bool(options.drop))) > 1:
        raise UsageError(
            "--keep, --layers and --drop-layers each say which layers stay",
            next="Give one of them; --width goes with each.",
        )


def settle_target(checkpoint: Checkpoint, options: PruneOptions) -> Target:
    """What is asked of this model in whole numbers; refused here when it cannot be met.

    Raises:
        UsageError, UnsupportedError: with what could be asked instead.
    """
    sizes = read_sizes(checkpoint)
    target = settle_width(options.width, sizes, largest_block(checkpoint))
    n_layers = options.n_layers
    if options.keep is not None:
        n_layers = settle_layers(options.keep, checkpoint, sizes)
    if options.drop:
        strangers = [layer for layer in options.drop if not 0 <= layer < sizes.n_layers]
        if strangers:
            raise UsageError(
                f"There is no layer {strangers[0]} in this model",
                why=f"Its layers are 0 to {sizes.n_layers - 1}.",
                next="Example: --drop-layers 8-10",
            )
        n_layers = sizes.n_layers - len(set(options.drop))
    target = Target(n_layers, target.ffn, target.n_kv_heads, target.hidden, target.n_experts)
    likely = first_indices(sizes, target)
    if options.drop:
        likely = choose(None, sizes, target, options, likely)
    elif likely.layers is not None and 0 < len(likely.layers) < sizes.n_layers:
        equal = Importance(0, np.zeros((sizes.n_layers + 1,) * 2), np.zeros(sizes.n_layers))
        kinds = choose_layers(equal, len(likely.layers), options.by, sizes.period)
        likely = Cut(kinds, likely.ffn, likely.kv_heads, likely.hidden, likely.experts)
    validate_cut(sizes, likely)
    return target


def choose(
    importance: Importance | None, sizes: ModelSizes, target: Target, options: PruneOptions, likely: Cut | None = None
) -> Cut:
    """What stays: by importance, and the layers that were named go. `likely` stands in where nothing is measured."""
    chosen = likely or Cut()
    if importance is not None:
        rest = Target(None, target.ffn, target.n_kv_heads, target.hidden, target.n_experts) if options.drop else target
        chosen = choose_cut(importance, sizes, rest, options.by)
    if not options.drop:
        return chosen
    kept = np.array(sorted(set(range(sizes.n_layers)) - set(options.drop)), dtype=np.int64)
    return Cut(kept, chosen.ffn, chosen.kv_heads, chosen.hidden, chosen.experts)
