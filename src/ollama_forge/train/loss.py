"""The language-model loss without the logits: straight from hidden states and the (packed) head, a chunk at a time.

In: the last hidden states [n, width], the head, a label per row. Out: log-probability, entropy and hit of each label,
and the gradient of the log-probability in the hidden states. The matrix [n, vocabulary] never exists whole, neither in
forward nor in backward. `install_chunked_loss` puts this into a transformers model, for its own Trainer and for TRL.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ollama_forge.errors import TrainingError
from ollama_forge.train.packed import PackedLinear

# Logits that exist at one time: 330 tokens of a 150,000-word vocabulary, 1,500 of a 32,000-word one. No layer's
# activations exist then, so this is not where memory peaks; fewer chunks dequantize the head less often.
LOGITS_BYTES = 192 << 20
# Rows are turned into probabilities this many bytes at a time, so that they stay in the processor's cache.
_TILE_BYTES = 2 << 20
_IGNORED = -100
# Families that scale their logits have a loss of their own in transformers; none of ours does.
_SCALE_KEYS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


@dataclass(frozen=True, eq=False)
class Head:
    """What turns hidden states into logits.

    Attributes:
        layer: a `PackedLinear` or a frozen `nn.Linear`, [vocabulary, width].
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2); 0 for none.
    """

    layer: nn.Linear
    softcap: float = 0.0

    @contextmanager
    def pieces(self, like: torch.Tensor, reverse: bool = False) -> Iterator[Iterator[tuple[int, int, torch.Tensor]]]:
        """Inside the block: yields (first word, end word, weights [words, width]) over the whole vocabulary."""
        if isinstance(self.layer, PackedLinear):
            with self.layer.workspace.pieces(self.layer.matrix, like, reverse) as pieces:
                yield pieces
        else:
            yield iter([(0, self.layer.out_features, self.layer.weight.detach().to(like.dtype))])


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One number per label.

    Attributes:
        log_probs: natural logarithm of the label's probability, float32 [n]; differentiable in the hidden states.
        entropy: of the predicted distribution, in nats, float32 [n].
        is_top1: whether the label is the most probable word, bool [n].
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


def score_labels(hidden: torch.Tensor, labels: torch.Tensor, head: Head) -> TokenScores:
    """Score a label per hidden state.

    Args:
        hidden: float [n, width]; the scores are differentiable in it.
        labels: int64 [n], each a word of the vocabulary (drop ignored positions first).
        head: frozen; gets no gradient.

    Raises:
        TrainingError: a label lies outside the vocabulary.
    """
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= head.layer.out_features):
        raise TrainingError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}",
            why=f"The model's vocabulary has {head.layer.out_features} words.",
            next="Tokenize with the tokenizer of this very model.",
        )
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return TokenScores(*_ScoreLabels.apply(hidden, labels, head, torch.is_grad_enabled()))


class _ScoreLabels(torch.autograd.Function):
    """Forward already computes d log_prob / d hidden, one row per label: the head is read twice, never three times."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: Head, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        needs_gradient = is_training and ctx.needs_input_grad[0]
        n, vocabulary = hidden.shape[0], head.layer.out_features
        log_probs = hidden.new_empty(n, dtype=torch.float32)
        entropy = torch.empty_like(log_probs)
        is_top1 = torch.empty(n, dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        step = chunk_size(n, vocabulary)
        logits = hidden.new_empty(step, vocabulary, dtype=torch.float32)
        for start in range(0, n, step):
            chunk = slice(start, min(start + step, n))
            tile = logits[: chunk.stop - chunk.start]
            write_logits(hidden[chunk], head, tile)
            _fold(tile, labels[chunk], head.softcap, log_probs[chunk], entropy[chunk], is_top1[chunk], needs_gradient)
            if gradient is not None:
                gradient[chunk] = through_head(tile, head, hidden)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1).to(gradient.dtype), None, None, None


