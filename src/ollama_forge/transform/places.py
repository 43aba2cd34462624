"""Where the tensors of a base lie: in a GGUF file, or in a Hugging Face folder with its own order of rows.

In: an open GGUF file or checkpoint. Out: a `Locator` for `lora.plan_merge`, and rows of the base as float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ollama_forge.arch import layout
from ollama_forge.arch.rows import TensorRow, Transform
from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import row_bytes
from ollama_forge.transform.edits import Floats
from ollama_forge.transform.lora import Locator, Spot
from ollama_forge.weights.checkpoint import Checkpoint, StoredTensor, TensorKey

PIECE_ELEMENTS = 1 << 20


class GGUFLocator(Locator):
    """Tensors of a GGUF file.

    Args:
        copies: tensors that will be added, by the name of those that they begin as.
    """

    def __init__(self, file: GGUFFile, copies: dict[str, str] | None = None) -> None:
        self._file = file
        self._copies = copies or {}

    def find(self, gguf_name: str, expert: int | None) -> Spot | None:
        tensor = self._file.tensors.get(self._copies.get(gguf_name, gguf_name))
        if tensor is None:
            return None
        n_rows = tensor.shape[-2] if len(tensor.shape) > 1 else 1
        return Spot(gguf_name, (expert or 0) * n_rows, n_rows)

    def as_stored(self, values: Floats, gguf_name: str) -> Floats:
        return values


class FolderLocator(Locator):
    """Tensors of a Hugging Face folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def find(self, gguf_name: str, expert: int | None) -> Spot | None:
        tensor = self._tensor(gguf_name, expert)
        if tensor is None:
            return None
        if tensor.scale is not None:
            raise UnsupportedError(
                f"{tensor.spec.name!r} is stored as FP8 with scales, which cannot be edited",
                why="The scales would have to be computed anew.",
                next="Convert the folder to GGUF first, and merge into that: ollama-forge convert FOLDER -o model.gguf",
            )
        shape = tensor.spec.shape
        n_columns = shape[-1] if shape else 1
        row_size = tensor.spec.nbytes // max(1, math.prod(shape)) * n_columns
        n_rows = shape[-2] if len(shape) > 1 else 1
        is_transposed = tensor.row.transform is Transform.TRANSPOSE
        return Spot(tensor.spec.name, tensor.offset // max(1, row_size), n_rows, is_transposed)

    def as_stored(self, values: Floats, gguf_name: str) -> Floats:
        row = self._row(gguf_name)
        if row.transform is Transform.TRANSPOSE:
            return values
        return np.ascontiguousarray(layout.to_hf(values, row.transform, self._checkpoint.config))

    def _row(self, gguf_name: str) -> TensorRow:
        address = self._checkpoint.family.address_by_gguf_name(gguf_name)
        assert address is not None
        return address.row

    def _tensor(self, gguf_name: str, expert: int | None) -> StoredTensor | None:
        address = self._checkpoint.family.address_by_gguf_name(gguf_name)
        if address is None:
            return None
        row = address.row
        return self._checkpoint.tensors.get(TensorKey(row.role, address.layer, expert, row.is_bias))


def iter_rows(file: GGUFFile, name: str) -> Iterator[tuple[int, Floats]]:
    """(first row, rows) of a tensor, a piece at a time: float32 [n, columns]."""
    tensor = file.find_tensor(name)
    n_columns = tensor.shape[-1] if tensor.shape else 1
    stride = row_bytes(tensor.type, n_columns)
    total = math.prod(tensor.shape[:-1])
    at_once = max(1, PIECE_ELEMENTS // max(1, n_columns))
    view = file.read(name)
    for first in range(0, total, at_once):
        n_rows = min(at_once, total - first)
        yield first, dequantize(view[first * stride : (first + n_rows) * stride], tensor.type, (n_rows, n_columns))
    file.release(name)


def relative_difference(values: Floats, file: GGUFFile, name: str) -> float:
    """|values - base| / |values| for a whole tensor in GGUF's order."""
    wanted = difference = 0.0
    flat = values.reshape(-1, values.shape[-1])
    for first, rows in iter_rows(file, name):
        mine = flat[first : first + len(rows)]
        wanted += float(np.einsum("ij,ij->i", mine, mine).sum(dtype=np.float64))
        error = mine - rows
        difference += float(np.einsum("ij,ij->i", error, error).sum(dtype=np.float64))
    return math.sqrt(difference / wanted) if wanted else math.inf if difference else 0.0
