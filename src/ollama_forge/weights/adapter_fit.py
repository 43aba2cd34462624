"""Whether an adapter fits a base model, and where each of its tensors belongs.

In: an `Adapter` and a `LoraBase`. Out: a `FittedAdapter`, everything in it by GGUF name and with rows in GGUF's order;
or the misfits, each with the tensor's name. Nothing is dropped: a tensor that finds no home is a misfit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ollama_forge.arch import layout
from ollama_forge.arch.rows import Role, TensorAddress, TensorRow
from ollama_forge.errors import AdapterError, FormatError
from ollama_forge.weights.adapter import Adapter
from ollama_forge.weights.adapter_base import LoraBase
from ollama_forge.weights.adapter_parts import AdapterTensor, Floats, LoraPair, Replacement, ReplacementKind

_ENDS = (Role.TOKEN_EMBEDDING, Role.OUTPUT)


@dataclass(frozen=True)
class Misfit:
    """Why an adapter cannot be put on a base.

    Attributes:
        kind: `family`, `target` (no such tensor in the base) or `shape`.
        tensor: the adapter's tensor; empty for the whole adapter.
    """

    kind: str
    tensor: str
    what: str
    why: str

    def error(self, base: LoraBase) -> AdapterError:
        """The same as an error."""
        return AdapterError(
            self.what,
            why=self.why,
            next=f"Use the base model that the adapter was trained on; {base.name!r} is not it, or has been changed.",
        )


@dataclass(frozen=True, eq=False)
class Home:
    """The place of something in the base.

    Attributes:
        gguf_name: the base's tensor.
        expert: which matrix of a stack.
        row: its row in the family; None for a family that is not known.
        is_from_hf: rows of the adapter stand in the order of transformers.
        n_rows: rows of the adapter that the base has; fewer where GGUF leaves out what lies beyond the tokenizer.
    """

    gguf_name: str
    expert: int | None
    row: TensorRow | None
    layer: int | None
    is_from_hf: bool
    n_rows: int | None = None


@dataclass(frozen=True, eq=False)
class FittedPair:
    """A pair and its home; everything that is read stands in GGUF's order.

    Attributes:
        pair: of two matrices (no stacks).
    """

    home: Home
    pair: LoraPair
    base: LoraBase

    @property
    def gguf_name(self) -> str:
        return self.home.gguf_name

    @property
    def role(self) -> Role | None:
        return None if self.home.row is None else self.home.row.role

    def read_a(self) -> Floats:
        """[rank, inputs]."""
        return self.pair.a.read()

    def read_b(self) -> Floats:
        """[outputs, rank]."""
        return self._in_gguf_order(self.pair.b.read())

    def read_magnitude(self) -> Floats | None:
        """DoRA's length of each row, [outputs]."""
        return None if self.pair.magnitude is None else self._in_gguf_order(self.pair.magnitude.read())

    def read_bias(self) -> Floats | None:
        """What is added to the bias, before the scale: [outputs]."""
        return None if self.pair.bias is None else self._in_gguf_order(self.pair.bias.read())

    def _in_gguf_order(self, values: Floats) -> Floats:
        return _moved_rows(values, self.home, self.base)


@dataclass(frozen=True, eq=False)
class FittedReplacement:
    """A whole tensor and its home."""

    home: Home
    replacement: Replacement
    base: LoraBase

    @property
    def gguf_name(self) -> str:
        return self.home.gguf_name

    def read(self) -> Floats:
        """Its numbers as GGUF has them."""
        values = self.replacement.tensor.read()
        home = self.home
        if home.is_from_hf and home.row is not None and self.base.config is not None:
            values = layout.to_gguf(values, home.row.transform, self.base.config)
        return np.ascontiguousarray(values[: home.n_rows] if home.n_rows is not None else values)


@dataclass(frozen=True, eq=False)
class FittedAdapter:
    """An adapter whose every tensor has a home in the base.

    Attributes:
        base_copies: what PEFT stored beside a LoRA on an embedding; it should be the base's own.
    """

    adapter: Adapter
    base: LoraBase
    pairs: tuple[FittedPair, ...]
    replacements: tuple[FittedReplacement, ...]
    base_copies: tuple[FittedReplacement, ...]


