"""What in a model matters how much, and what to keep of it: measured numbers in, a `Cut` out.

In: an `Importance` (measured by `train.block_influence`) and how much should stay. Out: the layers, channels, heads and
experts that stay. Pure and deterministic: equal numbers are decided by the lower index.

Layers: the block influence of ShortGPT (https://arxiv.org/abs/2403.03853) and the angular distance over neighbouring
layers of Gromov et al. (https://arxiv.org/abs/2403.17887). Channels and heads: by activations, as Minitron does
(https://arxiv.org/abs/2407.14679), times the weights that they meet. Experts: REAP (https://arxiv.org/abs/2510.13999).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import UsageError
from ollama_forge.transform.cut import Cut, Indices, ModelSizes, require_kinds

Reals = NDArray[np.float64]

METHODS = ("distance", "influence")
"""How layers are chosen: neighbouring ones over which the residual stream turns least, or each by itself."""

PARTS = ("ffn", "kv_heads", "hidden", "experts")
"""What is measured and cut inside of layers; those of `COUNTED` are few enough to be told one by one."""

COUNTED = ("kv_heads", "experts")

DEFAULT_METHOD = "influence"
"""It can choose layers that are not neighbours, such as those that a model learnt to do without; in models that were
trained plainly neither method is better in general."""


@dataclass(frozen=True, eq=False)
class Importance:
    """What one pass over a text measured.

    Attributes:
        n_tokens: read.
        distance: [layers + 1, layers + 1]; the mean angle, in half turns (0 to 1), between the residual stream before
            layer a and before layer b. Row and column `layers` stand for the end.
        influence: [layers]; 1 - the mean cosine between what enters a layer and what leaves it.
        ffn: [layers, channels]; root mean square of a channel's share in what the feed-forward part writes.
        kv_heads: [layers, key-value heads]; the same for the heads that share one.
        hidden: [channels]; share in what the matrices that read the stream make of it, summed over these matrices.
        experts: [layers, experts]; mean of gate * |output| over the tokens that an expert got.
    """

    n_tokens: int
    distance: Reals = field(repr=False)
    influence: Reals
    ffn: Reals | None = field(default=None, repr=False)
    kv_heads: Reals | None = field(default=None, repr=False)
    hidden: Reals | None = field(default=None, repr=False)
    experts: Reals | None = field(default=None, repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.influence)


@dataclass(frozen=True)
class Target:
    """How much should stay: numbers of layers, channels, key-value heads and experts; None: all."""

    n_layers: int | None = None
    ffn: int | None = None
    n_kv_heads: int | None = None
    hidden: int | None = None
    n_experts: int | None = None

    @property
    def parts(self) -> frozenset[str]:
        """What must be measured for it, beside the layers."""
        wanted = {"ffn": self.ffn, "kv_heads": self.n_kv_heads, "hidden": self.hidden, "experts": self.n_experts}
        return frozenset(name for name, number in wanted.items() if number is not None)


@dataclass(frozen=True, eq=False)
class KeptPart:
    """What stays of one kind of parts, and how much they mattered.

    Attributes:
        name: `ffn`, `kv_heads`, `hidden` or `experts`.
        layers: the layers that the rows stand for; empty where one choice holds for all (`hidden`).
        importance: [rows, all].
        kept: [rows, kept]; ascending indices.
    """

    name: str
    layers: tuple[int, ...]
    importance: Reals = field(repr=False)
    kept: Indices = field(repr=False)

    @property
    def n_all(self) -> int:
        return int(self.importance.shape[1])

    @property
    def n_kept(self) -> int:
        return int(self.kept.shape[1])

    @property
    def shares(self) -> tuple[float, ...]:
        """Of each row's importance, what stays."""
        stays = np.take_along_axis(self.importance, self.kept, axis=1).sum(axis=1)
        return tuple((stays / np.maximum(self.importance.sum(axis=1), 1e-300)).tolist())


def kept_parts(importance: Importance, cut: Cut) -> tuple[KeptPart, ...]:
    """What a cut keeps of all that was measured beside the layers; layers that go are not counted."""
    layers = range(importance.n_layers) if cut.layers is None else cut.layers.tolist()
    parts = []
    for name in PARTS:
        values, kept = getattr(importance, name), getattr(cut, name)
        if values is None or kept is None:
            continue
        if name == "hidden":
            parts.append(KeptPart(name, (), values[None], kept[None]))
        else:
            rows = np.array(layers, dtype=np.int64)
            parts.append(KeptPart(name, tuple(layers), values[rows], kept[rows]))
    return tuple(parts)


def choose_cut(importance: Importance, sizes: ModelSizes, target: Target, method: str = DEFAULT_METHOD) -> Cut:
    """Keep what matters most.

    Args:
        importance: with what `target.parts` asks for.
        method: for layers, one of `METHODS`.

    Raises:
        UsageError: an unknown method, or a number of layers that this family cannot be cut to.
    """
    layers = None
    if target.n_layers is not None and target.n_layers != sizes.n_layers:
        layers = choose_layers(importance, target.n_layers, method, sizes.period)
        require_kinds(sizes, layers)
    hidden = None
    if target.hidden is not None and importance.hidden is not None:
        hidden = _best(importance.hidden[None], target.hidden)[0]
    return Cut(
        layers=layers,
        ffn=_best_of_each(importance.ffn, target.ffn),
        kv_heads=_best_of_each(importance.kv_heads, target.n_kv_heads),
        hidden=hidden,
        experts=_best_of_each(importance.experts, target.n_experts),
    )


