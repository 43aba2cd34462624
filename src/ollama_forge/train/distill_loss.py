"""How far a student's predictions are from its teacher's, without either one's logits: a chunk of positions at a time.

In: the student's last hidden states [n, width], a label per row, and the teacher's predictions for the same rows:
its own hidden states and head (`DenseTargets`), or its most probable words and what they leave (`SparseTargets`).
Out: the sum of the mixed loss, differentiable in the hidden states and in a head that learns. Neither matrix
[n, vocabulary] ever exists whole: `loss.LOGITS_BYTES` bounds both together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ollama_forge.errors import TrainingError
from ollama_forge.train.distill_options import DistillLoss, Divergence
from ollama_forge.train.loss import Head, chunk_size, through_head, write_logits

# Rows are compared this many bytes at a time, so that they stay in the processor's cache.
_TILE_BYTES = 2 << 20
# Stands for a probability of zero where its logarithm is multiplied by zero.
LOWEST_LOG = -60.0


@dataclass(frozen=True, eq=False)
class DenseTargets:
    """A teacher that was just asked: its last hidden states [n, its width] and what makes logits of them."""

    hidden: torch.Tensor
    head: Head

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """What was kept of a teacher's predictions.

    Attributes:
        ids: int64 [n, k], the most probable words of each row.
        log_probs: float32 [n, k + 1], natural logarithms of their probabilities and, last, of all others' together.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    @property
    def n_rows(self) -> int:
        return self.ids.shape[0]


Targets = DenseTargets | SparseTargets


@dataclass(frozen=True, eq=False)
class DistillScores:
    """Sums over the rows, float32 scalars.

    Attributes:
        loss: the mixture that `DistillLoss` describes; differentiable.
        divergence: from the teacher, in nats, at the temperature of the loss.
        cross_entropy: with the labels, in nats, at temperature 1.
    """

    loss: torch.Tensor
    divergence: torch.Tensor
    cross_entropy: torch.Tensor


def distill_scores(
    hidden: torch.Tensor, labels: torch.Tensor, targets: Targets, head: Head, loss: DistillLoss
) -> DistillScores:
    """Compare each row of the student with the teacher's.

    Args:
        hidden: float [n, width].
        labels: int64 [n], each a word of the vocabulary.
        targets: for the same n rows. Words beyond the smaller of the two vocabularies (padding) are left out of both
            distributions, except with `Divergence.SORTED`.
        head: the student's; its weight gets a gradient where it asks for one.

    Raises:
        TrainingError: the numbers of rows differ, or a label lies outside the vocabulary.
    """
    if targets.n_rows != hidden.shape[0] or labels.shape[0] != hidden.shape[0]:
        raise TrainingError(
            f"{targets.n_rows} rows of the teacher for {hidden.shape[0]} of the student",
            why="Both must have read the same tokens.",
            next="Remove the cached predictions of the teacher in the working folder, and run again.",
        )
    n_words = _shared_words(targets, head, loss)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= n_words):
        raise TrainingError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}",
            why=f"Teacher and student share {n_words} words.",
            next="Tokenize with the tokenizer of this very model.",
        )
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = head.layer.weight if head.layer.weight.requires_grad else None
    total, sums = _Compare.apply(hidden, weight, labels, targets, head, loss, n_words, torch.is_grad_enabled())
    return DistillScores(total, sums[0], sums[1])


def _shared_words(targets: Targets, head: Head, loss: DistillLoss) -> int:
    n_words = head.layer.out_features
    if isinstance(targets, DenseTargets) and loss.divergence is not Divergence.SORTED:
        return min(n_words, targets.head.layer.out_features)
    return n_words


