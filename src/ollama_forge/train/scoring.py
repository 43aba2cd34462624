"""How well a model predicts a text, and how far two models' predictions lie apart.

In: two models (packed GGUFs, or any transformers model) with one vocabulary, and `dataset.windows.Window`s. Out:
perplexities, the Kullback-Leibler divergence KL(against || this) of every scored token in nats, how often both prefer
the same token, and where they differ most. Logits exist for a few hundred tokens at a time, never for a whole text.

Every number is computed in float64 from float32 logits, so that a model against itself gives 0. The definitions are
those of llama.cpp's tool (tools/perplexity/perplexity.cpp), so that numbers can be compared.

One reference against many candidates: `capture_reference` once, then `compare(candidate, reference, windows)`. It keeps
hidden states (width numbers for a token), not probabilities (vocabulary numbers), and so is exact and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ollama_forge.dataset.windows import NOT_SCORED, Window
from ollama_forge.errors import TrainingError, UnsupportedError
from ollama_forge.train.comparison import Comparison, ComparisonTable, Estimate, perplexity_of, require_finite
from ollama_forge.train.load import PackedModel

LOGITS_BYTES = 96 << 20
"""Of one model's logits at one time; comparing holds two such pieces."""
BATCH_TOKENS = 2048
"""Tokens that run through the layers together: each layer is dequantized once for all of them."""
N_WORST = 10
_TILE_BYTES = 2 << 20  # turned into probabilities while in the processor's cache
_SCALE_KEYS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")

Model = PackedModel | nn.Module
"""A packed GGUF, a transformers causal language model, or one inside peft's wrapper."""


@dataclass(frozen=True, eq=False)
class TextScore:
    """One model on some windows.

    Attributes:
        tokens: scored.
        perplexity: e to the mean negative log-probability.
        log_probs: float64 [tokens], natural logarithms, in the order of the windows.
    """

    tokens: int
    perplexity: Estimate
    log_probs: torch.Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """What a comparison needs of a model, computed once.

    Attributes:
        model: its head is still read, so it must stay open (and its hooks on); its layers are not run again.
        hidden: float32 [tokens, width], the states before the head, at the places that predict the scored tokens.
        windows: on which it was computed.
    """

    model: Model
    hidden: torch.Tensor
    windows: tuple[Window, ...]


def score(model: Model, windows: Sequence[Window], advance: Callable[[int], None] | None = None) -> TextScore:
    """Log-probabilities of the scored tokens, and the perplexity.

    Args:
        advance: told of the tokens that were read.

    Raises:
        TrainingError: nothing is scored, a token lies outside the vocabulary, or the model's numbers are not finite.
    """
    _require_scored(windows)
    reader = _Reader(model)
    parts = []
    for batch in _batches(windows):
        hidden, labels = reader.states(batch)
        for chunk in _chunks(len(labels), reader.n_vocab):
            logits = reader.logits(hidden[chunk])
            parts += [_log_probs(logits[rows], labels[chunk][rows]) for rows in _tiles(logits)]
        _tell(advance, batch)
    log_probs = torch.cat(parts)
    require_finite(log_probs)
    return TextScore(len(log_probs), perplexity_of(-log_probs), log_probs)


def perplexity(model: Model, windows: Sequence[Window]) -> float:
    """e to the mean negative log-probability of the scored tokens."""
    return score(model, windows).perplexity.value


def capture_reference(
    model: Model, windows: Sequence[Window], advance: Callable[[int], None] | None = None
) -> Reference:
    """Run a model once, for many comparisons. 1,000 tokens of a model of width 4,096 take 16 MB.

    Raises:
        TrainingError: as `score`.
    """
    _require_scored(windows)
    reader = _Reader(model)
    parts = []
    for batch in _batches(windows):
        parts.append(reader.states(batch)[0])
        _tell(advance, batch)
    return Reference(model, torch.cat(parts), tuple(windows))


