"""Apply edits to a GGUF file: edited tensors back into their own type, everything else byte for byte; bounded memory.

In: an open GGUF file and edits by tensor name. Out: an `EditedGGUF` (plan first: every size is known before a weight is
read), which the caller writes with `gguf.writer.write_gguf`; then `losses` says what storing the edits cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from ollama_forge.errors import NotFoundError, UnsupportedError
from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.gguf.native import IMATRIX_TYPES, can_dequantize, can_quantize, dequantize, quantize
from ollama_forge.gguf.quantize import find_importance
from ollama_forge.gguf.reader import GGUFFile, GGUFTensor
from ollama_forge.gguf.types import row_bytes
from ollama_forge.gguf.writer import Field, TensorEntry, copy_entry, plan_layout
from ollama_forge.transform.edits import (
    Floats,
    LossMeter,
    OutputEdit,
    RowChange,
    TensorEdit,
    TensorLoss,
    require_storable,
)
from ollama_forge.transform.origin import edited_fields, fields_of
from ollama_forge.transform.outputs import edit_outputs
from ollama_forge.transform.steering import store_rows

# Rounds of steered rounding at most, how far each goes, the error in the change's directions at which a row is done (a
# share of the change), and how much more error than plain rounding's a row may take for it.
FEEDBACK_ROUNDS = 12
FEEDBACK_GAIN = 0.5
FEEDBACK_GOAL = 0.05
FEEDBACK_LIMIT = 2.0
PIECE_ELEMENTS = 1 << 20
_SPLIT_KEYS = frozenset({"split.no", "split.count", "split.tensors.count"})


@dataclass(frozen=True)
class Addition:
    """A tensor that the file gets beside its own: a copy of one of them under another name, edited or not.

    Attributes:
        name: the new one.
        source: whose bytes it begins with.
    """

    name: str
    source: str


@dataclass(frozen=True, eq=False)
class EditedGGUF:
    """An edited file that is decided but not yet computed: give `fields` and `entries` to `write_gguf`.

    Attributes:
        edited: names of the tensors that will differ.
        losses: filled while it is written, in the order of the file.
    """

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    size_bytes: int
    alignment: int
    edited: tuple[str, ...]
    losses: list[TensorLoss] = field(default_factory=list)


def plan_gguf_edit(
    source: GGUFFile,
    edits: Sequence[TensorEdit | OutputEdit],
    *,
    additions: Sequence[Addition] = (),
    imatrix: Imatrix | None = None,
    n_threads: int | None = None,
) -> EditedGGUF:
    """Decide everything; only headers are read. `source` stays open until the file is written.

    Args:
        edits: at most one for each tensor; an added tensor is edited under its new name.
        imatrix: used for the tensors that are encoded anew.

    Raises:
        NotFoundError: an edit of a tensor that is not there.
        UnsupportedError: a type that cannot be decoded or encoded here, or not without an importance matrix.
        FormatError: the importance matrix was made from another model.
    """
    wanted = {edit.name: edit for edit in edits}
    added = {addition.name: addition for addition in additions}
    missing = next((name for name in wanted if name not in source.tensors and name not in added), None)
    if missing is not None or len(wanted) != len(edits):
        raise NotFoundError(
            f"{str(source.path)!r} has no tensor {missing!r} to edit" if missing else "Two edits of one tensor",
            next=f"List its tensors: ollama-forge show {source.path} --json",
        )
    losses: list[TensorLoss] = []
    entries = []
    places = [(name, name) for name in source.tensors] + [(item.name, item.source) for item in additions]
    for name, origin in places:
        edit = wanted.get(name)
        if edit is None:
            entries.append(copy_entry(source, origin, name))
            continue
        tensor = replace(source.find_tensor(origin), name=name)
        importance = find_importance(imatrix, name, tensor.shape)
        _require_codable(tensor, importance)
        if isinstance(edit, OutputEdit):
            chunks: Callable[[], Iterator[Any]] = partial(
                _edited_outputs, source, origin, tensor, edit, importance, n_threads, losses.append
            )
        else:
            chunks = _Job(source, origin, tensor, edit, importance, n_threads, losses.append).chunks
        entries.append(TensorEntry(name, tensor.shape, tensor.type, chunks, is_computed=True))
    fields = edited_fields(fields_of(source), without=_SPLIT_KEYS)
    return EditedGGUF(
        fields=tuple(fields),
        entries=tuple(entries),
        size_bytes=plan_layout(fields, entries, source.alignment).size_bytes,
        alignment=source.alignment,
        edited=tuple(name for name, _ in places if name in wanted),
        losses=losses,
    )


def _require_codable(tensor: GGUFTensor, importance: Floats | None) -> None:
    if not can_dequantize(tensor.type) or not can_quantize(tensor.type):
        raise UnsupportedError(
            f"{tensor.name!r} is {tensor.type.name}, which cannot be decoded and encoded again here",
            why="An edited tensor goes back into its own type.",
            next="Edit a model in another quantization, for example Q4_K_M or Q8_0.",
        )
    if tensor.type in IMATRIX_TYPES and importance is None:
        raise UnsupportedError(
            f"{tensor.name!r} is {tensor.type.name}, which cannot be encoded again without an importance matrix",
            why="At so few bits ggml must know which columns matter.",
            next="Make one (ollama-forge imatrix REF -o imatrix.gguf) and add --imatrix imatrix.gguf, or land the "
            "adapter as a layer instead of merging it.",
        )


def _edited_outputs(
    source: GGUFFile,
    origin: str,
    tensor: GGUFTensor,
    edit: OutputEdit,
    importance: Floats | None,
    n_threads: int | None,
    report: Callable[[TensorLoss], None],
) -> Iterator[Any]:
    """The encoded bytes of a matrix, or of a stack of them, one after the other."""
    meter = LossMeter(tensor.name, tensor.type.name)
    view = source.read(origin)
    yield from edit_outputs(view, tensor.type, tensor.shape, edit, meter, importance=importance, n_threads=n_threads)
    view.release()
    source.release(origin)
    report(meter.result())


@dataclass(frozen=True, eq=False)
class _Job:
    """One tensor to be edited: decoded, changed, encoded and measured a few rows at a time."""

    source: GGUFFile
    origin: str
    tensor: GGUFTensor
    edit: TensorEdit
    importance: Floats | None
    n_threads: int | None
    report: Callable[[TensorLoss], None]

    def chunks(self) -> Iterator[Any]:
        """The encoded bytes, in order."""
        tensor = self.tensor
        n_columns = tensor.shape[-1] if tensor.shape else 1
        stride = row_bytes(tensor.type, n_columns)
        change = self.edit.open()
        meter = LossMeter(tensor.name, tensor.type.name)
        view = self.source.read(self.origin)
        for first, n_rows, weights in self._pieces(n_columns):
            stored = view[first * stride : (first + n_rows) * stride]
            before = dequantize(stored, tensor.type, (n_rows, n_columns), n_threads=self.n_threads)
            encoded = self._encode(change, first, before, weights, meter)
            yield encoded
        view.release()
        self.source.release(self.origin)
        self.report(meter.result())

    def _encode(self, change: RowChange, first: int, before: Floats, weights: Floats | None, meter: LossMeter) -> Any:
        tensor, basis = self.tensor, self._basis

        def changed(rows: slice, part: Floats) -> Floats:
            wanted = np.ascontiguousarray(change(first + rows.start, part), dtype=np.float32)
            require_storable(wanted, tensor.type, tensor.name)
            return wanted

        if basis is not None and self.edit.is_precise:
            return store_rows(
                before, changed, tensor.type, basis, weights, report=meter.add_parts, n_threads=self.n_threads
            ).reshape(-1)
        wanted = changed(slice(0, len(before)), before)
        encoded, stored = self._nearest(wanted, before, weights)
        meter.add(before, wanted, stored)
        return encoded.reshape(-1)

    def _nearest(self, wanted: Floats, before: Floats, weights: Floats | None) -> tuple[Any, Floats]:
        """(encoded, what it decodes to). Where the change acts in few input directions, rounding is steered there.

        A small change of weights that lie on the quantization's grid would be rounded away, all of it, at few bits.
        So the error that the stored weights make in the directions of the change is added to what is rounded, again
        and again: each weight still is one of its two neighbours or so, but their sum along these directions is kept.
        """
        basis = self._basis
        encoded, stored = self._stored(wanted, weights)
        if basis is None:
            return encoded, stored
        goal = FEEDBACK_GOAL * np.linalg.norm((wanted - before) @ basis.T, axis=1)
        error = (wanted - stored) @ basis.T
        smallest = np.linalg.norm(error, axis=1)
        most = FEEDBACK_LIMIT * np.linalg.norm(wanted - stored, axis=1)
        correction = np.zeros_like(error)
        for _ in range(FEEDBACK_ROUNDS):
            rows = np.flatnonzero(smallest > goal)
            if not rows.size:
                break
            correction[rows] += FEEDBACK_GAIN * error[rows]
            tried, decoded = self._stored(wanted[rows] + (correction[rows] @ basis).astype(np.float32), weights)
            difference = wanted[rows] - decoded
            error[rows] = difference @ basis.T
            size = np.linalg.norm(error[rows], axis=1)
            is_better = (size < smallest[rows]) & (np.linalg.norm(difference, axis=1) <= most[rows])
            better = rows[is_better]
            encoded[better], stored[better], smallest[better] = tried[is_better], decoded[is_better], size[is_better]
        return encoded, stored

    def _stored(self, rows: Floats, weights: Floats | None) -> tuple[Any, Floats]:
        """(encoded, what it decodes to)."""
        contiguous = np.ascontiguousarray(rows, dtype=np.float32)
        encoded = quantize(contiguous, self.tensor.type, weights, n_threads=self.n_threads)
        return encoded, dequantize(encoded, self.tensor.type, contiguous.shape, n_threads=self.n_threads)

    @cached_property
    def _basis(self) -> Floats | None:
        """Orthonormal rows that span the directions of the change; None where there are none, or too many."""
        if self.edit.inputs is None or len(self.tensor.shape) != 2:
            return None
        directions = self.edit.inputs()
        if len(directions) > self.tensor.shape[-1] // 4:
            return None
        basis, lengths = np.linalg.qr(np.asarray(directions.T, dtype=np.float64))
        is_new = np.abs(np.diag(lengths)) > 1e-9 * max(1e-30, float(np.abs(lengths).max()))
        result: Floats = basis.T[is_new].astype(np.float32)
        return result

    def _pieces(self, n_columns: int) -> Iterator[tuple[int, int, Floats | None]]:
        """(first row, rows, column weights); no piece crosses from one expert to the next."""
        shape = self.tensor.shape
        per_matrix = shape[-2] if len(shape) > 1 else 1
        n_matrices = int(np.prod(shape[:-2], dtype=np.int64)) if len(shape) > 2 else 1
        at_once = max(1, PIECE_ELEMENTS // max(1, n_columns))
        for matrix in range(n_matrices):
            weights = None
            if self.importance is not None:
                start = matrix % (self.importance.size // n_columns) * n_columns
                weights = self.importance[start : start + n_columns]
            for row in range(0, per_matrix, at_once):
                yield matrix * per_matrix + row, min(at_once, per_matrix - row), weights
