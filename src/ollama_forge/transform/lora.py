"""Merging adapters: W' = W + the sum of weight * scale * B A, in float32, for whatever holds the base's weights.

In: adapters that fit a base, and where the tensors of the base lie. Out: one `TensorEdit` for each tensor that changes.
Adapters that carry more than pairs (trained norms, biases, heads, DoRA) are merged where that is exact and refused by
name where it is not. DoRA: https://arxiv.org/abs/2402.09353, as PEFT computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ollama_forge.errors import AdapterError
from ollama_forge.transform.edits import Floats, RowChange, TensorEdit
from ollama_forge.weights.adapter_fit import FittedAdapter, FittedPair, FittedReplacement


@dataclass(frozen=True, eq=False)
class WeightedAdapter:
    """An adapter that fits, and how strongly it is wanted (1.0: as trained)."""

    fitted: FittedAdapter
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class _Product:
    """scale * left @ right, added to some rows: left [n_rows, rank], right [rank, columns]."""

    first_row: int
    n_rows: int
    left: Callable[[], Floats]
    right: Callable[[], Floats]
    scale: float
    magnitude: Callable[[], Floats] | None = None


@dataclass(frozen=True, eq=False)
class _Whole:
    """Numbers that take the place of some rows: [n_rows, columns]."""

    first_row: int
    n_rows: int
    values: Callable[[], Floats]


@dataclass(frozen=True, eq=False)
class _Sum:
    """scale * values, added to a vector."""

    values: Callable[[], Floats]
    scale: float


@dataclass(eq=False)
class _Changes:
    """All that happens to one tensor."""

    wholes: list[_Whole] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)
    sums: list[_Sum] = field(default_factory=list)
    owners: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Spot:
    """Where a tensor of the base lies in the file that holds it.

    Attributes:
        name: as the file spells it.
        first_row: of the matrix, in a stack.
        n_rows: of the matrix as it is stored.
        is_transposed: it is stored [inputs, outputs].
    """

    name: str
    first_row: int
    n_rows: int
    is_transposed: bool = False


class Locator(Protocol):
    """Finds the spot of a tensor by its GGUF name and expert; and moves numbers from GGUF's order to the file's own."""

    def find(self, gguf_name: str, expert: int | None) -> Spot | None:
        """None when the file has no such tensor."""

    def as_stored(self, values: Floats, gguf_name: str) -> Floats:
        """Rows, a vector or a whole tensor in GGUF's order, in the order of the file; axis 0 are the rows."""


def plan_merge(adapters: Sequence[WeightedAdapter], locator: Locator) -> list[TensorEdit]:
    """One edit for each tensor that changes.

    Raises:
        AdapterError: something that cannot be merged exactly; it is named.
    """
    changes: dict[str, _Changes] = {}
    for number, adapter in enumerate(adapters):
        _require_mergeable(adapter)
        for replacement in adapter.fitted.replacements:
            _add_whole(changes, replacement, locator, number)
        for pair in adapter.fitted.pairs:
            _add_pair(changes, pair, adapter.weight, locator, number)
    for name, change in changes.items():
        _require_exact(name, change)
    if not changes:
        raise AdapterError("The adapter changes nothing", why="It holds no pair.", next="Train it again.")
    return [TensorEdit(name, _opener(change), _inputs(change)) for name, change in changes.items()]


def _require_mergeable(adapter: WeightedAdapter) -> None:
    fitted = adapter.fitted
    if fitted.adapter.invocation_tokens:
        raise AdapterError(
            f"{str(fitted.adapter.path)!r} is active only behind certain tokens (aLoRA)",
            why="Merged weights are active always.",
            next="Land it as an adapter layer instead: ollama-forge retrain without --merge",
        )
    if adapter.weight != 1.0:
        extra = _first_extra(fitted)
        if extra is not None:
            raise AdapterError(
                f"The adapter's tensor {extra!r} cannot be merged with the weight {adapter.weight:g}",
                why="It takes the place of the base's own numbers, or scales them; there is no half of that.",
                next="Merge this adapter with the weight 1.",
            )


def _first_extra(fitted: FittedAdapter) -> str | None:
    for replacement in fitted.replacements:
        return replacement.replacement.tensor.name
    return next((pair.pair.magnitude.name for pair in fitted.pairs if pair.pair.magnitude is not None), None)


def _add_whole(changes: dict[str, _Changes], item: FittedReplacement, locator: Locator, number: int) -> None:
    tensor = item.replacement.tensor
    spot = _found(locator.find(item.gguf_name, item.home.expert), tensor.name, item.gguf_name)

    def values() -> Floats:
        stored = locator.as_stored(item.read(), item.gguf_name)
        return np.ascontiguousarray(stored.reshape(spot.n_rows, -1))

    change = changes.setdefault(spot.name, _Changes())
    change.wholes.append(_Whole(spot.first_row, spot.n_rows, values))
    change.owners.add(number)