def fit_adapter(adapter: Adapter, base: LoraBase) -> FittedAdapter:
    """Give every tensor its home.

    Raises:
        AdapterError: the first tensor that has none, or the family.
    """
    fitted, misfits = try_fit(adapter, base)
    if misfits:
        raise misfits[0].error(base)
    return fitted


def try_fit(adapter: Adapter, base: LoraBase) -> tuple[FittedAdapter, tuple[Misfit, ...]]:
    """Give every tensor its home, and tell all those that have none."""
    misfits: list[Misfit] = []
    if adapter.architecture is not None and adapter.architecture != base.architecture:
        what = f"The adapter is for {adapter.architecture!r} models, and the base is {base.architecture!r}"
        misfits.append(Misfit("family", "", what, "Matrices of one family mean nothing in another."))
    pairs: list[FittedPair] = []
    for whole in adapter.pairs:
        for pair, home in _homes_of_pair(adapter, base, whole, misfits):
            pairs.append(FittedPair(home, pair, base))
    replaced: list[FittedReplacement] = []
    for replacement in adapter.replacements:
        tensor = replacement.tensor
        found = _find_home(adapter, base, replacement.target, None, tensor.shape, tensor, misfits, is_whole=True)
        if found is not None:
            replaced.append(FittedReplacement(found, replacement, base))
    trained = tuple(item for item in replaced if item.replacement.kind is ReplacementKind.TRAINED)
    copies = tuple(item for item in replaced if item.replacement.kind is ReplacementKind.BASE_COPY)
    return FittedAdapter(adapter, base, tuple(pairs), trained, copies), tuple(misfits)


def _homes_of_pair(
    adapter: Adapter, base: LoraBase, pair: LoraPair, misfits: list[Misfit]
) -> Iterator[tuple[LoraPair, Home]]:
    if len(pair.shape) == 2:
        home = _find_home(adapter, base, pair.target, None, pair.shape, pair.b, misfits)
        if home is not None:
            yield pair, home
        return
    for expert in range(pair.shape[0]):
        one = LoraPair(pair.target, pair.a.at(expert), pair.b.at(expert), pair.scale, pair.strength)
        home = _find_home(adapter, base, pair.target, expert, one.shape, pair.b, misfits)
        if home is None:
            return
        yield one, home


def _find_home(
    adapter: Adapter,
    base: LoraBase,
    target: str,
    expert: int | None,
    shape: tuple[int, ...],
    tensor: AdapterTensor,
    misfits: list[Misfit],
    *,
    is_whole: bool = False,
) -> Home | None:
    address = _address_of(adapter, base, target)
    is_known = base.family is None and adapter.uses_gguf_names
    is_there = adapter.uses_gguf_names and base.shapes is not None and target in base.shapes
    if address is None and not is_known and not is_there:
        misfits.append(_no_such_target(base, target, tensor))
        return None
    gguf_name = target if address is None or adapter.uses_gguf_names else address.gguf_name
    if address is not None and address.expert is not None:
        expert = address.expert
    row = None if address is None else address.row
    layer = None if address is None else address.layer
    home = Home(gguf_name, expert, row, layer, not adapter.uses_gguf_names)
    if is_whole and row is not None and home.is_from_hf:
        shape = layout.hf_shape(shape, row.transform)
    misfit = _misfit_of_place(base, home, tensor) or _misfit_of_shape(base, home, shape, tensor)
    if misfit is not None:
        misfits.append(misfit)
        return None
    return Home(gguf_name, expert, row, layer, home.is_from_hf, _rows_kept(base, home, shape))


def _address_of(adapter: Adapter, base: LoraBase, target: str) -> TensorAddress | None:
    family = base.family
    if family is None:
        return None
    if adapter.uses_gguf_names:
        return family.address_by_gguf_name(target)
    cleaned = family.clean_hf_name(target)
    found = () if cleaned is None else family.rows_by_hf_name(cleaned)
    return found[0] if len(found) == 1 else None


