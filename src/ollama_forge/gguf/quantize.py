"""Make a GGUF smaller: the types that `mixture.py` chooses, the bytes that ggml makes of them, streamed.

In: an open GGUF file (or any rows that can be asked for by number) and options. Out: fields and tensor entries for
`write_gguf`; each entry decodes and quantizes a few rows at a time on several threads, when its turn comes. Memory does
not grow with the model or with the largest tensor. Types, bytes and keys equal `llama-quantize`'s (llama.cpp b11549).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ollama_forge.errors import FormatError, GGUFError, UnsupportedError, UsageError
from ollama_forge.gguf.finite import finite_entry, is_finite, require_finite
from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.gguf.mixture import (
    Choice,
    QuantizeOptions,
    Role,
    plan_choices,
    plan_types,
    tensor_role,
)
from ollama_forge.gguf.native import Bytes, Floats, can_dequantize, dequantize, quantize, usable_cores
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import GGMLType, file_type_name, is_quantized, row_bytes
from ollama_forge.gguf.writer import Field, TensorEntry, copy_entry, from_reader, plan_layout, string, uint32

__all__ = [
    "Quantization",
    "QuantizeOptions",
    "plan_quantization",
    "plan_types",
    "quantization_fields",
    "quantized_entry",
]

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
# So large that what Python does around each piece, some 60 us, is a few percent of Q8_0's time and nothing of Q4_K's.
PIECE_ELEMENTS = 1 << 19
_KEY_TEXT_BYTES = 127  # llama.cpp keeps such values in a fixed buffer
_SPLIT_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})
_FLOATS = frozenset({GGMLType.F32, GGMLType.F16, GGMLType.BF16})

_scratch = threading.local()

ReadRows = Callable[[int, int], Any]
"""`read_rows(first, n_rows)`: the encoded bytes of rows counted through the whole tensor, as a buffer. Thread-safe."""


@dataclass(frozen=True)
class Quantization:
    """A quantized file that is decided but not yet computed: give `fields` and `entries` to `write_gguf`.

    `types` is by tensor name; `fallbacks` are the tensors whose rows did not divide into the type of the mix;
    `unweighted` those that an importance matrix was given for but says nothing about.
    """

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    types: Mapping[str, GGMLType]
    size_bytes: int
    alignment: int
    fallbacks: tuple[Choice, ...]
    unweighted: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know, one sentence each."""
        said = []
        if self.fallbacks:
            first = self.fallbacks[0]
            said.append(
                f"{len(self.fallbacks)} of {len(self.entries)} tensors have rows that do not divide into the blocks of "
                f"the chosen type: {first.name!r} becomes {first.type.name} instead of {first.wanted.name}."
            )
        if self.unweighted:
            said.append(
                f"The importance matrix says nothing about {len(self.unweighted)} of the quantized tensors, "
                f"for example {self.unweighted[0]!r}."
            )
        return tuple(said)


def plan_quantization(source: GGUFFile, options: QuantizeOptions) -> Quantization:
    """Decide every type and the exact size; no weight is read. `source` stays open until the file is written.

    Raises:
        UsageError: the mix needs an importance matrix, the source is quantized already, or an option fits no tensor.
        FormatError: the importance matrix was made from another model, or is broken.
        UnsupportedError: a type that cannot be made or read here.
        GGUFError: the metadata does not say what the mix needs.
    """
    rows = [(tensor.name, tensor.shape, tensor.type) for tensor in source.tensors.values()]
    choices = plan_choices(source.architecture, source.metadata.get, rows, options)
    _require_readable(choices, options)
    entries = []
    unweighted = []
    for choice in choices:
        importance = None
        if choice.is_changed:
            importance = find_importance(options.imatrix, choice.name, choice.shape)
            if importance is None and options.imatrix is not None and _is_weighted(choice):
                unweighted.append(choice.name)
        entries.append(_entry_from_file(source, choice, importance, options.n_threads))
    wanted = quantization_fields(options)
    replaced = {field.key for field in wanted} | _SPLIT_KEYS
    fields = [from_reader(field) for key, field in source.fields.items() if key not in replaced] + wanted
    layout = plan_layout(fields, entries, source.alignment)
    return Quantization(
        fields=tuple(fields),
        entries=tuple(entries),
        types={choice.name: choice.type for choice in choices},
        size_bytes=layout.size_bytes,
        alignment=source.alignment,
        fallbacks=tuple(choice for choice in choices if choice.is_fallback),
        unweighted=tuple(unweighted),
    )