def _add_pair(changes: dict[str, _Changes], pair: FittedPair, weight: float, locator: Locator, number: int) -> None:
    spot = _found(locator.find(pair.gguf_name, pair.home.expert), pair.pair.b.name, pair.gguf_name)
    scale = weight * pair.pair.scale

    def outputs() -> Floats:
        return locator.as_stored(pair.read_b(), pair.gguf_name)

    def magnitude() -> Floats:
        values = pair.read_magnitude()
        assert values is not None
        return locator.as_stored(values, pair.gguf_name)

    if spot.is_transposed:
        if pair.pair.magnitude is not None:
            raise AdapterError(
                f"The adapter's tensor {pair.pair.magnitude.name!r} cannot be merged into a folder of this family",
                why="DoRA scales outputs, and this family stores its matrices by inputs.",
                next="Convert the base to GGUF first, and merge into that.",
            )
        product = _Product(
            spot.first_row, spot.n_rows, lambda: _swapped(pair.read_a()), lambda: _swapped(outputs()), scale
        )
    else:
        rescaled = None if pair.pair.magnitude is None else magnitude
        product = _Product(spot.first_row, spot.n_rows, outputs, pair.read_a, scale, rescaled)
    change = changes.setdefault(spot.name, _Changes())
    change.products.append(product)
    change.owners.add(number)
    if pair.pair.bias is not None:
        _add_bias(changes, pair, scale, locator, number)


def _add_bias(changes: dict[str, _Changes], pair: FittedPair, scale: float, locator: Locator, number: int) -> None:
    bias = pair.pair.bias
    assert bias is not None
    name = pair.gguf_name.removesuffix("weight") + "bias"
    spot = locator.find(name, None)
    if spot is None:
        raise AdapterError(
            f"The adapter's tensor {bias.name!r} adds to a bias that the base does not have",
            why=f"There is no {name!r} in it, and adding one would make another kind of model.",
            next="Train again with lora_bias off.",
        )

    def values() -> Floats:
        added = pair.read_bias()
        assert added is not None
        return locator.as_stored(added, name)

    change = changes.setdefault(spot.name, _Changes())
    change.sums.append(_Sum(values, scale))
    change.owners.add(number)


def _found(spot: Spot | None, tensor_name: str, gguf_name: str) -> Spot:
    if spot is None:
        raise AdapterError(
            f"The adapter's tensor {tensor_name!r} changes {gguf_name!r}, which the base does not have",
            why="The base uses its token embedding as output head too (tied)."
            if gguf_name == "output.weight"
            else "It was made for another model.",
            next="Merge into GGUF with --untie to give it a head of its own."
            if gguf_name == "output.weight"
            else "Use the base model that the adapter was trained on.",
        )
    return spot


def _require_exact(name: str, change: _Changes) -> None:
    is_dora = any(product.magnitude is not None for product in change.products)
    if (is_dora or change.wholes) and len(change.owners) > 1:
        raise AdapterError(
            f"Two adapters change {name!r}, and one of them replaces or rescales it",
            why="The result would depend on their order.",
            next="Merge them one after the other, the replacing one first.",
        )


def _inputs(change: _Changes) -> Callable[[], Floats] | None:
    """The rows of every right factor: outside of what they span the change does nothing."""
    if change.wholes or change.sums or not change.products or len({p.first_row for p in change.products}) > 1:
        return None
    if any(product.magnitude is not None for product in change.products):
        return None
    products = tuple(change.products)
    return lambda: np.concatenate([product.right() for product in products])


def _opener(change: _Changes) -> Callable[[], RowChange]:
    return lambda: _OpenChange(change)


class _OpenChange:
    """The change of one tensor with its factors in memory, one matrix of a stack at a time."""

    def __init__(self, change: _Changes) -> None:
        self._change = change
        self._loaded: dict[int, tuple[Floats, Floats, Floats | None]] = {}
        self._wholes: dict[int, Floats] = {}

    def __call__(self, first: int, rows: Floats) -> Floats:
        result = rows.copy()
        last = first + len(rows)
        for number, whole in enumerate(self._change.wholes):
            start, stop = max(first, whole.first_row), min(last, whole.first_row + whole.n_rows)
            if start >= stop:
                self._wholes.pop(number, None)
                continue
            if number not in self._wholes:
                self._wholes[number] = whole.values()
            values = self._wholes[number][start - whole.first_row : stop - whole.first_row]
            result[start - first : stop - first] = values
        for number, product in enumerate(self._change.products):
            start, stop = max(first, product.first_row), min(last, product.first_row + product.n_rows)
            if start >= stop:
                self._loaded.pop(number, None)
                continue
            self._multiply(number, product, result[start - first : stop - first], start - product.first_row)
        for added in self._change.sums:
            result += np.float32(added.scale) * added.values().reshape(result.shape)
        return result

    def _multiply(self, number: int, product: _Product, rows: Floats, first: int) -> None:
        """Add the product to `rows`, which are rows `first`, ... of the matrix."""
        if number not in self._loaded:
            self._loaded[number] = (product.left(), product.right(), product.magnitude and product.magnitude())
        left, right, magnitude = self._loaded[number]
        part = slice(first, first + len(rows))
        # PEFT's order: the product first, then the scale.
        rows += np.float32(product.scale) * (left[part] @ right)
        if magnitude is not None:
            lengths = np.linalg.norm(rows, axis=1)
            rows *= (magnitude[part] / np.where(lengths > 0, lengths, 1)).astype(np.float32)[:, None]


def _swapped(values: Floats) -> Floats:
    return np.ascontiguousarray(values.T)
