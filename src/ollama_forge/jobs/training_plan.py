"""What a fine-tune will take, before it starts: memory from tensor shapes, steps, and how well it fits this machine.

In: the header of the base and the options. Out: `TrainingPlan`. No torch, and no weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.dataset.pack import pack_rows
from ollama_forge.dataset.tokenize import TokenizedDataset
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.jobs.environment import available_memory_bytes, count_gpus, fit_light
from ollama_forge.jobs.training_disk import TrainingDisk, estimate_seconds, plan_disk
from ollama_forge.train.options import ACTIVATION_ROOM_BYTES, LoopOptions, LoraOptions, plan_steps
from ollama_forge.train.targets import count_targets

RUNTIME_BYTES = 650 << 20  # torch, transformers, peft and TRL once they are imported
WORKSPACE_BYTES = 256 << 20  # dequantized pieces, and the logits of one chunk
_FLOAT_BYTES = 4
_OPTIMIZER_FLOATS = 4  # the matrix, its gradient, and Adam's two moments
_BLOCK_ROWS = 12  # hidden-sized activations that one block keeps while it is computed


@dataclass(frozen=True)
class TrainingPlan:
    """The sums of a run.

    Attributes:
        n_rows: that the examples make: fewer where several share one.
        light: `green` (fits with room), `yellow` (just fits), `red` (does not), `unknown`.
        n_trained_parameters: numbers in the LoRA matrices.
        n_experts_left: matrices of experts that get no LoRA matrices.
        disk: what is written, and where.
        seconds: on this processor, about; None where a card does the work, whose pace only the first steps show.
        unspared_bytes: the memory if every block kept its activations; the same as `memory_bytes` where all do.
    """

    base: str
    family: str
    base_bytes: int
    n_examples: int
    n_rows: int
    n_validation: int
    n_tokens: int
    n_learnt_tokens: int
    n_truncated: int
    longest: int
    steps: int
    n_trained_parameters: int
    n_experts_left: int
    memory_bytes: int
    unspared_bytes: int
    available_bytes: int | None
    disk: TrainingDisk
    seconds: float | None

    @property
    def folder(self) -> Path:
        return self.disk.folder

    @property
    def light(self) -> str:
        return fit_light(self.memory_bytes, self.available_bytes)

    @property
    def is_sparing_for_nothing(self) -> bool:
        """Whether memory would do without computing activations twice."""
        fits = fit_light(self.unspared_bytes, self.available_bytes) == "green"
        return fits and self.unspared_bytes > self.memory_bytes

    @property
    def expert_notes(self) -> tuple[str, ...]:
        """That the experts of a mixture stay as they are, where they do."""
        if not self.n_experts_left:
            return ()
        return (
            f"{self.n_experts_left:,} matrices of experts are not trained: only those that target modules name are.",
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person should know before it starts."""
        if self.light != "red":
            return self.expert_notes
        return (
            *self.expert_notes,
            f"This run wants about {self.memory_bytes / 1e9:.1f} GB; {(self.available_bytes or 0) / 1e9:.1f} GB are "
            "free: lower --max-length, --batch-size or --rank, or take a smaller base.",
        )

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "base": self.base,
            "family": self.family,
            "base_bytes": self.base_bytes,
            "examples": self.n_examples,
            "rows": self.n_rows,
            "validation_examples": self.n_validation,
            "tokens": self.n_tokens,
            "learnt_tokens": self.n_learnt_tokens,
            "truncated": self.n_truncated,
            "longest": self.longest,
            "steps": self.steps,
            "trained_parameters": self.n_trained_parameters,
            "untrained_expert_matrices": self.n_experts_left,
            "memory_bytes": self.memory_bytes,
            "unspared_memory_bytes": self.unspared_bytes,
            "available_bytes": self.available_bytes,
            **self.disk.document(),
            "seconds": None if self.seconds is None else round(self.seconds),
            "light": self.light,
            "workdir": str(self.folder),
        }


