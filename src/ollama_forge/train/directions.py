"""The direction in which a model's states differ between two sets of prompts, for each layer.

In: a packed model and both sets as token ids. Out: a `DirectionReport`: the directions, and for each layer what speaks
for it. The state is what a layer hands on at a token near the end of the prompt, where the answer is about to begin
(Arditi et al. 2024, https://arxiv.org/abs/2406.11717, section 2.3: the difference of the two means). No logits are
computed. Sums run in float64; of the states themselves only those at the wanted tokens of so many prompts are kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ollama_forge.errors import UsageError
from ollama_forge.train.direction_options import DirectionOptions
from ollama_forge.train.hidden_states import Ids, States, gather_states
from ollama_forge.train.load import PackedModel
from ollama_forge.transform.directions import Directions

DEEPEST_SHARE = 0.8
"""Layers beyond this share of the depth are not chosen by themselves: there a direction is about the next word."""
_ABOUT_EQUAL = 0.02
_MEDIAN_STEPS = 100
_ZERO = 1e-6


@dataclass(frozen=True)
class LayerEvidence:
    """What speaks for the direction of a layer.

    Attributes:
        means_cosine: between the mean states of the two sets.
        best_cosine: between this layer's direction and the chosen one.
        harmful_norm, harmless_norm, gap: lengths of the means and of their difference.
        silhouette: how well the two sets are apart, -1 to 1, by cosine distance around their common mean.
        is_candidate: it could have been chosen.
    """

    layer: int
    means_cosine: float
    best_cosine: float
    harmful_norm: float
    harmless_norm: float
    gap: float
    silhouette: float
    is_candidate: bool

    def document(self) -> dict[str, float | int | bool]:
        """The JSON form."""
        return {
            "layer": self.layer,
            "means_cosine": self.means_cosine,
            "best_cosine": self.best_cosine,
            "harmful_norm": self.harmful_norm,
            "harmless_norm": self.harmless_norm,
            "gap": self.gap,
            "silhouette": self.silhouette,
            "candidate": self.is_candidate,
        }


@dataclass(frozen=True, eq=False)
class DirectionReport:
    """The directions and the evidence, layer by layer. `position` is the token that was chosen."""

    directions: Directions
    layers: tuple[LayerEvidence, ...]
    position: int
    n_harmful: int
    n_harmless: int
    n_tokens: int
    seconds: float

    @property
    def best(self) -> LayerEvidence:
        """The evidence for the chosen layer."""
        return self.layers[self.directions.best_layer]


def compute_directions(
    packed: PackedModel,
    harmful_rows: Sequence[Ids],
    harmless_rows: Sequence[Ids],
    options: DirectionOptions | None = None,
    advance: Callable[[int], None] | None = None,
) -> DirectionReport:
    """Run all prompts through the layers once and compare.

    Args:
        advance: told of the tokens that were read.

    Raises:
        UsageError: options that mean nothing, a layer that is not there, or two sets that leave the same states.
        TrainingError: a prompt without tokens or shorter than a position, or states that are not finite.
    """
    options = options or DirectionOptions()
    options.validate()
    began = time.monotonic()
    n_layers = packed.model.config.get_text_config().num_hidden_layers
    candidates = _candidates(n_layers, options.layers)
    keep_all = options.method == "median" or options.n_directions > 1
    harmful = gather_states(packed, harmful_rows, options.positions, keep_all=keep_all, advance=advance)
    harmless = gather_states(packed, harmless_rows, options.positions, keep_all=keep_all, advance=advance)
    silhouettes = np.array(
        [
            [silhouette(harmful.at(place, layer), harmless.at(place, layer)) for layer in range(n_layers)]
            for place in range(len(options.positions))
        ]
    )
    place, best = _choose(silhouettes, candidates)
    centres = [_centres(states, place, options.method) for states in (harmful, harmless)]
    vectors = np.stack([_directions(harmful, harmless, place, layer, centres, options) for layer in range(n_layers)])
    if not np.any(vectors[best]):
        raise UsageError(
            f"Both sets of prompts leave the same state at layer {best}",
            why="So nothing tells them apart there.",
            next="Use prompts that differ in what you want to find.",
        )
    facts = {
        "method": options.method,
        "position": str(options.positions[place]),
        "projected": "yes" if options.projected else "no",
        "harmful_prompts": str(len(harmful_rows)),
        "harmless_prompts": str(len(harmless_rows)),
        "architecture": packed.family.gguf_architecture,
    }
    means = centres[1].astype(np.float32)
    directions = Directions(vectors.astype(np.float32), best, options.per_layer, means, facts)
    layers = tuple(
        _evidence(layer, centres, vectors, best, silhouettes[place], candidates) for layer in range(n_layers)
    )
    n_tokens = sum(len(row) for row in (*harmful_rows, *harmless_rows))
    return DirectionReport(
        directions,
        layers,
        options.positions[place],
        len(harmful_rows),
        len(harmless_rows),
        n_tokens,
        time.monotonic() - began,
    )


# --- directions -------------------------------------------------------------------------------------------------------

Array = np.ndarray[Any, np.dtype[np.float64]]


def silhouette(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean silhouette of two sets of states [n, width]: (distance to the other set - to its own) / the larger of both.

    Distances are 1 - cosine around the mean of both sets' means, so that neither one large coordinate nor the length of
    a state decides.
    """
    if len(first) < 2 or len(second) < 2:
        return 0.0
    middle = (first.mean(dim=0) + second.mean(dim=0)) / 2
    states = torch.nn.functional.normalize(torch.cat([first, second]) - middle, dim=1, eps=_ZERO)
    distance = 1 - states @ states.t()
    own_first = torch.arange(len(states)) < len(first)
    n_first, n_second = len(first), len(second)
    to_first, to_second = distance[:, own_first].sum(dim=1), distance[:, ~own_first].sum(dim=1)
    within = torch.where(own_first, to_first / (n_first - 1), to_second / (n_second - 1))
    between = torch.where(own_first, to_second / n_second, to_first / n_first)
    larger = torch.maximum(within, between).clamp_min(_ZERO)
    return float(((between - within) / larger).mean())