class _Compare(torch.autograd.Function):
    """Forward already computes the gradients, so that each head is read as seldom as can be; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        labels: torch.Tensor,
        targets: Targets,
        head: Head,
        loss: DistillLoss,
        n_words: int,
        is_training: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden = is_training and ctx.needs_input_grad[0]
        wants_weight = is_training and weight is not None and ctx.needs_input_grad[1]
        n, words = hidden.shape[0], head.layer.out_features
        teacher_words = targets.head.layer.out_features if isinstance(targets, DenseTargets) else 0
        step = chunk_size(n, words + teacher_words)
        logits = hidden.new_empty(step, words, dtype=torch.float32)
        teacher = hidden.new_empty(step, teacher_words, dtype=torch.float32)
        sums = hidden.new_zeros(2, dtype=torch.float64)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if weight is not None and wants_weight else None
        for start in range(0, n, step):
            chunk = slice(start, min(start + step, n))
            tile, other = logits[: chunk.stop - start], teacher[: chunk.stop - start]
            write_logits(hidden[chunk], head, tile)
            if isinstance(targets, DenseTargets):
                write_logits(targets.hidden[chunk], targets.head, other)
            sums += _fold(tile, other, chunk, labels, targets, head.softcap, loss, n_words, wants_hidden)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = through_head(tile, head, hidden)
            if weight_gradient is not None:
                weight_gradient.addmm_(tile.t(), hidden[chunk].float())
        ctx.gradients = (hidden_gradient, weight_gradient)
        divergence, cross_entropy = sums
        share = loss.ce_weight
        total = share * cross_entropy + (1 - share) * loss.temperature**2 * divergence
        result = sums.float()
        ctx.mark_non_differentiable(result)
        return total.float(), result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        hidden, weight = (None if gradient is None else gradient * upstream.to(gradient.dtype)
                          for gradient in ctx.gradients)  # fmt: skip
        return (hidden, weight, *[None] * 6)


def _fold(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    chunk: slice,
    labels: torch.Tensor,
    targets: Targets,
    softcap: float,
    loss: DistillLoss,
    n_words: int,
    needs_gradient: bool,
) -> torch.Tensor:
    """(divergence, cross-entropy) of a chunk, float64 [2]; with `needs_gradient`, its logits become d loss / d logits.

    logits: the student's [n, words], before soft-capping. teacher: the teacher's [n, its words], or unused.
    """
    sums = logits.new_zeros(2, dtype=torch.float64)
    step = max(1, _TILE_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, min(start + step, logits.shape[0]))
        whole = slice(chunk.start + rows.start, chunk.start + rows.stop)
        z, slope = _capped(logits[rows, :n_words], softcap, needs_gradient)
        wanted = labels[whole].unsqueeze(-1)
        plain = z - z.logsumexp(-1, keepdim=True)
        sums[1] -= plain.gather(-1, wanted).sum(dtype=torch.float64)
        log_q = plain if loss.temperature == 1 else _log_softmax(z / loss.temperature)
        if isinstance(targets, SparseTargets):
            divergence, pull = _sparse(log_q, targets.ids[whole], targets.log_probs[whole], loss, needs_gradient)
        else:
            other, _ = _capped(teacher[rows], targets.head.softcap, needs_slope=False)
            divergence, pull = _dense(log_q, other, n_words, loss, needs_gradient)
        sums[0] += divergence.sum(dtype=torch.float64)
        if not needs_gradient:
            continue
        slopes = pull.mul_((1 - loss.ce_weight) * loss.temperature)
        if loss.ce_weight:
            certain = plain.exp_()
            certain.scatter_add_(-1, wanted, -torch.ones_like(wanted, dtype=certain.dtype))
            slopes.add_(certain, alpha=loss.ce_weight)
        logits[rows, :n_words] = slopes if slope is None else slopes.mul_(slope)
        logits[rows, n_words:] = 0
    return sums


def _capped(logits: torch.Tensor, softcap: float, needs_slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(soft-capped logits, d capped / d plain or None)."""
    if not softcap:
        return logits, None
    tanh = (logits / softcap).tanh_()
    return tanh * softcap, 1 - tanh * tanh if needs_slope else None


def _log_softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores - scores.logsumexp(-1, keepdim=True)


def _dense(
    log_q: torch.Tensor, teacher: torch.Tensor, n_words: int, loss: DistillLoss, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence [n], temperature x d divergence / d logits [n, words])."""
    if loss.divergence is Divergence.SORTED:
        return _sorted(log_q, _log_softmax(teacher / loss.temperature), needs_gradient)
    log_p = _log_softmax(teacher[:, :n_words] / loss.temperature)
    divergence, pull = _terms(log_q, log_p, loss)
    return divergence, pull.sub_(log_q.exp() * pull.sum(-1, keepdim=True)) if needs_gradient else pull


def _terms(log_q: torch.Tensor, log_p: torch.Tensor, loss: DistillLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence [n], q x d divergence / dq [n, words]); a constant may be added to the derivative: it cancels."""
    p, q = log_p.exp(), log_q.exp()
    if loss.divergence is Divergence.FORWARD_KL:
        return (p * (log_p - log_q)).sum(-1), p.neg_()
    if loss.divergence is Divergence.REVERSE_KL:
        pull = q * (log_q - log_p)
        return pull.sum(-1), pull
    beta = loss.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    pull = q.mul_(log_q - log_m).mul_(1 - beta)
    return beta * (p * (log_p - log_m)).sum(-1) + pull.sum(-1), pull


def _sorted(log_q: torch.Tensor, log_p: torch.Tensor, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the sum of the differences between the two distributions, each sorted by probability."""
    q = log_q.exp()
    ordered, words = q.sort(-1, descending=True)
    difference = torch.zeros(q.shape[0], max(q.shape[1], log_p.shape[1]), dtype=q.dtype, device=q.device)
    difference[:, : q.shape[1]] = ordered
    difference[:, : log_p.shape[1]] -= log_p.exp().sort(-1, descending=True).values
    divergence = difference.abs().sum(-1) / 2
    if not needs_gradient:
        return divergence, q
    pull = torch.empty_like(q).scatter_(-1, words, difference[:, : q.shape[1]].sign_().mul_(ordered).div_(2))
    return divergence, pull.sub_(q * pull.sum(-1, keepdim=True))


def _sparse(
    log_q: torch.Tensor, ids: torch.Tensor, log_p: torch.Tensor, loss: DistillLoss, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same when all words but the teacher's most probable ones count as a single one.

    Every divergence here falls when words are joined, so this is a lower bound of `_dense`; both are 0 for equals.
    """
    chosen = log_q.gather(-1, ids)
    others = log_q.scatter(-1, ids, -math.inf)
    rest = others.logsumexp(-1, keepdim=True).clamp_(min=LOWEST_LOG)
    divergence, pull = _terms(torch.cat([chosen, rest], -1), log_p.clamp(min=LOWEST_LOG), loss)
    if not needs_gradient:
        return divergence, pull
    spread = others.sub_(rest).exp_().mul_(pull[:, -1:]).scatter_(-1, ids, pull[:, :-1])
    return divergence, spread.sub_(log_q.exp() * pull.sum(-1, keepdim=True))
