"""Cut a GGUF model smaller: fewer layers, channels, heads or experts; bounded memory, and every size known beforehand.

In: an open checkpoint and a `Cut`. Out: a `PrunedGGUF` to be written with `gguf.writer.write_gguf`. A tensor that keeps
all its rows is copied byte for byte under its new name; kept rows, and kept columns that are whole blocks, are copied
block by block; only tensors that are cut inside their blocks are decoded and quantized again, and their loss is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ollama_forge.arch.rows import Family
from ollama_forge.errors import GGUFError, UnsupportedError
from ollama_forge.gguf.mix_rules import FALLBACKS
from ollama_forge.gguf.native import IMATRIX_TYPES, can_dequantize, can_quantize, dequantize, quantize
from ollama_forge.gguf.reader import GGUFFile, GGUFTensor
from ollama_forge.gguf.types import GGMLType, ValueType, block_bytes, block_elements, is_quantized, row_bytes
from ollama_forge.gguf.writer import Field, TensorEntry, array, copy_entry, plan_layout, uint32
from ollama_forge.transform.cut import Cut, ModelSizes, kept_axes, read_sizes, sizes_after, validate_cut
from ollama_forge.transform.edits import LossMeter, TensorLoss
from ollama_forge.transform.gather import Indices, gather, row_numbers, whole_blocks
from ollama_forge.transform.origin import edited_fields, fields_of
from ollama_forge.weights.checkpoint import Checkpoint

PIECE_ELEMENTS = 1 << 20
# What would no longer be true; the number of parameters is counted by those who want it.
_LEFT_OUT = frozenset(
    {"split.no", "split.count", "split.tensors.count", "general.size_label", "general.parameter_count"}
)
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# Arrays of an architecture that have one item for each layer; others may have as many items by chance.
_NOT_PER_LAYER = ("rope.dimension_sections",)


@dataclass(frozen=True)
class Fallback:
    """A tensor whose new rows do not divide into the blocks of its type, and the type that it gets instead."""

    name: str
    type: GGMLType
    instead: GGMLType


@dataclass(frozen=True, eq=False)
class PrunedGGUF:
    """A smaller file that is decided but not yet computed: give `fields` and `entries` to `write_gguf`.

    Attributes:
        sizes: of the smaller model.
        untouched: new names of tensors whose bytes are those of a tensor of the source.
        sliced: new names of those that keep some rows or blocks, unchanged.
        requantized: new names of those that are encoded anew.
        losses: of the requantized ones, filled while the file is written.
    """

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    size_bytes: int
    alignment: int
    sizes: ModelSizes
    untouched: tuple[str, ...]
    sliced: tuple[str, ...]
    requantized: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]
    losses: list[TensorLoss] = field(default_factory=list)

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries)


def plan_gguf_cut(checkpoint: Checkpoint, cut: Cut, *, n_threads: int | None = None) -> PrunedGGUF:
    """Decide everything; only headers are read. `checkpoint` stays open until the file is written.

    Args:
        checkpoint: of a GGUF file.
        n_threads: for the tensors that are encoded anew.

    Raises:
        UsageError: the cut makes no model.
        UnsupportedError: a type that cannot be encoded again, or a tensor that nobody knows how to cut.
    """
    source = checkpoint.gguf
    assert source is not None
    sizes = read_sizes(checkpoint)
    validate_cut(sizes, cut)
    planner = _Planner(source, checkpoint.family, sizes, cut, n_threads)
    entries = tuple(entry for name in source.tensors if (entry := planner.entry(name)) is not None)
    fields = cut_fields(fields_of(source), source.architecture, sizes, cut)
    return PrunedGGUF(
        fields=fields,
        entries=entries,
        size_bytes=plan_layout(fields, entries, source.alignment).size_bytes,
        alignment=source.alignment,
        sizes=sizes_after(sizes, cut),
        untouched=tuple(planner.untouched),
        sliced=tuple(planner.sliced),
        requantized=tuple(planner.requantized),
        fallbacks=tuple(planner.fallbacks),
        losses=planner.losses,
    )


class _Planner:
    """Decides one tensor after the other."""

    def __init__(
        self, source: GGUFFile, family: Family, sizes: ModelSizes, cut: Cut, n_threads: int | None = None
    ) -> None:
        self.source = source
        self.family = family
        self.sizes = sizes
        self.cut = cut
        self.n_threads = n_threads
        layers = range(sizes.n_layers) if cut.layers is None else cut.layers.tolist()
        self._place = {layer: place for place, layer in enumerate(layers)}
        self.untouched: list[str] = []
        self.sliced: list[str] = []
        self.requantized: list[str] = []
        self.fallbacks: list[Fallback] = []
        self.losses: list[TensorLoss] = []

    def entry(self, name: str) -> TensorEntry | None:
        """The tensor as the smaller file has it; None when its layer goes."""
        match = _BLOCK.fullmatch(name)
        new_name = name
        if match is not None:
            place = self._place.get(int(match[1]))
            if place is None:
                return None
            new_name = f"blk.{place}.{match[2]}"
        axes = self._axes(name)
        if not axes:
            self.untouched.append(new_name)
            return copy_entry(self.source, name, new_name)
        return self._cut_entry(self.source.find_tensor(name), new_name, axes)

    def _axes(self, name: str) -> dict[int, Indices]:
        if self.cut.is_depth_only:
            return {}
        address = self.family.address_by_gguf_name(name)
        if address is None:
            raise UnsupportedError(
                f"Nobody knows how {name!r} is cut",
                why=f"It is no tensor of the {self.family.name} family.",
                next="Cut whole layers instead: --layers N or --keep 70%",
            )
        return kept_axes(address.row, address.layer, self.sizes, self.cut)

    def _cut_entry(self, tensor: GGUFTensor, new_name: str, axes: dict[int, Indices]) -> TensorEntry:
        shape = list(tensor.shape)
        for axis, kept in axes.items():
            if -axis > len(shape) or (len(kept) and int(kept[-1]) >= shape[axis]):
                raise GGUFError(
                    f"{tensor.name!r} has the shape {tensor.shape}, which does not fit the sizes in the metadata",
                    why=f"Index {int(kept[-1])} of axis {axis} should be kept.",
                )
            shape[axis] = len(kept)
        rows = row_numbers(tensor.shape, axes)
        columns = axes.get(-1)
        block = block_elements(tensor.type)
        cells = None if columns is None else whole_blocks(columns, block)
        if columns is None or cells is not None:
            self.sliced.append(new_name)
            return TensorEntry(new_name, tuple(shape), tensor.type, _Slice(self.source, tensor, rows, cells).chunks)
        type = self._fitting(tensor, new_name, len(columns))
        self.requantized.append(new_name)
        job = _Requantization(self.source, tensor, new_name, type, rows, columns, self.n_threads, self.losses.append)
        return TensorEntry(new_name, tuple(shape), type, job.chunks)

    def _fitting(self, tensor: GGUFTensor, new_name: str, n_columns: int) -> GGMLType:
        """The tensor's own type, or what llama-quantize gives rows that do not divide into its blocks."""
        type = tensor.type
        if n_columns % block_elements(type):
            smaller = FALLBACKS.get(type, GGMLType.F16)
            type = smaller if n_columns % block_elements(smaller) == 0 else GGMLType.F16
            self.fallbacks.append(Fallback(new_name, tensor.type, type))
        if not can_dequantize(tensor.type) or not can_quantize(type) or type in IMATRIX_TYPES:
            raise UnsupportedError(
                f"{tensor.name!r} is {tensor.type.name}, and cut inside its blocks it cannot be encoded again",
                why="At so few bits ggml must know which columns matter."
                if type in IMATRIX_TYPES
                else "There is no encoder for this type.",
                next="Cut whole layers (--layers N), or cut the 16-bit model and quantize the result.",
            )
        return type


