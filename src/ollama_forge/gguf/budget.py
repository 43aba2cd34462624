"""Which types to give to the parts of a model so that they cost least and fit a size.

In: groups of tensors, each with options: a size in bytes and a cost (what the option takes from the model, measured
somewhere else). Out: the best mix for every size, as a front from which one can be picked. Costs are added up. Pure.

One option is taken from each group (a multiple-choice knapsack). The front is built group by group: all sums, without
those that another one beats in both size and cost. As long as it has at most `MAX_POINTS` points it is exact; beyond,
only the best point of each of `MAX_POINTS` equal stretches of size goes on. What that loses with hundreds of groups is
made good by the other way to such a mix: the steps that save most for their bytes, one after the other, as far as they
fit. Sizes are never rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ollama_forge.gguf.types import GGMLType

MAX_POINTS = 2048


@dataclass(frozen=True)
class Option:
    """One way to store a group.

    Attributes:
        type: the type that is wanted for it.
        types: what each of its tensors becomes; another type where a row does not divide into blocks of `type`.
        size_bytes: of all its tensors.
        cost: what it takes from the model, 0 or more.
        is_from_plain: its types are those that a plain mix gives these tensors, which may differ among them.
    """

    type: GGMLType
    types: tuple[GGMLType, ...]
    size_bytes: int
    cost: float = 0.0
    is_from_plain: bool = False


@dataclass(frozen=True)
class Group:
    """Tensors that get their types together; `options` from the smallest to the largest."""

    name: str
    tensors: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def smallest_bytes(self) -> int:
        return min(option.size_bytes for option in self.options)


@dataclass(frozen=True, eq=False)
class Mix:
    """One option for each group, in the order of the groups."""

    groups: tuple[Group, ...]
    picks: tuple[int, ...]
    size_bytes: int
    cost: float

    @property
    def options(self) -> tuple[Option, ...]:
        return tuple(group.options[pick] for group, pick in zip(self.groups, self.picks, strict=True))

    @property
    def tensor_types(self) -> dict[str, GGMLType]:
        """The type of every tensor of every group."""
        return {
            name: type
            for group, option in zip(self.groups, self.options, strict=True)
            for name, type in zip(group.tensors, option.types, strict=True)
        }


@dataclass(frozen=True, eq=False)
class Front:
    """Mixes of which none is beaten by another, the smallest and costliest first.

    Attributes:
        sizes: int64 [n_points], bytes, increasing.
        costs: float64 [n_points], decreasing.
    """

    groups: tuple[Group, ...]
    sizes: NDArray[np.int64]
    costs: NDArray[np.float64]
    _steps: tuple[tuple[NDArray[np.int32], NDArray[np.int16]], ...]

    def mix(self, point: int) -> Mix:
        """The mix at one point."""
        picks: list[int] = []
        at = point
        for previous, chosen in reversed(self._steps):
            picks.append(int(chosen[at]))
            at = int(previous[at])
        return Mix(self.groups, tuple(reversed(picks)), int(self.sizes[point]), float(self.costs[point]))

    def best_within(self, size_bytes: int) -> Mix | None:
        """The mix that costs least of those not larger than `size_bytes`; None when all are larger."""
        point = int(np.searchsorted(self.sizes, size_bytes, side="right")) - 1
        if point < 0:
            return None
        found = self.mix(point)
        stepped = _by_steps(self.groups, size_bytes)
        return stepped if stepped.cost < found.cost else found


def find_front(groups: Sequence[Group]) -> Front:
    """The best mixes of all sizes. Equal groups give equal fronts; of equal mixes the first options win."""
    sizes = np.zeros(1, np.int64)
    costs = np.zeros(1, np.float64)
    steps = []
    for group in groups:
        option_sizes = np.array([option.size_bytes for option in group.options], np.int64)
        option_costs = np.array([option.cost for option in group.options], np.float64)
        all_sizes = (sizes[:, None] + option_sizes).reshape(-1)
        all_costs = (costs[:, None] + option_costs).reshape(-1)
        kept = _undominated(all_sizes, all_costs)
        steps.append(((kept // len(option_sizes)).astype(np.int32), (kept % len(option_sizes)).astype(np.int16)))
        sizes, costs = all_sizes[kept], all_costs[kept]
    return Front(tuple(groups), sizes, costs, tuple(steps))


def _by_steps(groups: Sequence[Group], size_bytes: int) -> Mix:
    """From the smallest mix, the steps that save most for their bytes; the smallest mix must fit."""
    steps = []
    picks = []
    for number, group in enumerate(groups):
        hull = _hull(group)
        picks.append(hull[0])
        for before, after in itertools.pairwise(hull):
            steps.append((-_rate(group, before, after), number, before, after))
    left = size_bytes - sum(group.options[pick].size_bytes for group, pick in zip(groups, picks, strict=True))
    for _, number, before, after in sorted(steps):
        options = groups[number].options
        grows = options[after].size_bytes - options[before].size_bytes
        if picks[number] == before and grows <= left:
            picks[number] = after
            left -= grows
    chosen = [group.options[pick] for group, pick in zip(groups, picks, strict=True)]
    size = sum(option.size_bytes for option in chosen)
    return Mix(tuple(groups), tuple(picks), size, sum(option.cost for option in chosen))


def _hull(group: Group) -> list[int]:
    """Numbers of the options from the smallest to the cheapest, each step saving less for its bytes than the last."""
    hull: list[int] = []
    options = group.options
    for number in sorted(range(len(options)), key=lambda n: (options[n].size_bytes, options[n].cost)):
        if hull and options[number].cost >= options[hull[-1]].cost:
            continue
        while len(hull) > 1 and _rate(group, hull[-2], hull[-1]) <= _rate(group, hull[-1], number):
            hull.pop()
        hull.append(number)
    return hull


def _rate(group: Group, before: int, after: int) -> float:
    low, high = group.options[before], group.options[after]
    return (low.cost - high.cost) / (high.size_bytes - low.size_bytes)


def _undominated(sizes: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the points that no other one beats, by size; at most about `MAX_POINTS` of them."""
    order = np.lexsort((costs, sizes))
    ordered = costs[order]
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    kept = order[ordered < best_before]
    if len(kept) <= MAX_POINTS:
        return kept
    low, high = int(sizes[kept[0]]), int(sizes[kept[-1]])
    stretches = (sizes[kept] - low) * MAX_POINTS // (high - low + 1)
    # costs fall along the front: the last point of a stretch is its best; the smallest mix stays whatever it costs
    is_last = np.append(stretches[1:] != stretches[:-1], True)
    is_last[0] = True
    return kept[is_last]
