"""A teacher's predictions on disk, compressed: asked once, used in every epoch and by every later run.

For each position the most probable words and the logarithms of their probabilities, and what all others have together:
with 48 words 194 bytes a position where the vocabulary has up to 65,536 words, 242 bytes where it has more. Files of
`ROWS_PER_FILE` rows each, whole or absent: a run that was killed goes on with the first missing one, and several
processes share the work.

What it costs in exactness: at each position the gradient in the student's logits differs from that of the whole
distribution by at most 2 x the mass of the words that were not kept, plus 2 x 2^-11 x the entropy of the kept ones
(their logarithms are stored as 16-bit floats), as a sum of absolute values.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save
from torch import nn

from ollama_forge.dataset.tokenize import Tokenized
from ollama_forge.errors import TrainingError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.train.distill_loss import SparseTargets
from ollama_forge.train.teacher import Batch, PackedTeacher, most_probable

ROWS_PER_FILE = 64
FACTS_FILE = "facts.json"
_SMALL_VOCABULARY = 1 << 16
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class CacheFacts:
    """What predictions were kept; others lie in another folder.

    Attributes:
        teacher: SHA-256 of its weights.
        rows: hash of the token rows and of where loss is wanted.
        n_kept: words per position.
        n_words: of the vocabulary that teacher and student share.
    """

    teacher: str
    rows: str
    n_rows: int
    n_kept: int
    n_words: int
    temperature: float
    format: int = 1

    @property
    def folder_name(self) -> str:
        text = json.dumps(asdict(self), sort_keys=True)
        return "teacher-" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def position_bytes(self) -> int:
        """Bytes that one position takes."""
        kept = min(self.n_kept, self.n_words)
        return kept * (2 if self.n_words <= _SMALL_VOCABULARY else 3) + 2 * (kept + 1)


def hash_rows(rows: Sequence[Tokenized]) -> str:
    """One hash over token rows and their labels."""
    total = hashlib.sha256()
    for row in rows:
        total.update(np.array([len(row.input_ids), *row.input_ids, *row.labels], dtype="<i8").tobytes())
    return total.hexdigest()


@dataclass(eq=False)
class CachedTeacher:
    """What was kept of a teacher, read a row at a time from the mapped files."""

    folder: Path
    facts: CacheFacts
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def targets(self, batch: Batch) -> SparseTargets:
        """The predictions of the batch's rows.

        Raises:
            TrainingError: a row that was never asked about.
        """
        pairs = [self._read(int(row)) for row in batch["row"]]
        return SparseTargets(
            torch.cat([ids for ids, _ in pairs]).to(self.device),
            torch.cat([log_probs for _, log_probs in pairs]).to(self.device),
        )

    def to(self, device: torch.device) -> None:
        self.device = device

    def modules(self) -> list[nn.Module]:
        """None: it is read from the disk."""
        return []

    def _read(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= row < self.facts.n_rows:
            raise TrainingError(f"Row {row} is not among the {self.facts.n_rows} that the teacher was asked about")
        number, place = divmod(row, ROWS_PER_FILE)
        with safe_open(_file(self.folder, number), "numpy") as stored:
            start, end = (int(value) for value in stored.get_slice("offsets")[place : place + 2])
            ids, log_probs = stored.get_slice("ids")[start:end], stored.get_slice("log_probs")[start:end]
        chances = torch.from_numpy(log_probs.astype(np.float32))
        return torch.from_numpy(unpack_ids(ids)), chances - chances.logsumexp(-1, keepdim=True)


def build_cache(
    teacher: Callable[[], PackedTeacher],
    rows: Sequence[Tokenized],
    facts: CacheFacts,
    folder: Path,
    *,
    advance: Callable[[int], None] | None = None,
) -> CachedTeacher:
    """Ask about every row that is not on disk yet.

    Args:
        teacher: opens it; not called where nothing is missing.
        folder: holds one folder for each set of facts.
        advance: called with the number of tokens done.
    """
    place = folder / facts.folder_name
    make_folder(place)
    n_files = -(-len(rows) // ROWS_PER_FILE)
    rank, n_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    missing = [number for number in range(n_files) if not _file(place, number).exists()]
    mine = [number for number in missing if number % n_processes == rank]
    asked = teacher() if mine else None
    for number in mine:
        assert asked is not None
        part = rows[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]
        write_bytes(_file(place, number), _ask(asked, part, facts, advance), overwrite=True)
    if rank == 0 and not (place / FACTS_FILE).exists():
        write_bytes(place / FACTS_FILE, json.dumps(asdict(facts), indent=2, sort_keys=True).encode(), overwrite=True)
    while not all(_file(place, number).exists() for number in missing):
        time.sleep(_WAIT_SECONDS)  # another process of this run is at it
    return CachedTeacher(place, facts)


def _ask(
    teacher: PackedTeacher, rows: Sequence[Tokenized], facts: CacheFacts, advance: Callable[[int], None] | None
) -> bytes:
    offsets, ids, log_probs = [0], [], []
    device = next(teacher.packed.model.parameters()).device
    for row in rows:
        tokens = torch.tensor([row.input_ids], device=device)
        batch = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.tensor([row.labels], device=device),
        }
        kept = most_probable(teacher.targets(batch), facts.n_kept, facts.n_words, facts.temperature)
        offsets.append(offsets[-1] + kept.n_rows)
        ids.append(pack_ids(kept.ids.cpu().numpy(), facts.n_words))
        log_probs.append(kept.log_probs.cpu().numpy().astype(np.float16))
        if advance:
            advance(len(row.input_ids))
    return save(
        {
            "offsets": np.array(offsets, dtype=np.int64),
            "ids": np.concatenate(ids),
            "log_probs": np.concatenate(log_probs),
        }
    )


def pack_ids(ids: np.ndarray, n_words: int) -> np.ndarray:
    """int64 [n, k] as two bytes each where that is enough, else as three."""
    if n_words <= _SMALL_VOCABULARY:
        return ids.astype(np.uint16)
    return np.ascontiguousarray(ids.astype("<u4")[..., None].view(np.uint8)[..., :3])


def unpack_ids(ids: np.ndarray) -> np.ndarray:
    """The inverse, int64 [n, k]."""
    if ids.dtype == np.uint16:
        return ids.astype(np.int64)
    wide = np.zeros((*ids.shape[:-1], 8), dtype=np.uint8)
    wide[..., :3] = ids
    return wide.view("<i8")[..., 0]


def _file(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.safetensors"
