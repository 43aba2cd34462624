"""Who tells the student what to predict: a packed model that reads the same tokens, or what was kept of one on disk.

In: a batch of token rows and where loss is wanted. Out: `distill_loss.Targets` for these positions, in the order of the
batch. A teacher never learns; its logits exist a chunk at a time only, while they are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ollama_forge.dataset.align import AlignedRow
from ollama_forge.errors import TrainingError
from ollama_forge.train.distill_loss import LOWEST_LOG, DenseTargets, SparseTargets, Targets
from ollama_forge.train.load import PackedModel
from ollama_forge.train.loss import Head, chunk_size, find_head, write_logits

Batch = Mapping[str, Any]
"""`input_ids`, `attention_mask` and `labels`, int64 [batch, length], and `row`, int64 [batch]: the number of each row
in the whole data; -1 for rows that were not in it (the student's own answers)."""


class Teacher(Protocol):
    """Anything that can be asked."""

    def targets(self, batch: Batch) -> Targets:
        """The predictions at the positions that `wanted_positions` names."""
        ...

    def to(self, device: torch.device) -> None:
        """Be where the student is."""
        ...

    def modules(self) -> list[nn.Module]:
        """The models that answer while the student learns."""
        ...


def wanted_positions(batch: Batch) -> torch.Tensor:
    """Where a label follows, bool [batch, length - 1]."""
    mask: torch.Tensor = batch["labels"][:, 1:] != -100
    return mask


@dataclass(frozen=True, eq=False)
class PackedTeacher:
    """A model over GGUF blocks."""

    packed: PackedModel
    head: Head

    @torch.no_grad()
    def targets(self, batch: Batch) -> DenseTargets:
        """One forward pass without the head; hidden states [n, width]."""
        outputs = self.packed.model.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return DenseTargets(outputs.last_hidden_state[:, :-1][wanted_positions(batch)], self.head)

    def to(self, device: torch.device) -> None:
        self.packed.model.to(device)  # type: ignore[arg-type]

    def modules(self) -> list[nn.Module]:
        return [self.packed.model]


@dataclass(frozen=True, eq=False)
class AlignedTeacher:
    """A model with another tokenizer, which reads each example as its own template and tokens have it.

    Attributes:
        rows: in the order of the numbers of the data's rows.
    """

    teacher: PackedTeacher
    rows: Sequence[AlignedRow]

    @torch.no_grad()
    def targets(self, batch: Batch) -> DenseTargets:
        """Its predictions at the places that answer the student's labels."""
        device = batch["input_ids"].device
        model = self.teacher.packed.model.base_model
        states = []
        for number in batch["row"].tolist():
            row = self.rows[number]
            ids = torch.tensor([row.teacher_ids], device=device)
            hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state[0]
            states.append(hidden[torch.tensor(row.places, device=device) - 1])
        return DenseTargets(torch.cat(states), self.teacher.head)

    def to(self, device: torch.device) -> None:
        self.teacher.to(device)

    def modules(self) -> list[nn.Module]:
        return self.teacher.modules()


def packed_teacher(packed: PackedModel) -> PackedTeacher:
    """A teacher of a packed model.

    Raises:
        TrainingError: its head is of a kind that cannot be read in pieces.
    """
    packed.model.eval()
    head = find_head(packed.model)
    if head is None:
        raise TrainingError(
            f"The head of {str(packed.file.path)!r} scales its logits, which is not known here",
            next="Choose another teacher, or let it write answers: --align text",
        )
    return PackedTeacher(packed, head)


@torch.no_grad()
def most_probable(targets: DenseTargets, n_kept: int, n_words: int, temperature: float) -> SparseTargets:
    """The `n_kept` most probable of the first `n_words` words at each position, and what all others have together."""
    n, words = targets.n_rows, targets.head.layer.out_features
    kept = min(n_kept, n_words)
    device = targets.hidden.device
    ids = torch.empty(n, kept, dtype=torch.int64, device=device)
    log_probs = torch.empty(n, kept + 1, dtype=torch.float32, device=device)
    step = chunk_size(n, 2 * words)
    logits = torch.empty(step, words, dtype=torch.float32, device=device)
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        tile = logits[: chunk.stop - start]
        write_logits(targets.hidden[chunk], targets.head, tile)
        if targets.head.softcap:
            tile.div_(targets.head.softcap).tanh_().mul_(targets.head.softcap)
        shared = tile[:, :n_words].div_(temperature)
        shared.sub_(shared.logsumexp(-1, keepdim=True))
        log_probs[chunk, :kept], ids[chunk] = shared.topk(kept, dim=-1)
        others = shared.scatter_(-1, ids[chunk], -torch.inf).logsumexp(-1)
        log_probs[chunk, kept] = others.clamp_(min=LOWEST_LOG)
    return SparseTargets(ids, log_probs)