@dataclass(frozen=True, eq=False)
class _Slice:
    """Rows and whole blocks that stay as they are."""

    source: GGUFFile
    tensor: GGUFTensor
    rows: Indices
    cells: Indices | None

    def chunks(self) -> Iterator[Any]:
        tensor = self.tensor
        n_cells = tensor.shape[-1] // block_elements(tensor.type)
        yield from gather(self.source.read(tensor.name), block_bytes(tensor.type), n_cells, self.rows, self.cells)
        self.source.release(tensor.name)


@dataclass(frozen=True, eq=False)
class _Requantization:
    """A tensor cut inside its blocks: decoded, cut and encoded a few rows at a time."""

    source: GGUFFile
    tensor: GGUFTensor
    new_name: str
    type: GGMLType
    rows: Indices
    columns: Indices
    n_threads: int | None
    report: Callable[[TensorLoss], None]

    def chunks(self) -> Iterator[Any]:
        tensor = self.tensor
        n_columns = tensor.shape[-1]
        stride = row_bytes(tensor.type, n_columns)
        at_once = max(1, PIECE_ELEMENTS // n_columns)
        meter = LossMeter(self.new_name, self.type.name)
        table = np.frombuffer(self.source.read(tensor.name), np.uint8).reshape(-1, stride)
        for start in range(0, len(self.rows), at_once):
            packed = np.ascontiguousarray(table[self.rows[start : start + at_once]])
            values = dequantize(packed, tensor.type, (len(packed), n_columns), n_threads=self.n_threads)
            wanted = np.ascontiguousarray(values[:, self.columns])
            encoded = quantize(wanted, self.type, n_threads=self.n_threads)
            if is_quantized(self.type):
                stored = dequantize(encoded, self.type, wanted.shape, n_threads=self.n_threads)
                meter.add(wanted, wanted, stored)
            yield encoded.reshape(-1)
        del table
        self.source.release(tensor.name)
        if is_quantized(self.type):
            self.report(meter.result())


def cut_fields(source: Sequence[Field], architecture: str, sizes: ModelSizes, cut: Cut) -> tuple[Field, ...]:
    """The metadata of the smaller model: counts, and what is listed layer by layer.

    Raises:
        GGUFError: a number that must change is not there as a number.
    """
    prefix = architecture + "."
    layers = np.arange(sizes.n_layers) if cut.layers is None else cut.layers
    after = sizes_after(sizes, cut)
    changed = _changed_numbers(sizes, after, layers.tolist())
    fields = []
    for entry in edited_fields(source, _LEFT_OUT):
        suffix = entry.key.removeprefix(prefix) if entry.key.startswith(prefix) else ""
        if suffix == "leading_dense_block_count" and isinstance(entry.value, int):
            entry = Field(entry.key, entry.type, sum(layer < entry.value for layer in layers.tolist()))
        elif suffix in changed and entry.type is not ValueType.ARRAY:
            entry = Field(entry.key, entry.type, changed[suffix])
        elif suffix and _is_per_layer(entry, suffix, sizes.n_layers):
            entry = _cut_array(entry, layers.tolist(), changed.get(suffix))
        fields.append(entry)
    present = {entry.key for entry in fields}
    if after.hidden != sizes.hidden or after.n_heads != sizes.n_heads:
        # without these llama.cpp divides the stream's width by the number of heads
        for key in ("attention.key_length", "attention.value_length"):
            if prefix + key not in present:
                fields.append(uint32(prefix + key, sizes.head_dim))
    missing = [key for key in ("block_count",) if prefix + key not in present]
    if missing:
        raise GGUFError(f"The model has no {prefix + missing[0]!r}", why="It is no language model.")
    return tuple(fields)


def _changed_numbers(sizes: ModelSizes, after: ModelSizes, layers: Sequence[int]) -> dict[str, int]:
    """Suffix of a key -> its new number, for those that change."""
    changed: dict[str, int] = {}
    if after.n_layers != sizes.n_layers:
        changed["block_count"] = after.n_layers
    if after.hidden != sizes.hidden:
        changed["embedding_length"] = after.hidden
    if after.ffn != sizes.ffn:
        changed["expert_feed_forward_length" if sizes.n_experts else "feed_forward_length"] = after.ffn
    if after.n_heads != sizes.n_heads:
        changed["attention.head_count"] = after.n_heads
        changed["attention.head_count_kv"] = after.n_kv_heads
    if after.n_experts != sizes.n_experts:
        changed["expert_count"] = after.n_experts
    return changed


def _is_per_layer(entry: Field, suffix: str, n_layers: int) -> bool:
    return (
        entry.type is ValueType.ARRAY
        and suffix not in _NOT_PER_LAYER
        and entry.item_type is not ValueType.STRING
        and len(entry.value) == n_layers
    )


def _cut_array(entry: Field, layers: Sequence[int], number: int | None) -> Field:
    assert entry.item_type is not None
    values = list(entry.value)
    kept = [number if number is not None else values[layer] for layer in layers]
    return array(entry.key, entry.item_type, kept)
