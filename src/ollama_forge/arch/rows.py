"""What a family is: rows that name each tensor and each hyper-parameter in both vocabularies.

In: nothing; these are the types that the family files fill. Out: `Family`, which finds the row of a tensor by its
Hugging Face name or by its GGUF name. No tensor is read here and no file is known here: `arch.config` reads
config.json through the rows, `arch.layout` moves the numbers, `convert` and `weights` do the reading and writing.

Shapes and axes are row-major and those of the GGUF side, where every matrix is [outputs, inputs].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from ollama_forge.gguf.types import ValueType

if TYPE_CHECKING:
    from ollama_forge.arch.config import ModelConfig


_NESTED = "language_model."  # how models of several parts wrap their text part


class Role(str, Enum):
    """What a tensor does, whatever it is called. Training, ablation and pruning address tensors by this."""

    TOKEN_EMBEDDING = "token_embedding"
    POSITION_EMBEDDING = "position_embedding"
    OUTPUT = "output"
    OUTPUT_NORM = "output_norm"
    ROPE_FREQUENCIES = "rope_frequencies"
    ROPE_FACTORS_LONG = "rope_factors_long"
    ROPE_FACTORS_SHORT = "rope_factors_short"
    ATTENTION_NORM = "attention_norm"
    ATTENTION_QUERY = "attention_query"
    ATTENTION_KEY = "attention_key"
    ATTENTION_VALUE = "attention_value"
    ATTENTION_QKV = "attention_qkv"
    ATTENTION_OUTPUT = "attention_output"
    ATTENTION_QUERY_NORM = "attention_query_norm"
    ATTENTION_KEY_NORM = "attention_key_norm"
    ATTENTION_POST_NORM = "attention_post_norm"
    FFN_NORM = "ffn_norm"
    FFN_GATE = "ffn_gate"
    FFN_UP = "ffn_up"
    FFN_GATE_UP = "ffn_gate_up"
    FFN_DOWN = "ffn_down"
    FFN_POST_NORM = "ffn_post_norm"
    ROUTER = "router"
    EXPERT_GATE = "expert_gate"
    EXPERT_UP = "expert_up"
    EXPERT_DOWN = "expert_down"


class Transform(Enum):
    """How the numbers of a Hugging Face tensor become those of the GGUF tensor; `arch.layout` has both directions."""

    NONE = "none"
    PERMUTE_QUERY = "permute_query"
    PERMUTE_KEY = "permute_key"
    ADD_ONE = "add_one"
    TRANSPOSE = "transpose"


class Residual(Enum):
    """What a tensor does with the residual stream."""

    NONE = "none"
    READS = "reads"
    WRITES = "writes"


@dataclass(frozen=True)
class TensorRow:
    """One tensor of a family, in both vocabularies.

    Attributes:
        role: what it does.
        hf_name: its name in a Hugging Face checkpoint, with `{layer}` and `{expert}` where numbers stand; empty for a
            tensor that is computed from the configuration.
        gguf_name: its name in GGUF, with `{layer}`. Experts are stacked there, on a new first axis.
        is_bias: the vector that is added to what the matrix of the same role gives.
        transform: how the numbers change on the way to GGUF.
        residual: whether it reads or writes the residual stream.
        residual_axis: the axis of the GGUF shape that runs along the residual stream (negative, from the end).
        is_optional: some checkpoints of the family do not have it.
        part: (which, of how many) when the Hugging Face tensor holds several GGUF tensors along its axis -2.
    """

    role: Role
    hf_name: str
    gguf_name: str
    is_bias: bool = False
    transform: Transform = Transform.NONE
    residual: Residual = Residual.NONE
    residual_axis: int = -1
    is_optional: bool = False
    part: tuple[int, int] | None = None

    @property
    def is_per_layer(self) -> bool:
        """Whether each layer has one."""
        return "{layer}" in self.gguf_name

    @property
    def is_per_expert(self) -> bool:
        """Whether the Hugging Face side has one tensor for each expert."""
        return "{expert}" in self.hf_name

    @property
    def is_permuted(self) -> bool:
        """Whether the rows of the GGUF tensor stand in another order than those of the Hugging Face tensor."""
        return self.transform in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY)


@dataclass(frozen=True)
class HyperRow:
    """One hyper-parameter: a GGUF key (without the architecture) and where its value comes from.

    Attributes:
        gguf_key: `attention.head_count`, ...
        type: the GGUF value type.
        config_keys: spellings in config.json; the first that is there counts. The first is written when going back.
        compute: takes the place of `config_keys` where a value has to be worked out; None means "do not write".
        is_required: config.json must have it.
        turns_back: whether `config_keys[0]` gets the GGUF value when a configuration is made from GGUF.
    """

    gguf_key: str
    type: ValueType
    config_keys: tuple[str, ...] = ()
    compute: Callable[[ModelConfig], Any] | None = None
    is_required: bool = False
    turns_back: bool = True


@dataclass(frozen=True)
class Expectation:
    """A setting that GGUF cannot express: llama.cpp computes with `values`, so others are told to the user."""

    config_key: str
    values: tuple[Any, ...]
    consequence: str


@dataclass(frozen=True)
class ComputedTensor:
    """A float32 vector that exists only in GGUF and follows from the configuration."""

    row: TensorRow
    values: tuple[float, ...]


@dataclass(frozen=True)
class TensorAddress:
    """One tensor of one model: the row, and the numbers that stand in its name."""

    row: TensorRow
    layer: int | None = None
    expert: int | None = None

    @property
    def gguf_name(self) -> str:
        return self.row.gguf_name.format(layer=self.layer)

    @property
    def hf_name(self) -> str:
        return self.row.hf_name.format(layer=self.layer, expert=self.expert)


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models: everything that conversion, editing and training need to know about it.

    Attributes:
        name: as config.json spells it in `model_type`.
        gguf_architecture: `general.architecture`.
        hf_architectures: class names in config.json's `architectures`; the first is written when going back.
        tensors: one row for each tensor.
        fused: rows for other ways in which checkpoints store the same tensors.
        hypers: one row for each GGUF key.
        defaults: what transformers assumes where config.json is silent; a callable gets what is known so far.
        rope_defaults: the same for the keys of `rope_parameters`.
        ignored: ends of Hugging Face names that carry nothing GGUF needs.
        skipped: beginnings of names, after `language_model.` is taken away, of what belongs to pictures or sound.
        prefix: may be missing from the names of a checkpoint (a model saved without its head).
        has_rope: whether positions are rotary.
        rope_by_layer_type: `rope_parameters` holds one entry for each kind of layer.
        expectations: what GGUF cannot express.
        computed: tensors that follow from the configuration.
        turn_back: finishes the configuration that is made from GGUF metadata, where rows cannot say it.
        trims_vocabulary: rows of the embedding beyond the tokenizer are left out of GGUF.
    """

    name: str
    gguf_architecture: str
    hf_architectures: tuple[str, ...]
    tensors: tuple[TensorRow, ...]
    hypers: tuple[HyperRow, ...]
    fused: tuple[TensorRow, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_defaults: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    prefix: str = "model."
    has_rope: bool = True
    rope_by_layer_type: bool = False
    expectations: tuple[Expectation, ...] = ()
    computed: Callable[[ModelConfig], tuple[ComputedTensor, ...]] | None = None
    turn_back: Callable[[Mapping[str, Any], dict[str, Any]], None] | None = None
    trims_vocabulary: bool = False

    def clean_hf_name(self, hf_name: str) -> str | None:
        """The name as the rows spell it, without the wrapping of a model of several parts; None when not wanted."""
        if self.is_other_modality(hf_name) or hf_name.endswith(self.ignored or ("\0",)):
            return None
        return hf_name.replace(_NESTED, "")

    def is_other_modality(self, hf_name: str) -> bool:
        """Whether the tensor belongs to pictures or sound."""
        return hf_name.replace(_NESTED, "").removeprefix("model.").startswith(self.skipped or ("\0",))

    def rows_by_hf_name(self, hf_name: str) -> tuple[TensorAddress, ...]:
        """The tensors that a Hugging Face tensor holds: none, one, or several when it is fused."""
        template, numbers = _parse_name(hf_name)
        rows = _hf_index(self).get(template) or _hf_index(self).get(self.prefix + template, ())
        return tuple(TensorAddress(row, *_numbers_of(row.hf_name, numbers)) for row in rows)

    def address_by_gguf_name(self, gguf_name: str) -> TensorAddress | None:
        """The tensor that a GGUF name means, or None when the family has no such tensor."""
        template, numbers = _parse_name(gguf_name)
        row = _gguf_index(self).get(template)
        return None if row is None else TensorAddress(row, *_numbers_of(row.gguf_name, numbers))

    def rows_with_role(self, role: Role) -> tuple[TensorRow, ...]:
        """The rows of a role: the matrix, and its bias where the family may have one."""
        return tuple(row for row in self.tensors if row.role is role)


@functools.cache
def _hf_index(family: Family) -> dict[str, tuple[TensorRow, ...]]:
    return _index((row.hf_name, row) for row in family.tensors + family.fused)


@functools.cache
def _gguf_index(family: Family) -> dict[str, TensorRow]:
    return {name: rows[0] for name, rows in _index((row.gguf_name, row) for row in family.tensors).items()}


def _index(pairs: Iterable[tuple[str, TensorRow]]) -> dict[str, tuple[TensorRow, ...]]:
    index: dict[str, tuple[TensorRow, ...]] = {}
    for name, row in pairs:
        key = name.replace("{layer}", "#").replace("{expert}", "#")
        if key:
            index[key] = (*index.get(key, ()), row)
    return index


def _parse_name(name: str) -> tuple[str, tuple[int, ...]]:
    """`model.layers.3.x` -> (`model.layers.#.x`, (3,)). Numbers are decimal, without a leading zero or a sign."""
    parts, numbers = [], []
    for part in name.split("."):
        if part.isascii() and part.isdecimal() and len(part) < 10 and str(int(part)) == part:
            numbers.append(int(part))
            parts.append("#")
        else:
            parts.append("##" if part == "#" else part)
    return ".".join(parts), tuple(numbers)


def _numbers_of(name: str, numbers: tuple[int, ...]) -> tuple[int | None, int | None]:
    rest = iter(numbers)
    layer = next(rest, None) if "{layer}" in name else None
    expert = next(rest, None) if "{expert}" in name else None
    return layer, expert