def geometric_median(states: torch.Tensor) -> Array:
    """The point with the smallest sum of distances to the states [n, width], float64 [width]: Weiszfeld's iteration."""
    points = states.double()
    middle = points.mean(dim=0)
    for _ in range(_MEDIAN_STEPS):
        weights = 1 / torch.linalg.vector_norm(points - middle, dim=1).clamp_min(_ZERO)
        following = (weights[:, None] * points).sum(dim=0) / weights.sum()
        moved = float(torch.linalg.vector_norm(following - middle))
        middle = following
        if moved < 1e-7 * float(torch.linalg.vector_norm(middle)):
            break
    result: Array = middle.numpy()
    return result


def _centres(states: States, place: int, method: str) -> Array:
    """The middle of the set at each layer: float64 [layers, width]."""
    if method == "mean":
        return states.means[place]
    return np.stack([geometric_median(states.at(place, layer)) for layer in range(states.kept.shape[2])])


def _directions(
    harmful: States, harmless: States, place: int, layer: int, centres: Sequence[Array], options: DirectionOptions
) -> Array:
    """Unit rows [n_directions, width]; zero where there is nothing."""
    gap = centres[0][layer] - centres[1][layer]
    rows = [gap]
    if options.n_directions > 1:
        rows += _beside(harmful.at(place, layer), harmless.at(place, layer), gap, options.n_directions - 1)
    result = np.zeros((options.n_directions, len(gap)))
    for number, row in enumerate(rows):
        if options.projected:
            along = _unit(centres[1][layer])
            row = row - (row @ along) * along
        result[number] = _unit(row)
    return result


def _beside(harmful: torch.Tensor, harmless: torch.Tensor, gap: Array, count: int) -> list[Array]:
    """The strongest directions in which pairs differ, at right angles to `gap`."""
    n_pairs = min(len(harmful), len(harmless))
    pairs = harmful[:n_pairs].double() - harmless[:n_pairs].double()
    along = torch.from_numpy(_unit(gap))
    pairs = pairs - (pairs @ along)[:, None] * along
    _, sizes, directions = torch.linalg.svd(pairs, full_matrices=False)
    if len(sizes) < count or float(sizes[count - 1]) < _ZERO:
        raise UsageError(
            f"{n_pairs} pairs of prompts do not give {count + 1} directions",
            why="Each direction needs pairs that differ in it.",
            next="Ask for fewer with --num-directions, or use more prompts.",
        )
    means = (pairs @ directions[:count].t()).mean(dim=0)
    # The sign of a singular vector means nothing; towards the harmful prompts is the one that repeats.
    return [(-row if mean < 0 else row).numpy() for row, mean in zip(directions[:count], means, strict=True)]


def _candidates(n_layers: int, wanted: Sequence[int]) -> tuple[int, ...]:
    for layer in wanted:
        if not 0 <= layer < n_layers:
            raise UsageError(
                f"There is no layer {layer}",
                why=f"The model has layers 0 to {n_layers - 1}.",
                next="Leave the layers out: the one with the clearest separation is chosen.",
            )
    return tuple(sorted(set(wanted))) or tuple(range(max(1, math.ceil(DEEPEST_SHARE * n_layers))))


def _choose(silhouettes: Array, candidates: Sequence[int]) -> tuple[int, int]:
    """(position, layer) with the clearest separation; of about equal ones the position named first, the first layer."""
    among = silhouettes[:, list(candidates)]
    places, layers = np.nonzero(among >= among.max() - _ABOUT_EQUAL)
    return int(places[0]), int(candidates[int(layers[0])])


def _evidence(
    layer: int,
    centres: Sequence[Array],
    vectors: Array,
    best: int,
    silhouettes: Array,
    candidates: Sequence[int],
) -> LayerEvidence:
    harmful, harmless = centres[0][layer], centres[1][layer]
    return LayerEvidence(
        layer=layer,
        means_cosine=float(_unit(harmful) @ _unit(harmless)),
        best_cosine=float(vectors[layer, 0] @ vectors[best, 0]),
        harmful_norm=float(np.linalg.norm(harmful)),
        harmless_norm=float(np.linalg.norm(harmless)),
        gap=float(np.linalg.norm(harmful - harmless)),
        silhouette=float(silhouettes[layer]),
        is_candidate=layer in candidates,
    )


def _unit(row: Array) -> Array:
    length = float(np.linalg.norm(row))
    return row / length if length > _ZERO else np.zeros_like(row)
