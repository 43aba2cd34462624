"""What a training run takes on disk, and how long it takes, before it starts: from the header and the options.

In: the numbers that learn, the loop, where the result goes. Out: `TrainingDisk`, and an estimate of seconds.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ollama_forge.files import free_bytes, is_same_disk, require_free_space
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.train.options import KEPT_CHECKPOINTS, LoopOptions, checkpoint_interval

FLOAT_BYTES = 4
_CHECKPOINT_FLOATS = 3  # the number, and Adam's two moments
_SMALL_FILES_BYTES = 128 << 10  # of a checkpoint, beside numbers and tokenizer: states of the loop, and a card
_REPORT_BYTES = 512 << 10  # the page, the loss curve, the importance matrix
_TRIAL_SIZE, _TRIALS = 384, 5
_ELSEWHERE = "Free some space, or use another disk: --workdir FOLDER for the run, --store FOLDER for the model."


@dataclass(frozen=True)
class TrainingDisk:
    """Bytes that a run writes, by what they are for.

    Attributes:
        folder: the working folder, where all but `landing_bytes` and `cache_bytes` go.
        checkpoint_bytes: of one: the numbers that learn and the optimizer's state.
        n_checkpoints: that exist at one time; an old one goes when the new one is complete.
        result_bytes: the adapter (PEFT and GGUF) or the student's weights, and the report.
        landing_bytes: what the store gets that cannot be shared with files that are there.
        store: where that goes; None where nothing is landed on a disk here.
        cache_bytes: a teacher's predictions.
        cache: where these go.
    """

    folder: Path
    checkpoint_bytes: int
    n_checkpoints: int
    result_bytes: int
    landing_bytes: int = 0
    store: Path | None = None
    cache_bytes: int = 0
    cache: Path | None = None

    @property
    def total_bytes(self) -> int:
        work = self.checkpoint_bytes * self.n_checkpoints + self.result_bytes
        return work + self.landing_bytes + self.cache_bytes

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "disk_bytes": self.total_bytes,
            "disk": {
                "checkpoint_bytes": self.checkpoint_bytes,
                "checkpoints": self.n_checkpoints,
                "result_bytes": self.result_bytes,
                "landing_bytes": self.landing_bytes,
                "cache_bytes": self.cache_bytes,
                "free_bytes": free_bytes(self.folder),
            },
        }

    def require(self) -> None:
        """Refuse a run that would fill a disk; checkpoints that are there already count as room.

        Raises:
            DiskError: with the number of bytes that are missing, and where.
        """
        written = _size_of(self.folder.glob("checkpoint-*/*"))
        work = max(0, self.checkpoint_bytes * self.n_checkpoints - written) + self.result_bytes
        wanted = [(self.folder, work, "checkpoints and results of the run")]
        if self.cache is not None:
            missing = max(0, self.cache_bytes - _size_of(self.cache.glob("*")))
            wanted.append((self.cache, missing, "the teacher's predictions"))
        if self.store is not None:
            wanted.append((self.store, self.landing_bytes, "the landed model"))
        for place, _, what in wanted:
            together = sum(size for other, size, _ in wanted if is_same_disk(other, place))
            require_free_space(place, together, what, next=_ELSEWHERE)


def plan_disk(gguf: GGUFFile, n_learnt: int, loop: LoopOptions, steps: int, folder: Path) -> TrainingDisk:
    """The disk of a LoRA run that lands nothing.

    Args:
        n_learnt: numbers in the matrices.
    """
    return TrainingDisk(
        folder,
        checkpoint_bytes=checkpoint_bytes(gguf, n_learnt),
        n_checkpoints=count_checkpoints(loop, steps),
        result_bytes=2 * n_learnt * FLOAT_BYTES + _REPORT_BYTES,
    )


def checkpoint_bytes(gguf: GGUFFile, n_learnt: int) -> int:
    """One checkpoint: what learns, the optimizer, and the tokenizer, which takes about what the header takes."""
    header = gguf.size_bytes - sum(tensor.nbytes for tensor in gguf.tensors.values())
    return n_learnt * FLOAT_BYTES * _CHECKPOINT_FLOATS + 2 * header + _SMALL_FILES_BYTES


def count_checkpoints(loop: LoopOptions, steps: int) -> int:
    """Checkpoints that exist at one time; the oldest goes only when the newest is there."""
    return min(math.ceil(steps / checkpoint_interval(loop, steps)), KEPT_CHECKPOINTS + 1)


def estimate_seconds(gguf: GGUFFile, n_tokens: float, passes: float) -> float:
    """How long this processor multiplies for so many tokens that go through a model so many times."""
    return 2.0 * n_tokens * passes * _n_multiplied(gguf) / products_per_second()


def products_per_second() -> float:
    """Operations of this processor's matrix products in float32, the fastest of a few that take a moment."""
    one = np.ones((_TRIAL_SIZE, _TRIAL_SIZE), dtype=np.float32)
    fastest = math.inf
    for _ in range(_TRIALS):
        began = time.perf_counter()
        one @ one
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * _TRIAL_SIZE**3 / max(fastest, 1e-9)


def _n_multiplied(gguf: GGUFFile) -> float:
    """Weights that each token is multiplied by: of experts the few that it is sent to, and the head once."""
    n_experts = int(gguf.arch_value("expert_count", 0) or 0)
    share = int(gguf.arch_value("expert_used_count", 0) or 0) / n_experts if n_experts else 1.0
    total = 0.0
    for name, tensor in gguf.tensors.items():
        if name == "token_embd.weight" and "output.weight" in gguf.tensors:
            continue
        if len(tensor.shape) > 1:
            total += tensor.n_elements * (share if len(tensor.shape) > 2 else 1.0)
    return total


def _size_of(paths: Any) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
