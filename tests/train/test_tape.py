"""What a tape keeps, and what it gives back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ollama_forge.gguf.types import GGMLType
from ollama_forge.train.blocks import PackedMatrix, Workspace
from ollama_forge.train.packed import multiply
from ollama_forge.train.tape import ProductKeeper, find_product, offer_product

WIDTH, N = 8, 3
PRODUCT_BYTES = 4 * N * WIDTH


def matrix(seed: int) -> PackedMatrix:
    numbers = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    return PackedMatrix(numbers.view(torch.uint8), GGMLType.F32, WIDTH)


def product(seed: int) -> torch.Tensor:
    return torch.randn(N, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def keeper() -> ProductKeeper:
    found = ProductKeeper()
    found.room_bytes = 10 * PRODUCT_BYTES
    return found


def ask(keeper: ProductKeeper, *matrices: PackedMatrix) -> None:
    """As a recomputation that finds nothing does."""
    with keeper.contexts()[1]:
        assert [find_product(one) for one in matrices] == [None] * len(matrices)


def test_a_product_that_was_asked_for_comes_back_once(keeper: ProductKeeper) -> None:
    one = matrix(1)
    ask(keeper, one)
    recording, replay = keeper.contexts()
    with recording:
        offer_product(one, product(1))
    with replay:
        found = find_product(one)
        assert found is not None and torch.equal(found, product(1))
        assert find_product(one) is None


def test_what_nobody_asked_for_is_not_kept(keeper: ProductKeeper) -> None:
    one, other = matrix(1), matrix(2)
    ask(keeper, one)
    before = keeper.room_bytes
    with keeper.contexts()[0]:
        offer_product(other, product(1))
    assert keeper.room_bytes == before
    assert keeper.is_asked(one) and not keeper.is_asked(other)


def test_no_more_is_kept_than_there_is_room(keeper: ProductKeeper) -> None:
    matrices = [matrix(seed) for seed in range(4)]
    ask(keeper, *matrices)
    keeper.room_bytes = 2 * PRODUCT_BYTES + 1
    recording, replay = keeper.contexts()
    with recording:
        for one in matrices:
            offer_product(one, product(0))
    assert keeper.room_bytes == 1
    with replay:
        assert [find_product(one) is not None for one in matrices] == [True, True, False, False]


def test_outside_of_recomputation_there_is_nothing(keeper: ProductKeeper) -> None:
    one = matrix(1)
    ask(keeper, one)
    offer_product(one, product(1))
    with keeper.contexts()[0]:
        offer_product(one, product(1))
        assert find_product(one) is None
    assert find_product(one) is None


def test_a_product_that_was_changed_afterwards_is_not_given_back(keeper: ProductKeeper) -> None:
    one, result = matrix(1), product(1)
    ask(keeper, one)
    recording, replay = keeper.contexts()
    with recording:
        offer_product(one, result)
        result += 1
    with replay:
        assert find_product(one) is None


def test_a_matrix_that_is_used_twice_gets_its_products_in_order(keeper: ProductKeeper) -> None:
    one = matrix(1)
    ask(keeper, one)
    keeper.room_bytes = PRODUCT_BYTES
    recording, replay = keeper.contexts()
    with recording:
        offer_product(one, torch.zeros(2 * N, WIDTH))  # too large for the room
        offer_product(one, product(2))
    with replay:
        assert find_product(one) is None
        found = find_product(one)
    assert found is not None and torch.equal(found, product(2))


def test_a_recomputation_that_stops_early_forgets_the_rest(keeper: ProductKeeper) -> None:
    one = matrix(1)
    ask(keeper, one)
    recording, replay = keeper.contexts()
    with recording:
        offer_product(one, product(1))
    with pytest.raises(RuntimeError), replay:
        raise RuntimeError("stopped")
    with replay:
        assert find_product(one) is None


class Run:
    """A block of two matrices, with recomputation."""

    def __init__(self, keeper: ProductKeeper) -> None:
        self.keeper = keeper
        self.matrices = (matrix(1), matrix(2))

    def block(self, x: torch.Tensor) -> torch.Tensor:
        workspace = Workspace()
        for one in self.matrices:
            x = multiply(x, one, workspace).square()
        return x

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.block, x, use_reentrant=False, context_fn=self.keeper.contexts).sum()
        return result


def gradient_of(run: Run, **options: bool) -> torch.Tensor:
    x = product(5).requires_grad_()
    loss = run.loss(x)
    loss.backward(**options)
    if options:
        loss.backward()
    assert x.grad is not None
    return x.grad


def test_backward_twice_through_one_pass_gives_the_sum(keeper: ProductKeeper) -> None:
    run = Run(keeper)
    expected = gradient_of(run)
    assert keeper.is_asked(run.matrices[1])
    assert torch.equal(gradient_of(run), expected)
    assert torch.equal(gradient_of(run, retain_graph=True), 2 * expected)


@pytest.mark.parametrize("goes_back", [True, False])
def test_what_is_kept_is_free_again(goes_back: bool, keeper: ProductKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(keeper)
    gradient_of(run)
    held: list[weakref.ref[torch.UntypedStorage]] = []
    take = type(keeper.contexts()[0]).take

    def watch(self: object, one: PackedMatrix, result: torch.Tensor) -> None:
        held.append(weakref.ref(result.untyped_storage()))
        take(self, one, result)  # type: ignore[arg-type]

    monkeypatch.setattr(type(keeper.contexts()[0]), "take", watch)
    before = keeper.room_bytes
    loss = run.loss(product(5).requires_grad_())
    assert keeper.room_bytes == before - 2 * PRODUCT_BYTES
    if goes_back:
        loss.backward()
    gc.disable()
    try:
        del loss
        assert len(held) == 2
        assert [one() for one in held] == [None, None], "a graph that holds itself would stay"
    finally:
        gc.enable()
