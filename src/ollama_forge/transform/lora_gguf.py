"""An adapter that fits its base becomes the LoRA GGUF that llama.cpp and Ollama load.

In: a `FittedAdapter`. Out: fields and entries for `gguf.writer.write_gguf`, equal to those of llama.cpp's
convert_lora_to_gguf.py (b11549) tensor by tensor, except where that one loses something:
- rank-stabilized LoRA: it stores alpha, and the file's alpha / rank is then too weak by the root of the rank;
- `alpha_pattern`: it stores the general alpha for every tensor;
- GPT-2: it swaps the two matrices, which llama.cpp refuses, or multiplies wrongly where they are square.
One alpha serves a whole file, so a tensor whose scale differs from alpha / rank has the ratio multiplied into its B, in
float32. What llama.cpp would ignore (trained norms and heads, DoRA, biases, positions) is refused by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ollama_forge.arch.rows import Role
from ollama_forge.errors import AdapterError, UsageError
from ollama_forge.gguf.native import quantize
from ollama_forge.gguf.types import GGMLType, ValueType
from ollama_forge.gguf.writer import Field, TensorEntry, array, float32, plan_layout, string, uint32
from ollama_forge.transform.edits import Floats
from ollama_forge.transform.origin import base_model_fields, hub_names
from ollama_forge.weights.adapter_fit import FittedAdapter, FittedPair, is_vector

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
OUTTYPES = {"f32": GGMLType.F32, "f16": GGMLType.F16, "bf16": GGMLType.BF16}
_MERGE = "Merge the adapter instead: ollama-forge merge BASE ADAPTER -o OUT.gguf, or retrain with --merge"
_LARGEST_F16 = 65504.0


@dataclass(frozen=True, eq=False)
class LoraGGUF:
    """A LoRA GGUF that is decided but not yet computed.

    Attributes:
        alpha: of the whole file.
        folded: tensors whose own scale was multiplied into B.
    """

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    size_bytes: int
    alpha: float
    folded: tuple[str, ...]


def plan_lora_gguf(fitted: FittedAdapter, outtype: str = "f32") -> LoraGGUF:
    """Decide everything; no number is read.

    Args:
        outtype: `f32`, `f16` or `bf16`; `auto` takes the most precise that the adapter itself has.

    Raises:
        AdapterError: something that llama.cpp would not apply; it is named.
        UsageError: an unknown type.
    """
    require_expressible(fitted)
    type_ = _type_of(fitted, outtype)
    by_name: dict[str, list[FittedPair]] = {}
    for pair in fitted.pairs:
        by_name.setdefault(pair.gguf_name, []).append(pair)
    alpha = _common_alpha(fitted)
    entries: list[TensorEntry] = []
    folded = []
    for name, pairs in by_name.items():
        matrix = _Matrix(name, tuple(pairs), alpha, _n_experts(pairs), type_)
        entries += matrix.entries()
        if matrix.is_folded:
            folded.append(name)
    fields = _fields(fitted, alpha)
    size_bytes = plan_layout(fields, entries).size_bytes
    return LoraGGUF(tuple(fields), tuple(entries), size_bytes, alpha, tuple(folded))


def require_expressible(fitted: FittedAdapter) -> None:
    """Refuse what a LoRA GGUF cannot say or llama.cpp would not do.

    Raises:
        AdapterError: with the tensor's name.
    """
    for item in fitted.replacements:
        _refuse(item.replacement.tensor.name, "It is a whole tensor, and a LoRA file holds only pairs of matrices")
    for pair in fitted.pairs:
        if pair.pair.magnitude is not None:
            _refuse(pair.pair.magnitude.name, "llama.cpp knows no DoRA")
        if pair.pair.bias is not None:
            _refuse(pair.pair.bias.name, "llama.cpp adds no trained bias")
        name = pair.pair.b.name
        if is_vector(pair) or pair.role is Role.POSITION_EMBEDDING:
            _refuse(name, f"llama.cpp applies no LoRA to {pair.gguf_name!r}")
        if pair.gguf_name == HEAD and fitted.base.is_tied:
            _refuse(name, "The base has no output head of its own: it uses the token embedding (tied)")
        if pair.gguf_name == EMBEDDING and fitted.base.is_tied:
            _refuse(name, "The base uses the embedding as output head too (tied); llama.cpp stops on that")


def _refuse(tensor_name: str, why: str) -> None:
    raise AdapterError(
        f"The adapter's tensor {tensor_name!r} cannot be part of an adapter file",
        why=why + ".",
        next=_MERGE,
    )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """All pairs of one tensor of the base: one, or one for each expert."""

    name: str
    pairs: tuple[FittedPair, ...]
    alpha: float
    n_experts: int | None
    type: GGMLType

    @property
    def rank(self) -> int:
        return max(pair.pair.rank for pair in self.pairs)

    @property
    def is_folded(self) -> bool:
        return any(self._ratio(pair) != 1.0 for pair in self.pairs)

    def entries(self) -> list[TensorEntry]:
        """A and B as llama.cpp expects them."""
        n_outputs, n_inputs = self.pairs[0].pair.shape
        if self.pairs[0].home.n_rows is not None:
            n_outputs = self.pairs[0].home.n_rows
        stack = () if self.n_experts is None else (self.n_experts,)
        if self.name == EMBEDDING:
            # Rows are looked up in the first matrix here, so the pair stands the other way round.
            a = self._entry("lora_a", (n_outputs, self.rank), self._read_b)
            return [a, self._entry("lora_b", (n_inputs, self.rank), lambda pair: self._read_a(pair).T)]
        a = self._entry("lora_a", (*stack, self.rank, n_inputs), self._read_a)
        return [a, self._entry("lora_b", (*stack, n_outputs, self.rank), self._read_b)]

    def _entry(self, half: str, shape: tuple[int, ...], read: Callable[[FittedPair], Floats]) -> TensorEntry:
        name = f"{self.name}.{half}"
        return TensorEntry(name, shape, self.type, lambda: self._chunks(name, shape, read))

    def _chunks(self, name: str, shape: tuple[int, ...], read: Callable[[FittedPair], Floats]) -> Iterator[object]:
        if self.n_experts is None:
            yield self._encoded(name, read(self.pairs[0]))
            return
        by_expert = {pair.home.expert: pair for pair in self.pairs}
        for expert in range(self.n_experts):
            values = np.zeros(shape[1:], np.float32)
            if expert in by_expert:
                found = read(by_expert[expert])
                values[: found.shape[0], : found.shape[1]] = found
            yield self._encoded(name, values)

    def _read_a(self, pair: FittedPair) -> Floats:
        return pair.read_a()

    def _read_b(self, pair: FittedPair) -> Floats:
        values = pair.read_b()
        ratio = self._ratio(pair)
        return values if ratio == 1.0 else values * np.float32(ratio)

    def _ratio(self, pair: FittedPair) -> float:
        """What B is multiplied with, so that alpha / rank of the file makes the scale that was trained."""
        if pair.pair.rank == self.rank and pair.pair.strength == self.alpha:
            return 1.0
        return pair.pair.scale * self.rank / self.alpha

    def _encoded(self, name: str, values: Floats) -> object:
        rows = np.ascontiguousarray(values, dtype=np.float32)
        if self.type is GGMLType.F16 and float(np.abs(rows).max(initial=0.0)) > _LARGEST_F16:
            raise AdapterError(
                f"{name!r} holds a number beyond {_LARGEST_F16:g}, the largest that F16 has",
                why="It would become infinite.",
                next="Choose --outtype bf16 or f32.",
            )
        return quantize(rows, self.type).reshape(-1)


def _type_of(fitted: FittedAdapter, outtype: str) -> GGMLType:
    if outtype == "auto":
        found = {tensor.encoding_name for pair in fitted.pairs for tensor in (pair.pair.a, pair.pair.b)}
        return OUTTYPES["f16"] if found == {"F16"} else OUTTYPES["bf16"] if found == {"BF16"} else OUTTYPES["f32"]
    if outtype not in OUTTYPES:
        raise UsageError(f"Unknown outtype {outtype!r}", why=f"Known: {', '.join(('auto', *OUTTYPES))}.")
    return OUTTYPES[outtype]


def _common_alpha(fitted: FittedAdapter) -> float:
    """The alpha that most tensors need; the first of several."""
    return Counter(pair.pair.strength for pair in fitted.pairs).most_common(1)[0][0]


def _n_experts(pairs: Sequence[FittedPair]) -> int | None:
    """How many matrices the base's tensor stacks; None when it is no stack."""
    pair = pairs[0]
    if pair.home.expert is None:
        return None
    shape = pair.base.shape_of(pair.gguf_name)
    if shape is not None and len(shape) == 3:
        return shape[0]
    config = pair.base.config
    found = config.n_experts if config is not None else None
    return found or max(other.home.expert or 0 for other in pairs) + 1


def _fields(fitted: FittedAdapter, alpha: float) -> list[Field]:
    fields = [
        string("general.architecture", fitted.base.architecture),
        string("general.type", "adapter"),
        *base_model_fields(hub_names(fitted.adapter.base_names)),
        uint32("general.quantization_version", 2),
        string("adapter.type", "lora"),
        float32("adapter.lora.alpha", alpha),
    ]
    if fitted.adapter.invocation_tokens:
        tokens = fitted.adapter.invocation_tokens
        fields.append(array("adapter.alora.invocation_tokens", ValueType.UINT32, tokens))
    return fields
