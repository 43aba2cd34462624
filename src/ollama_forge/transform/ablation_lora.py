"""An ablation as a LoRA, so that it can be switched off: the change of a matrix, -s B^T (B W), has the rank of B.

In: an open checkpoint and the projections of `ablation.plan_projections`. Out: fields and entries of a LoRA GGUF for
`gguf.writer.write_gguf`, exact in float32. A LoRA holds matrices only: what cannot be said in one is refused by name,
or, where it is the tied embedding, left out by the caller (llama.cpp stops on a LoRA for that).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ollama_forge.arch.rows import Role
from ollama_forge.errors import AdapterError
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import Field, TensorEntry, float32, plan_layout, string, uint32
from ollama_forge.transform.ablation_edits import StoredMatrix
from ollama_forge.transform.directions import Floats
from ollama_forge.transform.projection import Projection
from ollama_forge.weights.checkpoint import Checkpoint, TensorKey


@dataclass(frozen=True, eq=False)
class AblationLora:
    """A LoRA GGUF that is decided but not yet computed."""

    fields: tuple[Field, ...]
    entries: tuple[TensorEntry, ...]
    size_bytes: int


def can_be_lora(checkpoint: Checkpoint, item: Projection) -> bool:
    """Whether a LoRA can say what happens to the tensor, and llama.cpp does it."""
    row = item.tensor.row
    is_tied = TensorKey(Role.OUTPUT) not in checkpoint.tensors
    return not (row.is_bias or row.role is Role.POSITION_EMBEDDING or (row.role is Role.TOKEN_EMBEDDING and is_tied))


def plan_ablation_lora(checkpoint: Checkpoint, projections: Sequence[Projection]) -> AblationLora:
    """Decide everything; weights are read when they are written. `checkpoint` stays open until then.

    Raises:
        AdapterError: a tensor that a LoRA cannot change; it is named.
    """
    for item in projections:
        if not can_be_lora(checkpoint, item):
            raise AdapterError(
                f"{item.tensor.spec.name!r} cannot be changed by a LoRA",
                why="A LoRA holds changes of matrices alone, and this writes the residual stream, too.",
                next="Edit the weights instead: abliterate apply without --as-lora",
            )
    alpha = max(len(item.basis) for item in projections)
    entries: list[TensorEntry] = []
    by_name: dict[str, list[Projection]] = {}
    for item in projections:
        by_name.setdefault(item.tensor.gguf_name, []).append(item)
    for name, items in by_name.items():
        entries += _Pair(checkpoint, name, tuple(items), alpha).entries()
    fields = (
        string("general.architecture", checkpoint.family.gguf_architecture),
        string("general.type", "adapter"),
        uint32("general.quantization_version", 2),
        string("adapter.type", "lora"),
        float32("adapter.lora.alpha", float(alpha)),
    )
    return AblationLora(fields, tuple(entries), plan_layout(fields, entries).size_bytes)


@dataclass(frozen=True, eq=False)
class _Pair:
    """The two matrices of one GGUF tensor, or of a stack of experts."""

    checkpoint: Checkpoint
    name: str
    items: tuple[Projection, ...]
    alpha: int

    def entries(self) -> list[TensorEntry]:
        """A and B as llama.cpp wants them: alpha / rank is multiplied in when they are used."""
        first = self.items[0]
        rank = len(first.basis)
        if first.tensor.row.role is Role.TOKEN_EMBEDDING:
            # Rows are looked up in the first matrix here, so the pair stands the other way round.
            n_tokens, hidden = first.tensor.spec.shape
            return [
                self._entry("lora_a", (n_tokens, rank), self._looked_up),
                self._entry("lora_b", (hidden, rank), self._directions),
            ]
        hidden, n_inputs = first.tensor.spec.shape if first.axis == -2 else first.tensor.spec.shape[::-1]
        stack = (len(self.items),) if first.tensor.row.is_per_expert else ()
        return [
            self._entry("lora_a", (*stack, rank, n_inputs), self._along),
            self._entry("lora_b", (*stack, hidden, rank), self._directions),
        ]

    def _entry(
        self, half: str, shape: tuple[int, ...], values: Callable[[Projection], Iterator[Floats]]
    ) -> TensorEntry:
        def chunks() -> Iterator[Floats]:
            for item in self.items:
                for piece in values(item):
                    yield np.ascontiguousarray(piece, "<f4").reshape(-1)

        return TensorEntry(f"{self.name}.{half}", shape, GGMLType.F32, chunks)

    def _directions(self, item: Projection) -> Iterator[Floats]:
        """-s B^T, [hidden, k]."""
        yield (-item.strength * len(item.basis) / self.alpha * item.basis.T).astype(np.float32)

    def _looked_up(self, item: Projection) -> Iterator[Floats]:
        """E B^T, [tokens, k], a piece at a time."""
        for _, rows in _rows_of(self.checkpoint, item):
            yield rows @ item.basis.T

    def _along(self, item: Projection) -> Iterator[Floats]:
        """B W, [k, inputs]."""
        if item.axis == -1:
            yield np.concatenate([rows @ item.basis.T for _, rows in _rows_of(self.checkpoint, item)]).T
            return
        total = np.zeros((len(item.basis), item.tensor.spec.shape[-1]), np.float64)
        for first, rows in _rows_of(self.checkpoint, item):
            total += item.basis[:, first : first + len(rows)] @ rows
        yield total.astype(np.float32)


def _rows_of(checkpoint: Checkpoint, item: Projection) -> Iterator[tuple[int, Floats]]:
    """The rows of one matrix (of one expert), as they are stored."""
    tensor = item.tensor
    whole = StoredMatrix.of(checkpoint, tensor.spec.name)
    own = StoredMatrix(
        tensor.spec.name, tensor.spec.shape, whole.type, lambda: checkpoint.read_raw(tensor), whole.release
    )
    yield from own.iter_rows()
