"""A matrix as GGUF blocks, and the one place where blocks become numbers while a model trains.

In: views of the memory-mapped blocks. Out: `PackedMatrix` (what is stored, and in which row order) and `Workspace` (the
pieces that were dequantized last, in memory of a fixed size). The layers over them are `train.packed`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ollama_forge.errors import TrainingError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.types import GGMLType, row_bytes
from ollama_forge.train.heap import HeapKeeper
from ollama_forge.train.unpack import UNPACKED_TYPES, unpack_blocks

# Three of the largest matrices of a 1 B model: room for whole ones, and for some that recomputation has just asked for.
# More of it saves less time than the same memory does in `train.tape`.
WORKSPACE_BYTES = 132 << 20
# torch operations make several arrays of this many numbers on the way.
_UNPACKED_AT_ONCE = 1 << 23
_DIRECT = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [rows, columns] as GGUF blocks, outermost first.

    Attributes:
        blocks: uint8 [rows, row_bytes]; usually a view of the memory-mapped file, never written.
        type: ggml's type of every row.
        columns: numbers in a row.
        rope_heads: 0, or the number of heads whose rows the GGUF holds in llama.cpp's rope order (pairs side by side);
            callers always see Hugging Face's order (halves one after the other).
        device: where the numbers are wanted; blocks that only ggml can read stay with the processor.
        lender: who has the blocks while they are shared out over processes (`train.shared_blocks`).
    """

    blocks: torch.Tensor
    type: GGMLType
    columns: int
    rope_heads: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    lender: Callable[[], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        expected = row_bytes(self.type, self.columns)
        if self.blocks.dtype != torch.uint8 or self.blocks.dim() != 2 or self.blocks.shape[1] != expected:
            raise TrainingError(
                f"blocks of shape {tuple(self.blocks.shape)!r} are no {self.type.name} matrix",
                why=f"A row of {self.columns} numbers takes {expected} bytes.",
            )
        if self.rope_heads and self.rows % (2 * self.rope_heads):
            raise TrainingError(
                f"{self.rows} rows cannot be split into {self.rope_heads} heads of an even size",
                why="Rotary embeddings turn pairs of rows within a head.",
            )

    @property
    def rows(self) -> int:
        return self.blocks.shape[0]

    def direct(self, dtype: torch.dtype) -> torch.Tensor | None:
        """The stored numbers themselves, [rows, columns], when they already have this dtype; else None."""
        if _DIRECT.get(self.type) != dtype:
            return None
        blocks = self.read()
        return blocks.view(dtype) if blocks.is_contiguous() and blocks.data_ptr() % dtype.itemsize == 0 else None

    def read(self) -> torch.Tensor:
        """The blocks, wherever they are: uint8 [rows, row_bytes]."""
        return self.blocks if self.lender is None else self.lender()

    def moved(self, place: Callable[[torch.Tensor], torch.Tensor]) -> PackedMatrix:
        """The matrix after `place`, a function that may put a tensor on another device."""
        device = place(torch.empty(0, device=self.device)).device
        if device == self.device:
            return self
        stays = self.lender is not None or self.type not in UNPACKED_TYPES
        return replace(self, blocks=self.blocks if stays else place(self.blocks), device=device)

    def from_rope_order(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """Reorder dimension `dim` (of `rows` entries) from the file's row order to Hugging Face's."""
        if not self.rope_heads:
            return values
        dim %= values.dim()
        pairs = values.unflatten(dim, (self.rope_heads, -1, 2))
        return pairs.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)

    def to_rope_order(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The reverse of `from_rope_order`."""
        if not self.rope_heads:
            return values
        dim %= values.dim()
        halves = values.unflatten(dim, (self.rope_heads, 2, -1))
        return halves.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A fresh dequantized copy [rows, columns] in Hugging Face's row order."""
        values = torch.empty(self.rows, self.columns, dtype=dtype, device=self.device)
        write_rows(self.read(), self.type, values)
        return self.from_rope_order(values, 0)


def write_rows(blocks: torch.Tensor, type: GGMLType, out: torch.Tensor) -> None:
    """Dequantize packed rows, uint8 [n, row_bytes], into `out` [n, columns] of any float dtype and device.

    On the processor ggml does it, with as many threads as torch uses; elsewhere torch operations over the blocks do.
    """
    if blocks.device.type != "cpu":
        step = max(1, _UNPACKED_AT_ONCE // out.shape[1])
        for start in range(0, out.shape[0], step):
            out[start : start + step] = unpack_blocks(blocks[start : start + step], type)
        return
    if out.device.type == "cpu" and out.dtype == torch.float32:
        target = out
    else:
        target = torch.empty(out.shape, dtype=torch.float32)
    if not blocks.is_contiguous():
        blocks = blocks.contiguous()
    dequantize(blocks.numpy(), type, tuple(target.shape), out=target.numpy(), n_threads=torch.get_num_threads())
    if target is not out:
        out.copy_(target)


class Workspace:
    """The numbers of the matrices used last, in one ring of fixed size per device and dtype.

    Backward asks for the matrices that recomputation has just asked for, in reverse: what is still in the ring is not
    dequantized again. The size bounds the memory, whatever the model's size. A lock is held while a piece is in use.
    """

    def __init__(self, capacity_bytes: int = WORKSPACE_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.heap = HeapKeeper()
        self._lock = threading.RLock()
        self._rings: dict[tuple[torch.device, torch.dtype], _Ring] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        return self

    def release(self) -> None:
        """Give the memory back; the next use takes it again."""
        with self._lock:
            self._rings.clear()

    @contextmanager
    def pieces(
        self, matrix: PackedMatrix, like: torch.Tensor, reverse: bool = False
    ) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        """Inside the block: yields (first row, end row, numbers [n, columns]) over all rows, in the file's row order.

        Each piece is valid until the next one is asked for. `like` gives device and dtype.
        """
        with self._lock:
            yield self._pieces(matrix, matrix.read(), like, reverse)

    def _pieces(
        self, matrix: PackedMatrix, blocks: torch.Tensor, like: torch.Tensor, reverse: bool
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        direct = matrix.direct(like.dtype) if matrix.device == like.device else None
        if direct is not None:
            yield 0, matrix.rows, direct
            return
        ring = self._rings.get((like.device, like.dtype))
        if ring is None:
            ring = _Ring(max(1, self.capacity_bytes // like.element_size()), like.device, like.dtype)
            self._rings[like.device, like.dtype] = ring
        step = max(1, min(matrix.rows, ring.capacity // 3 // matrix.columns))
        starts = range(0, matrix.rows, step)
        for start in reversed(starts) if reverse else starts:
            end = min(start + step, matrix.rows)
            yield start, end, ring.rows(matrix, blocks, start, end)


class _Ring:
    """A flat buffer that is filled round and round; an entry lives until the writing position comes back to it."""

    def __init__(self, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        self.capacity = capacity
        self._device = device
        self._dtype = dtype
        self._flat = torch.empty(0, device=device, dtype=dtype)
        self._position = 0
        # insertion order is ring order: the first entry is the one that will be overwritten first
        self._entries: dict[tuple[int, int], tuple[PackedMatrix, int, int]] = {}

    def rows(self, matrix: PackedMatrix, blocks: torch.Tensor, start: int, end: int) -> torch.Tensor:
        key = (id(matrix), start)
        size = (end - start) * matrix.columns
        found = self._entries.get(key)
        if found is None:
            offset = self._take(size)
        else:
            offset = found[1]
        values = self._flat[offset : offset + size].view(end - start, matrix.columns)
        if found is None:
            write_rows(blocks[start:end], matrix.type, values)
            # the matrix is kept beside its numbers so that its id stays its own
            self._entries[key] = (matrix, offset, offset + size)
        return values

    def _take(self, size: int) -> int:
        if size > self._flat.numel():
            # one row wider than a third of the ring, or the first use: pages become resident only when written
            self._entries.clear()
            self._flat = torch.empty(max(size, self.capacity), device=self._device, dtype=self._dtype)
            self._position = 0
        start = self._position
        if start + size > self._flat.numel():
            # the rest of the ring is too short: what lies there is the oldest, and goes first
            self._forget(start, self._flat.numel())
            start = 0
        end = start + size
        self._forget(start, end)
        self._position = end
        return start

    def _forget(self, start: int, end: int) -> None:
        """Drop the entries of a stretch that begins at the writing position: they are the oldest ones."""
        while self._entries:
            oldest = next(iter(self._entries))
            _, first, last = self._entries[oldest]
            if first >= end or last <= start:
                return
            del self._entries[oldest]
