"""What a distillation is asked to do, and what it tells: values without torch, so that a plan costs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from ollama_forge.errors import UsageError
from ollama_forge.train.options import LossPoint

CACHED_WORDS = 48
"""Most probable words that the cache of a teacher's predictions keeps for each position."""


class Divergence(str, Enum):
    """How far the student (q) is from its teacher (p), in nats per position.

    `FORWARD_KL` is KL(p || q): cover all that the teacher may say. `REVERSE_KL` is KL(q || p): say nothing that the
    teacher would not. `JSD` is b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q (Agarwal et al. 2023, "GKD",
    whose limits b -> 0 and b -> 1 are, scaled, the other two). `SORTED` compares the two distributions sorted by
    probability, word by word, whatever the words are (Boizard et al. 2024, "ULD"): for two tokenizers.
    """

    FORWARD_KL = "forward-kl"
    REVERSE_KL = "reverse-kl"
    JSD = "jsd"
    SORTED = "sorted"


@dataclass(frozen=True)
class DistillLoss:
    """What is minimised: ce_weight x cross-entropy + (1 - ce_weight) x temperature^2 x divergence.

    Attributes:
        beta: of `JSD`, strictly between 0 and 1.
        temperature: both distributions are softened by it. Its square keeps the size of the gradient, so that the
            share of the cross-entropy means the same at every temperature (Hinton et al. 2015).
        ce_weight: share of the cross-entropy with the data's own answers, 0 to 1.
    """

    divergence: Divergence = Divergence.FORWARD_KL
    beta: float = 0.5
    temperature: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.ce_weight <= 1 or not self.temperature > 0:
            raise UsageError(
                f"A cross-entropy share of {self.ce_weight!r} at temperature {self.temperature!r}",
                next="Give --ce-weight from 0 to 1, and a --kd-temperature above 0.",
            )
        if self.divergence is Divergence.JSD and not 0 < self.beta < 1:
            raise UsageError(
                f"--beta {self.beta!r} with jsd",
                why="At 0 and at 1 this divergence is 0 for every student.",
                next="Give --beta between 0 and 1, or --loss forward-kl or reverse-kl.",
            )


@dataclass(frozen=True)
class OnPolicy:
    """How often, and how, the student answers itself and its teacher scores that answer.

    Attributes:
        share: of the batches, 0 to 1; whether a batch is one is drawn from the run's seed and the step.
        max_tokens: of an answer.
        temperature: of the student's sampling.
    """

    share: float = 0.0
    max_tokens: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1 or self.max_tokens < 1 or not self.temperature > 0:
            raise UsageError(
                f"--on-policy {self.share!r} with {self.max_tokens!r} tokens at temperature {self.temperature!r}",
                next="Give a share from 0 to 1, at least one token, and a temperature above 0.",
            )


@dataclass(frozen=True)
class DistillOptions:
    """How to distil, beside the loop.

    Attributes:
        is_full: train every weight of the student instead of LoRA matrices.
        cached_words: keep the teacher's predictions on disk, so many words a position; 0: ask the teacher each time.
    """

    loss: DistillLoss = field(default_factory=DistillLoss)
    on_policy: OnPolicy = field(default_factory=OnPolicy)
    is_full: bool = False
    cached_words: int = 0

    def __post_init__(self) -> None:
        if self.cached_words and self.on_policy.share:
            raise UsageError(
                "--cache does not go with --on-policy",
                why="What the student will say is not known beforehand, so nothing can be kept of the teacher.",
                next="Leave one of them out.",
            )
        if self.loss.divergence is Divergence.SORTED and (self.cached_words or self.on_policy.share):
            raise UsageError(
                "--cache and --on-policy do not go with --align sorted",
                why="The two models read different tokens.",
                next="Leave them out.",
            )


@dataclass(frozen=True)
class TrainedStudent:
    """A finished distillation.

    Attributes:
        adapter: a PEFT folder; None after full training.
        model: a GGUF with all weights; None after training with LoRA.
        base_divergence, final_divergence: from the teacher on the rows it is judged by, before and after, nats per
            position (`SORTED`: half the sum of the differences).
        base_loss, final_loss: cross-entropy with the data's answers on the same rows, nats per token.
    """

    adapter: Path | None
    model: Path | None
    steps: int
    train_losses: tuple[LossPoint, ...]
    validation_losses: tuple[LossPoint, ...]
    base_divergence: float
    final_divergence: float
    base_loss: float
    final_loss: float
    n_trained_parameters: int
    n_tokens: int
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def result(self) -> Path:
        """What was made."""
        path = self.adapter or self.model
        assert path is not None
        return path