def _no_such_target(base: LoraBase, target: str, tensor: AdapterTensor) -> Misfit:
    family = base.family
    if family is None:
        why = f"How {base.architecture!r} models name their tensors is not known, so only LoRA GGUF files fit them."
    elif family.is_other_modality(target):
        why = "It changes the part for pictures or sound, and a text model in GGUF has none."
    else:
        why = f"A {family.name} model has no {target!r}."
    return Misfit("target", tensor.name, f"The adapter's tensor {tensor.name!r} finds no home in the base model", why)


def _misfit_of_place(base: LoraBase, home: Home, tensor: AdapterTensor) -> Misfit | None:
    what = f"The adapter's tensor {tensor.name!r} finds no home in the base model"
    name = home.gguf_name
    is_head = name == "output.weight" and base.is_tied
    if base.shapes is not None and name not in base.shapes and not is_head:
        return Misfit("target", tensor.name, what, f"{base.name!r} has no {name!r}.")
    config = base.config
    if config is not None and base.shapes is None:
        if home.layer is not None and home.layer >= config.n_layers:
            return Misfit("target", tensor.name, what, f"The base has {config.n_layers} layers.")
        if home.expert is not None and home.expert >= (config.n_experts or 0):
            return Misfit("target", tensor.name, what, f"The base has {config.n_experts or 0} experts in each layer.")
    if home.is_from_hf and home.row is not None and home.row.is_permuted and config is None:
        return Misfit("family", tensor.name, what, "The base does not say how many heads it has.")
    return None


def _misfit_of_shape(base: LoraBase, home: Home, shape: tuple[int, ...], tensor: AdapterTensor) -> Misfit | None:
    expected = _expected_shape(base, home)
    if expected is None or shape in (expected, (1, *expected)):
        return _misfit_of_heads(base, home, shape, tensor)
    why = f"It changes {home.gguf_name!r}, which is {expected} there, and the adapter needs {shape}."
    if home.row is not None and home.row.role in _ENDS and len(expected) == len(shape) == 2 and expected[1] == shape[1]:
        if shape[0] > expected[0] and base.family is not None and base.family.trims_vocabulary and home.is_from_hf:
            return None
        more = shape[0] - expected[0]
        why = f"The adapter was trained with {abs(more):,} {'more' if more > 0 else 'fewer'} tokens than the base has."
    what = f"The adapter's tensor {tensor.name!r} has the shape {tensor.shape}, which does not fit the base model"
    return Misfit("shape", tensor.name, what, why)


def _misfit_of_heads(base: LoraBase, home: Home, shape: tuple[int, ...], tensor: AdapterTensor) -> Misfit | None:
    row = home.row
    if row is None or not home.is_from_hf or not row.is_permuted or base.config is None:
        return None
    try:
        layout.head_count(shape[0], row.transform, base.config)
    except FormatError as exc:
        what = f"The adapter's tensor {tensor.name!r} has the shape {tensor.shape}, which does not fit the base model"
        return Misfit("shape", tensor.name, what, exc.what)
    return None


def _expected_shape(base: LoraBase, home: Home) -> tuple[int, ...] | None:
    """The shape of the matrix (or vector) in the orientation of the adapter's tensor; None when nobody knows."""
    name = home.gguf_name
    shape = base.shape_of("token_embd.weight" if name == "output.weight" and base.is_tied else name)
    if shape is None:
        return None
    if home.expert is not None and len(shape) == 3:
        return shape[1:]
    return shape


def _rows_kept(base: LoraBase, home: Home, shape: tuple[int, ...]) -> int | None:
    expected = _expected_shape(base, home)
    if expected is None or not shape or not expected or expected[0] >= shape[0]:
        return None
    return expected[0]


def _moved_rows(values: Floats, home: Home, base: LoraBase) -> Floats:
    row = home.row
    if home.is_from_hf and row is not None and row.is_permuted and base.config is not None:
        values = layout.to_gguf(values, row.transform, base.config)
    if home.n_rows is not None:
        values = values[: home.n_rows]
    return np.ascontiguousarray(values)


def is_vector(pair: FittedPair) -> bool:
    """Whether it changes a vector, as llama.cpp's old trainer did with norms."""
    shape = pair.base.shape_of(pair.gguf_name)
    return shape is not None and math.prod(shape) == math.prod(shape[-1:])