def compare(
    this: Model,
    against: Model | Reference,
    windows: Sequence[Window],
    *,
    n_worst: int = N_WORST,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Both models on the same windows.

    Args:
        this: the model that is judged.
        against: what it should be like, or what `capture_reference` kept of it for these very windows.
        advance: told of the tokens that were read.

    Raises:
        TrainingError: as `score`; or the models have vocabularies of different sizes.
    """
    _require_scored(windows)
    reader = _Reader(this)
    captured = against if isinstance(against, Reference) else None
    other = _Reader(against.model if isinstance(against, Reference) else against)
    if captured and captured.windows != tuple(windows):
        raise TrainingError(
            "The reference was computed on other windows", next="Compute it again for the windows that are compared."
        )
    if reader.n_vocab != other.n_vocab:
        raise TrainingError(
            f"The models have vocabularies of {reader.n_vocab:,} and {other.n_vocab:,} tokens",
            why="Probabilities can be compared token by token only.",
            next="Compare models that were made from the same base.",
        )
    table = ComparisonTable(n_worst)
    start = 0
    for batch in _batches(windows):
        hidden, labels = reader.states(batch)
        if captured:
            theirs = captured.hidden[start : start + len(labels)].to(hidden.device)
        else:
            theirs = other.states(batch)[0].to(hidden.device)
        start += len(labels)
        places = _places(batch)
        for chunk in _chunks(len(labels), reader.n_vocab):
            pair = reader.logits(hidden[chunk]), other.logits(theirs[chunk])
            for rows in _tiles(pair[0]):
                table.add(pair[0][rows], pair[1][rows], labels[chunk][rows], places[chunk][rows])
        _tell(advance, batch)
    return table.comparison(windows)


class _Reader:
    """A model below and above its last hidden states."""

    def __init__(self, model: Model) -> None:
        inner: Any = model.model if isinstance(model, PackedModel) else model
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()  # peft puts its layers into the model itself
        config = inner.config.get_text_config()
        scaled = [key for key in _SCALE_KEYS if getattr(config, key, None) not in (None, 1, 1.0)]
        if scaled:
            raise UnsupportedError(
                f"{type(inner).__name__!r} scales its logits ({scaled[0]!r})", why="Scoring does not know this family."
            )
        self._inner = inner
        self._head: nn.Module = inner.get_output_embeddings()
        self._softcap: float = getattr(config, "final_logit_softcapping", None) or 0.0
        self.n_vocab: int = self._head.out_features

    @torch.no_grad()
    def states(self, batch: Sequence[tuple[int, Window]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n, width] from which the scored tokens of a batch are predicted, and these tokens [n]."""
        length = max(len(window.input_ids) for _, window in batch)
        device = next(self._inner.parameters()).device
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full((len(batch), length), NOT_SCORED, dtype=torch.long)
        for row, (_, window) in enumerate(batch):
            ids[row, : len(window.input_ids)] = torch.tensor(window.input_ids)
            labels[row, : len(window.labels)] = torch.tensor(window.labels)
        wanted = labels[:, 1:]
        mask = wanted != NOT_SCORED
        if int(wanted.max()) >= self.n_vocab:
            raise TrainingError(
                f"The token {int(wanted.max())} lies outside the vocabulary of {self.n_vocab:,}",
                next="Tokenize with the tokenizer of this very model.",
            )
        was_training = self._inner.training
        self._inner.eval()
        # what pads a row stands behind its tokens, where causal attention never looks
        hidden = self._inner.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        self._inner.train(was_training)
        return hidden[:, :-1][mask.to(device)], wanted[mask].to(device)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float [n, width] -> float [n, vocabulary], as the model samples from them."""
        logits: torch.Tensor = self._head(hidden)
        return logits.div_(self._softcap).tanh_().mul_(self._softcap) if self._softcap else logits


def _log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    z = logits.double()
    return (z.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)).cpu()


def _batches(windows: Sequence[Window]) -> Iterator[list[tuple[int, Window]]]:
    """Windows with something to score, in their order, as many at once as `BATCH_TOKENS` has room for."""
    batch: list[tuple[int, Window]] = []
    length = 0
    for index, window in enumerate(windows):
        if not window.n_scored:
            continue
        length = max(length, len(window.input_ids))
        if batch and length * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, length = [], len(window.input_ids)
        batch.append((index, window))
    if batch:
        yield batch


def _places(batch: Sequence[tuple[int, Window]]) -> torch.Tensor:
    """(window, position) of each scored token, int64 [n, 2]."""
    return torch.tensor(
        [
            (index, position)
            for index, window in batch
            for position, label in enumerate(window.labels)
            if position and label != NOT_SCORED
        ]
    )


def _chunks(n: int, n_vocab: int) -> Iterator[slice]:
    """As few pieces as `LOGITS_BYTES` allows, all about equally long."""
    most = max(1, LOGITS_BYTES // (4 * n_vocab))
    step = -(-n // -(-n // most))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _tiles(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _TILE_BYTES // (8 * logits.shape[1]))
    return (slice(start, min(start + step, len(logits))) for start in range(0, len(logits), step))


def _tell(advance: Callable[[int], None] | None, batch: Sequence[tuple[int, Window]]) -> None:
    if advance:
        advance(sum(len(window.input_ids) for _, window in batch))


def _require_scored(windows: Sequence[Window]) -> None:
    if not any(window.n_scored for window in windows):
        raise TrainingError(
            f"None of the {len(windows)} windows has a token to score",
            next="Give a longer text, or prompts of at least two tokens.",
        )