def plan_training(
    base: str,
    gguf: GGUFFile,
    train: TokenizedDataset,
    validation: TokenizedDataset | None,
    lora: LoraOptions,
    loop: LoopOptions,
    folder: Path,
) -> TrainingPlan:
    """The sums of a run over a GGUF.

    Raises:
        TrainingError: a target that the model does not have.
    """
    targets = count_targets(gguf, lora)
    packs = pack_rows(train.rows, loop.packed_length)
    length = max((sum(len(row.input_ids) for row in pack) for pack in packs), default=1)

    def memory(checkpointing: bool) -> int:
        return sum(training_memory(gguf, lora, length * loop.batch_size, checkpointing).values())

    steps = plan_steps(len(packs), loop)
    return TrainingPlan(
        base=base,
        family=find_family_by_gguf(gguf.architecture).name,
        base_bytes=gguf.size_bytes,
        n_examples=len(train.rows),
        n_rows=len(packs),
        n_validation=len(validation.rows) if validation else 0,
        n_tokens=train.n_tokens,
        n_learnt_tokens=train.n_learnt,
        n_truncated=train.n_truncated,
        longest=train.longest,
        steps=steps,
        n_trained_parameters=targets.n_parameters,
        n_experts_left=targets.n_experts_left,
        memory_bytes=memory(loop.checkpointing),
        unspared_bytes=memory(False),
        available_bytes=available_memory_bytes(),
        disk=plan_disk(gguf, targets.n_parameters, loop, steps, folder),
        seconds=training_seconds(gguf, train, loop, steps, 2),
    )


def training_seconds(
    gguf: GGUFFile, train: TokenizedDataset, loop: LoopOptions, steps: int, passes: float
) -> float | None:
    """How long the processor trains, about; None where a card may do it.

    Args:
        passes: over the weights for each token, beside the one that recomputing activations takes: 2 with LoRA, one
            forward and one backward.
    """
    if count_gpus() and loop.device != "cpu":
        return None
    n_rows = max(1, len(pack_rows(train.rows, loop.packed_length)))
    seen = min(n_rows * loop.epochs, steps * loop.batch_size * loop.grad_accum)
    return estimate_seconds(gguf, seen * train.n_tokens / n_rows, passes + (1 if loop.checkpointing else 0))


def training_memory(gguf: GGUFFile, lora: LoraOptions, n_positions: int, checkpointing: bool = True) -> dict[str, int]:
    """Bytes by what they are for, when `n_positions` tokens are trained on at once."""
    return {
        "weights": gguf.size_bytes,
        "runtime": RUNTIME_BYTES + WORKSPACE_BYTES,
        "optimizer": count_targets(gguf, lora).n_parameters * _FLOAT_BYTES * _OPTIMIZER_FLOATS,
        "activations": _activation_bytes(gguf, n_positions, checkpointing=checkpointing),
    }


def forward_memory(gguf: GGUFFile, n_positions: int) -> dict[str, int]:
    """Bytes by what they are for, when `n_positions` tokens only go through the packed model, one block at a time."""
    return {
        "weights": gguf.size_bytes,
        "runtime": RUNTIME_BYTES + WORKSPACE_BYTES,
        "activations": _block_bytes(gguf, n_positions),
    }


def _activation_bytes(gguf: GGUFFile, n_positions: int, *, checkpointing: bool) -> int:
    """With recomputation every block keeps its input, one at a time everything, and the others what fits beside it;
    without it, all blocks keep everything."""
    blocks = int(gguf.arch_value("block_count", 1))
    kept = n_positions * int(gguf.arch_value("embedding_length", 0)) * _FLOAT_BYTES * blocks
    every = _block_bytes(gguf, n_positions)
    if not checkpointing:
        return kept + every * blocks
    return kept + min(every * blocks, 2 * every + max(0, ACTIVATION_ROOM_BYTES - kept - every))


def _block_bytes(gguf: GGUFFile, n_positions: int) -> int:
    width = int(gguf.arch_value("embedding_length", 0))
    inner = gguf.arch_value("feed_forward_length", 4 * width)
    inner = max(inner) if not isinstance(inner, int) else inner
    heads = gguf.arch_value("attention.head_count", 1)
    heads = max(heads) if not isinstance(heads, int) else heads
    rows = n_positions * (_BLOCK_ROWS * width + 4 * int(inner)) * _FLOAT_BYTES
    return rows + n_positions * n_positions * int(heads) * _FLOAT_BYTES