def quantization_fields(options: QuantizeOptions) -> list[Field]:
    """The keys that a quantized file carries; they replace those of the same name."""
    fields = [
        uint32("general.quantization_version", QUANTIZATION_VERSION),
        uint32("general.file_type", int(options.file_type)),
    ]
    imatrix = options.imatrix
    if imatrix is not None:
        # The name without its folder: the same inputs make the same bytes wherever they lie.
        fields.append(string("quantize.imatrix.file", _clipped(imatrix.file_name)))
        if imatrix.datasets:
            fields.append(string("quantize.imatrix.dataset", _clipped(imatrix.datasets[0])))
        fields.append(uint32("quantize.imatrix.entries_count", len(imatrix.entries)))
        if imatrix.chunk_count > 0:
            fields.append(uint32("quantize.imatrix.chunks_count", imatrix.chunk_count))
    return fields


def quantized_entry(
    name: str,
    shape: tuple[int, ...],
    source_type: GGMLType,
    read_rows: ReadRows,
    target: GGMLType,
    *,
    importance: Floats | None = None,
    n_threads: int | None = None,
    release: Callable[[], None] | None = None,
) -> TensorEntry:
    """An entry that decodes rows of `source_type` and encodes them as `target`, a few at a time.

    Args:
        shape: row-major.
        importance: float32 [n_columns x n_experts], flat, from `find_importance`.
        n_threads: the usable cores by default.
        release: called when the last row is written, to give memory back.

    Raises:
        GGUFError: while it is written, when a weight is not a finite number or does not fit `target`.
    """
    job = _Job(name, shape, source_type, read_rows, target, importance)

    def pieces() -> Iterator[Callable[[], Bytes]]:
        return (partial(_encode_piece, job, piece) for piece in job.pieces())

    def chunks() -> Iterator[Bytes]:
        return (encode() for encode in pieces())

    return TensorEntry(
        *(name, shape, target, chunks),
        is_computed=True,
        pieces=pieces,
        n_threads=n_threads or usable_cores(),
        release=release,
    )


def find_importance(imatrix: Imatrix | None, name: str, shape: Sequence[int]) -> Floats | None:
    """The column weights of one tensor: float32 [n_columns x n_experts], flat; None where there are none for it.

    Raises:
        FormatError: they are for a tensor of another shape, or not finite.
    """
    if imatrix is None or name not in imatrix.entries:
        return None
    expected = shape[-1] * (shape[-3] if len(shape) > 2 else 1)
    found = imatrix.entries[name].size
    if found == expected:
        return imatrix.weights(name)
    if tensor_role(name) is Role.TOKEN_EMBEDDING:
        return None  # collected where the tied matrix makes the output, it cannot be used for rows that are looked up
    raise FormatError(
        f"The importance matrix {imatrix.file_name!r} has {found} columns for {name!r}, and the tensor has {expected}",
        why="It was made from another model.",
        next="Make one from this model (ollama-forge imatrix REF -o imatrix.gguf), or quantize without --imatrix.",
    )


def _require_readable(choices: Sequence[Choice], options: QuantizeOptions) -> None:
    for choice in choices:
        if not choice.is_changed:
            continue
        if is_quantized(choice.source) and not options.allow_requantize:
            raise UsageError(
                f"The source is quantized already: {choice.name!r} is {choice.source.name} and would become "
                f"{choice.type.name}",
                why="Quantizing twice loses more than quantizing the F32, F16 or BF16 model once.",
                next="Use the unquantized model, or add --allow-requantize to make "
                f"{file_type_name(options.file_type)} from this one.",
            )
        if (not is_quantized(choice.source) and choice.source not in _FLOATS) or not can_dequantize(choice.source):
            raise UnsupportedError(
                f"{choice.name!r} is {choice.source.name}, which cannot become {choice.type.name}",
                why="It holds whole numbers, or this machine's ggml is too old to decode it.",
                next="Keep the tensor as it is (quantize --tensor-type), or convert the model again.",
            )


