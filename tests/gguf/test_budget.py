"""Mixes under a size, against trying out every combination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.gguf import budget
from ollama_forge.gguf.budget import Group, Option, find_front
from ollama_forge.gguf.types import GGMLType

TYPES = (GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0)


def group(name: str, *pairs: tuple[int, float]) -> Group:
    options = (Option(type, (type,), size_bytes, cost) for type, (size_bytes, cost) in zip(TYPES, pairs, strict=False))
    return Group(name, (name,), tuple(options))


def best_by_trying(groups: list[Group], size_bytes: int) -> float | None:
    costs = [
        sum(option.cost for option in options)
        for options in itertools.product(*(item.options for item in groups))
        if sum(option.size_bytes for option in options) <= size_bytes
    ]
    return min(costs, default=None)


PAIRS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 50).map(float)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(PAIRS, min_size=1, max_size=5), st.integers(0, 200))
def test_no_combination_beats_the_mix_that_is_found(pairs: list[list[tuple[int, float]]], size_bytes: int) -> None:
    groups = [group(str(number), *options) for number, options in enumerate(pairs)]
    mix = find_front(groups).best_within(size_bytes)
    best = best_by_trying(groups, size_bytes)
    assert (mix is None) == (best is None)
    if mix is not None and best is not None:
        assert mix.size_bytes <= size_bytes
        assert mix.cost == pytest.approx(best)
        assert mix.size_bytes == sum(option.size_bytes for option in mix.options)
        assert mix.cost == pytest.approx(sum(option.cost for option in mix.options))


def test_what_is_sensitive_gets_the_bits() -> None:
    groups = [group("touchy", (10, 5.0), (20, 1.0), (30, 0.0)), group("calm", (10, 0.05), (20, 0.01), (30, 0.0))]
    mix = find_front(groups).best_within(40)
    assert mix is not None
    assert mix.tensor_types == {"touchy": GGMLType.Q6_K, "calm": GGMLType.Q2_K}


def test_a_size_below_the_smallest_mix_gives_none_and_a_large_one_the_cheapest() -> None:
    front = find_front([group("a", (10, 1.0), (20, 0.0)), group("b", (5, 1.0), (9, 0.5))])
    assert front.best_within(14) is None
    cheapest = front.best_within(10**9)
    assert cheapest is not None
    assert cheapest.cost == 0.5


def test_the_front_falls_from_the_smallest_mix_to_the_cheapest() -> None:
    rng = np.random.default_rng(3)
    groups = [group(str(n), *((int(rng.integers(1, 99)), float(rng.random())) for _ in range(4))) for n in range(12)]
    front = find_front(groups)
    assert (np.diff(front.sizes) > 0).all()
    assert (np.diff(front.costs) < 0).all()
    for point in (0, len(front.sizes) // 2, len(front.sizes) - 1):
        mix = front.mix(point)
        assert mix.size_bytes == front.sizes[point] == sum(option.size_bytes for option in mix.options)


def test_a_large_model_loses_next_to_nothing_by_keeping_few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    groups = []
    for number in range(60):
        weight, touchy = int(rng.integers(10**5, 10**7)), float(rng.lognormal(0, 1.5))
        groups.append(group(str(number), *((weight * bits // 8, touchy * 4.0**-bits) for bits in (2, 4, 6, 8))))
    exact = find_front(groups)
    monkeypatch.setattr(budget, "MAX_POINTS", 128)
    coarse = find_front(groups)
    limit = int(exact.sizes[0] + exact.sizes[-1]) // 2
    fine_mix, coarse_mix = exact.best_within(limit), coarse.best_within(limit)
    assert fine_mix is not None and coarse_mix is not None
    assert coarse_mix.cost <= fine_mix.cost * 1.01
    assert coarse.sizes[0] == exact.sizes[0] == sum(item.smallest_bytes for item in groups)


def test_the_same_groups_give_the_same_mix() -> None:
    groups = [group(str(n), (10, 1.0), (20, 0.5), (20, 0.5)) for n in range(6)]
    first, second = (find_front(groups).best_within(90) for _ in range(2))
    assert first is not None and second is not None
    assert first.picks == second.picks
