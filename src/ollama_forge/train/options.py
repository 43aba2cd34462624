"""What a training run is asked to do, and what it tells: values without torch, so that a plan costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

IMPORTANCE_FILE = "imatrix.gguf"
"""Name of the importance matrix that a run leaves in its folder."""


ACTIVATION_ROOM_BYTES = 300_000_000
"""Room for activations: the inputs of all blocks, one block at work, and in the rest what is not computed a second time
(`train.recompute`)."""


KEPT_CHECKPOINTS = 2
"""Complete checkpoints that a run keeps; while a third is written there are three."""


LOGGERS = {
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""What transformers reports to, each with the packages of which it needs one; those that need a cluster, a workspace or
a second logger are not among them."""


@dataclass(frozen=True)
class LossPoint:
    """A loss (nats per token) after a number of optimizer steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class LoraOptions:
    """The adapter. `alpha` None: twice the rank. `target_modules` empty: every linear layer but head and experts."""

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    @property
    def scaled_alpha(self) -> float:
        """Alpha as it is used."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


@dataclass(frozen=True)
class LoopOptions:
    """The loop.

    Attributes:
        epochs, max_steps: whichever ends first; `max_steps` 0: no limit.
        batch_size, grad_accum: sequences per forward pass, and passes per optimizer step; 0 passes: chosen so that a
            small dataset still gives about ten steps an epoch, at most 8.
        warmup: steps, or below 1 the share of all steps, rounded down: a run of a few steps has none.
        early_stop: evaluations without improvement before it ends; 0: never.
        checkpoint_every: optimizer steps; 0: about ten in a run.
        checkpointing: recompute activations in backward instead of keeping them.
        device: `auto`, `cpu` or `cuda`.
        packed_length: tokens of a row that several examples share, none of which sees another; 0: one example a row.
        report_to: loggers of `LOGGERS` that are told of every step.
    """

    epochs: float = 3.0
    max_steps: int = 0
    learning_rate: float = 2e-4
    batch_size: int = 1
    grad_accum: int = 0
    warmup: float = 0.03
    scheduler: str = "cosine"
    weight_decay: float = 0.0
    seed: int = 0
    early_stop: int = 0
    checkpoint_every: int = 0
    checkpointing: bool = True
    device: str = "auto"
    packed_length: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepReport:
    """Where a run stands."""

    step: int
    total_steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class TrainedAdapter:
    """A finished run.

    Attributes:
        folder: PEFT layout: adapter_config.json and adapter_model.safetensors.
        base_loss: of the untouched model on the examples it is judged by, nats per token.
        final_loss: on the same examples afterwards.
    """

    folder: Path
    steps: int
    train_losses: tuple[LossPoint, ...]
    validation_losses: tuple[LossPoint, ...]
    base_loss: float
    final_loss: float
    n_trained_parameters: int
    n_tokens: int
    seconds: float
    warnings: tuple[str, ...] = ()


Watch = Callable[[StepReport], None]


def settle(loop: LoopOptions, n_rows: int) -> LoopOptions:
    """`loop` with nothing left to choose."""
    if loop.grad_accum:
        return loop
    return replace(loop, grad_accum=min(8, max(1, n_rows // (10 * loop.batch_size))))


def checkpoint_interval(loop: LoopOptions, total_steps: int) -> int:
    """Optimizer steps between two checkpoints."""
    return loop.checkpoint_every or max(1, total_steps // 10)


def plan_steps(n_rows: int, loop: LoopOptions, n_processes: int = 1) -> int:
    """Optimizer steps of a run; at least one."""
    loop = settle(loop, n_rows)
    per_epoch = max(1, math.ceil(n_rows / (loop.batch_size * loop.grad_accum * n_processes)))
    steps = max(1, math.ceil(per_epoch * loop.epochs))
    return min(steps, loop.max_steps) if loop.max_steps else steps