def _is_weighted(choice: Choice) -> bool:
    """Whether an importance matrix is expected to know this tensor: llama-imatrix leaves both ends of the model out."""
    return is_quantized(choice.type) and tensor_role(choice.name) not in (Role.TOKEN_EMBEDDING, Role.OUTPUT)


def _clipped(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")[:_KEY_TEXT_BYTES]


def _entry_from_file(source: GGUFFile, choice: Choice, importance: Floats | None, n_threads: int | None) -> TensorEntry:
    name = choice.name
    if not choice.is_changed:
        return finite_entry(copy_entry(source, name))
    stride = row_bytes(choice.source, choice.shape[-1])

    def read_rows(first: int, n_rows: int) -> memoryview:
        return source.read(name)[first * stride : (first + n_rows) * stride]

    return quantized_entry(
        name,
        choice.shape,
        choice.source,
        read_rows,
        choice.type,
        importance=importance,
        n_threads=n_threads,
        release=lambda: source.release(name),
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """One tensor to be encoded anew; `importance` is flat, `n_columns` per expert."""

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    read_rows: ReadRows
    target: GGMLType
    importance: Floats | None

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    def pieces(self) -> Iterator[tuple[int, int, Floats | None]]:
        """(first row, rows, column weights) of every piece; none crosses from one expert to the next."""
        per_matrix = self.shape[-2]
        n_matrices = math.prod(self.shape[:-2])
        if not self.n_columns:
            return
        at_once = max(1, PIECE_ELEMENTS // self.n_columns)
        n_weights = self.importance.size // self.n_columns if self.importance is not None else 0
        for matrix in range(n_matrices):
            weights = None
            if self.importance is not None:
                start = matrix % n_weights * self.n_columns
                weights = self.importance[start : start + self.n_columns]
            for row in range(0, per_matrix, at_once):
                yield matrix * per_matrix + row, min(at_once, per_matrix - row), weights


def _encode_piece(job: _Job, piece: tuple[int, int, Floats | None]) -> Bytes:
    first, n_rows, weights = piece
    stored = job.read_rows(first, n_rows)
    shape = (n_rows, job.n_columns)
    if job.source == GGMLType.F32 and _is_aligned(stored):
        rows = np.frombuffer(stored, "<f4").reshape(shape)
    else:
        rows = dequantize(stored, job.source, shape, out=_scratch_rows(shape), n_threads=1)
    if not is_quantized(job.target):
        require_finite(rows, GGMLType.F32, job.name)
    try:
        encoded = quantize(rows, job.target, weights, n_threads=1)
    except GGUFError as exc:
        raise GGUFError(
            f"{job.name!r} cannot become {job.target.name}: {exc.what}", why=exc.why, next=exc.next
        ) from exc
    if job.target == GGMLType.F16 and not is_finite(encoded, GGMLType.F16):
        raise GGUFError(
            f"{job.name!r} cannot become F16: it holds a weight beyond 65504",
            why="F16 has no larger numbers; the weight would become infinite.",
            next="Choose bf16, which has the range of f32.",
        )
    return encoded


def _scratch_rows(shape: tuple[int, int]) -> Floats:
    """This thread's float32 buffer, cut to `shape`."""
    n_elements = shape[0] * shape[1]
    buffer: Floats | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.size < n_elements:
        buffer = _scratch.buffer = np.empty(n_elements, np.float32)
    return buffer[:n_elements].reshape(shape)


def _is_aligned(stored: Any) -> bool:
    return np.frombuffer(stored, np.uint8).ctypes.data % 4 == 0