def choose_layers(importance: Importance, n_kept: int, method: str = DEFAULT_METHOD, period: int = 1) -> Indices:
    """The layers that stay, ascending.

    Args:
        period: where layers of several kinds take turns, only neighbouring layers in multiples of this go.

    Raises:
        UsageError: an unknown method, or a number that is no multiple of the period.
    """
    n_layers = importance.n_layers
    n_dropped = n_layers - n_kept
    if method not in METHODS:
        raise UsageError(f"Layers cannot be chosen by {method!r}", next=f"One of: --by {' or --by '.join(METHODS)}")
    if n_dropped % period:
        nearest = n_layers - max(1, round(n_dropped / period)) * period
        raise UsageError(
            f"{n_kept} of {n_layers} layers cannot be kept in this family",
            why=f"Kinds of layers take turns every {period}, so they go in multiples of {period}.",
            next=f"Keep {nearest}: --layers {nearest}" if nearest > 0 else "Cut its width: --width ffn=70%",
        )
    if method == "influence" and period == 1:
        return _best(importance.influence[None], n_kept)[0]
    if not n_dropped:
        return np.arange(n_layers, dtype=np.int64)
    spans = [importance.distance[first, first + n_dropped] for first in range(n_kept + 1)]
    first = int(np.argmin(spans))
    result: Indices = np.delete(np.arange(n_layers, dtype=np.int64), np.arange(first, first + n_dropped))
    return result


def random_layers(n_layers: int, n_kept: int, seed: int) -> Indices:
    """Layers chosen by chance, what every method must beat."""
    chosen = np.random.default_rng(seed).choice(n_layers, n_kept, replace=False)
    result: Indices = np.sort(chosen).astype(np.int64)
    return result


def first_indices(sizes: ModelSizes, target: Target) -> Cut:
    """A cut of the wanted sizes that looks at no importance: enough to know how large the result will be."""

    def first(count: int | None, per_layer: bool = True) -> Indices | None:
        if count is None:
            return None
        row = np.arange(count, dtype=np.int64)
        return np.tile(row, (sizes.n_layers, 1)) if per_layer else row

    layers = None if target.n_layers in (None, sizes.n_layers) else first(target.n_layers, per_layer=False)
    return Cut(
        layers=layers,
        ffn=first(target.ffn),
        kv_heads=first(target.n_kv_heads),
        hidden=first(target.hidden, per_layer=False),
        experts=first(target.n_experts),
    )


def dropped_layers(n_layers: int, kept: Sequence[int] | Indices | None) -> list[int]:
    """The layers that go."""
    return [] if kept is None else sorted(set(range(n_layers)) - {int(layer) for layer in kept})


def render_layers(layers: Sequence[int]) -> str:
    """`[3, 4, 5, 9]` -> `3-5, 9`."""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1].append(layer)
        else:
            spans.append([layer])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def ranking_document(importance: Importance, dropped: Sequence[int], parts: Sequence[KeptPart] = ()) -> dict[str, Any]:
    """The JSON form of what was measured and what stays; of channels only how they are spread, not each."""
    cut = {part.name: _part_document(part) for part in parts}
    n_layers = importance.n_layers
    return {
        "tokens": importance.n_tokens,
        "layers": [
            {
                "layer": layer,
                "influence": float(importance.influence[layer]),
                "distance": float(importance.distance[layer, layer + 1]),
                "kept": layer not in dropped,
            }
            for layer in range(n_layers)
        ],
        "spans": _spans(importance, len(dropped)),
        **{
            name: {**_spread(values), **cut.get(name, {})}
            for name in PARTS
            if (values := getattr(importance, name)) is not None
        },
    }


def _spans(importance: Importance, n_dropped: int) -> list[dict[str, float]]:
    """The angle over each group of so many neighbouring layers."""
    if not n_dropped:
        return []
    return [
        {
            "first": first,
            "last": first + n_dropped - 1,
            "distance": float(importance.distance[first, first + n_dropped]),
        }
        for first in range(importance.n_layers - n_dropped + 1)
    ]


def _spread(values: Reals) -> dict[str, float]:
    quantiles = np.quantile(values, [0.0, 0.1, 0.5, 0.9, 1.0])
    return dict(zip(("least", "p10", "median", "p90", "most"), map(float, quantiles), strict=True))


def _part_document(part: KeptPart) -> dict[str, Any]:
    document: dict[str, Any] = {"count": part.n_all, "kept": part.n_kept}
    if not part.layers:
        return {**document, "kept_share": part.shares[0]}
    rows: list[dict[str, Any]] = []
    for layer, share, values, kept in zip(part.layers, part.shares, part.importance, part.kept, strict=True):
        rows.append({"layer": layer, "kept_share": share})
        if part.name in COUNTED:
            rows[-1] |= {"kept": kept.tolist(), "importance": values.tolist()}
    return {**document, "layers": rows}


def _best_of_each(values: Reals | None, count: int | None) -> Indices | None:
    return None if values is None or count is None else _best(values, count)


def _best(values: Reals, count: int) -> Indices:
    """[rows, n] -> the indices of the `count` largest of each row, ascending; of equal ones the first."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    result: Indices = np.sort(order, axis=1).astype(np.int64)
    return result