def chunk_size(n: int, words: int) -> int:
    """Tokens per chunk, `words` float32 logits each: as few chunks as `LOGITS_BYTES` allows, all about equally long."""
    most = max(1, LOGITS_BYTES // (4 * words))
    n_chunks = max(1, -(-n // most))
    return max(1, -(-n // n_chunks))


def write_logits(hidden: torch.Tensor, head: Head, logits: torch.Tensor) -> None:
    """Logits before soft-capping, float32 [n, vocabulary], into `logits`."""
    with head.pieces(hidden) as pieces:
        for first, end, weight in pieces:
            if hidden.dtype == logits.dtype:
                torch.mm(hidden, weight.t(), out=logits[:, first:end])
            else:
                logits[:, first:end] = hidden @ weight.t()
    if head.layer.bias is not None:
        logits += head.layer.bias.detach()


def _fold(
    logits: torch.Tensor,
    labels: torch.Tensor,
    softcap: float,
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    is_top1: torch.Tensor,
    needs_gradient: bool,
) -> None:
    """Write the scores of a chunk; with `needs_gradient`, turn its logits into d log_prob / d logits in place."""
    step = max(1, _TILE_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        rows = slice(start, min(start + step, logits.shape[0]))
        z, wanted = logits[rows], labels[rows].unsqueeze(-1)
        if softcap:
            z.div_(softcap).tanh_()
            slope = 1 - z * z if needs_gradient else None
            z.mul_(softcap)
        else:
            slope = None
        is_top1[rows] = z.argmax(-1, keepdim=True).eq(wanted).squeeze(-1)
        z.sub_(z.logsumexp(-1, keepdim=True))
        log_probs[rows] = z.gather(-1, wanted).squeeze(-1)
        probabilities = z.exp()
        # a word of probability zero adds nothing, though its logarithm is minus infinity
        entropy[rows] = -torch.where(probabilities > 0, probabilities * z, 0).sum(-1)
        if needs_gradient:
            torch.neg(probabilities, out=z)
            z.scatter_add_(-1, wanted, torch.ones_like(wanted, dtype=z.dtype))
            if slope is not None:
                z.mul_(slope)


def through_head(slopes: torch.Tensor, head: Head, like: torch.Tensor) -> torch.Tensor:
    """d / d logits [n, vocabulary] -> d / d hidden float32 [n, width], summed in float32."""
    total = slopes.new_zeros(slopes.shape[0], like.shape[1])
    with head.pieces(like, reverse=True) as pieces:
        for first, end, weight in pieces:
            if like.dtype == total.dtype:
                total.addmm_(slopes[:, first:end], weight)
            else:
                total += slopes[:, first:end].to(like.dtype) @ weight
    return total


@dataclass
class ScoredOutput(ModelOutput):
    """What a model with the chunked loss returns when it is given labels; the fields that TRL's trainers read.

    Attributes:
        loss: mean (or sum over `num_items_in_batch`) of the negative log-probabilities, plus the weighted `aux_loss`.
        log_probs, entropy, is_top1: per position, [batch, length - 1]; zero where the label is -100.
        label_mask: where the label is not -100.
        aux_loss: load-balancing loss of a mixture of experts, when asked for.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def install_chunked_loss(model: PreTrainedModel) -> None:
    """Make `model(..., labels=...)` compute its loss in chunks and return a `ScoredOutput` without logits.

    Calls without labels (generation) are as before. TRL's trainers patch the model when they are made: call this
    again afterwards, with the model inside the peft wrapper; calling it twice is harmless.

    A head that learns (full fine-tuning, an adapter on `lm_head`) or that scales its logits keeps transformers' loss.
    """
    plain_forward = type(model).forward

    @functools.wraps(plain_forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        head = find_head(self)
        if head is None or (kwargs.get("labels") is None and kwargs.get("shift_labels") is None):
            kwargs.pop("fused_lm_head", None)
            return plain_forward(self, *args, **kwargs)
        return _score_batch(self, head, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def find_head(model: PreTrainedModel) -> Head | None:
    """The model's head, when it is a frozen linear layer without a scale of its own; else None."""
    layer = model.get_output_embeddings()
    config = model.config.get_text_config()
    is_plain = type(layer) in (nn.Linear, PackedLinear) and not scales_logits(config)
    if not is_plain or any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    return Head(layer, getattr(config, "final_logit_softcapping", None) or 0.0)


def scales_logits(config: Any) -> bool:
    """Whether a transformers configuration multiplies its logits by a number."""
    text = config.get_text_config()
    return any(getattr(text, key, None) not in (None, 1, 1.0) for key in _SCALE_KEYS)


def _score_batch(
    model: PreTrainedModel,
    head: Head,
    *args: Any,
    labels: Any = None,
    shift_labels: Any = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    fused_lm_head: bool = True,
    logits_to_keep: int = 0,
    **kwargs: Any,
) -> ScoredOutput:
    """Run the model below its head and score the labels of one batch, [batch, length]."""
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **kwargs)
    hidden = outputs.last_hidden_state
    wanted = shift_labels
    if wanted is None:
        hidden, wanted = hidden[:, :-1], labels[:, 1:]
    wanted = wanted.to(hidden.device)
    mask = wanted != _IGNORED
    scores = score_labels(hidden[mask], wanted[mask], head)
    n_items: Any = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -scores.log_probs.sum() / n_items
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _balance_loss(config, outputs.router_logits, kwargs.get("attention_mask"))
        loss = loss + config.router_aux_loss_coef * aux_loss
    return ScoredOutput(
        loss=loss,
        log_probs=_spread(scores.log_probs, mask),
        entropy=_spread(scores.entropy, mask),
        is_top1=_spread(scores.is_top1, mask),
        label_mask=mask,
        aux_loss=aux_loss,
    )


def _spread(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[n] values of the positions in `mask` -> [batch, length], zero elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _balance_loss(config: Any, router_logits: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss: Any = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    return torch.as_tensor(loss)
