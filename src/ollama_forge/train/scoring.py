"""How well a model predicts a text, and how far two models' predictions lie apart.

In: two models (packed GGUFs, or any transformers model) with one vocabulary, and `dataset.windows.Window`s. Out: what
`measure.comparison` makes of their logits, which exist for a few hundred tokens at a time, never for a whole text.
`measure.pair` does the same with models in llama.cpp's hands.

Every number is computed in float64 from float32 logits, so that a model against itself gives 0.

One reference against many candidates: `capture_reference` once, then `compare(candidate, reference, windows)`. It keeps
hidden states (width numbers for a token), not probabilities (vocabulary numbers), and so is exact and small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ollama_forge.dataset.windows import NOT_SCORED, Window, scored_places
from ollama_forge.errors import TrainingError, UnsupportedError
from ollama_forge.measure.comparison import (
    N_WORST,
    Comparison,
    ComparisonTable,
    TextScore,
    TokenScores,
    require_known,
    require_one_size,
    require_scored,
    text_score,
)
from ollama_forge.measure.logits import likeliest
from ollama_forge.train.load import PackedModel

LOGITS_BYTES = 96 << 20
"""Of one model's logits at one time; comparing holds two such pieces."""
BATCH_TOKENS = 2048
"""Tokens that run through the layers together: each layer is dequantized once for all of them."""
_TILE_BYTES = 2 << 20  # turned into probabilities while in the processor's cache
_SCALE_KEYS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")

Model = PackedModel | nn.Module
"""A packed GGUF, a transformers causal language model, or one inside peft's wrapper."""


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
    require_scored(windows)
    reader = _Reader(model)
    parts = []
    for batch in _batches(windows):
        hidden, labels = reader.states(batch)
        for chunk in _chunks(len(labels), reader.n_vocab):
            logits = reader.logits(hidden[chunk])
            parts += [_log_probs(logits[rows], labels[chunk][rows]) for rows in _tiles(logits)]
        _tell(advance, batch)
    return text_score(torch.cat(parts).numpy())


def perplexity(model: Model, windows: Sequence[Window]) -> float:
    """e to the mean negative log-probability of the scored tokens."""
    return score(model, windows).perplexity.value


def vocabulary_size(model: Model) -> int:
    """Tokens that the model knows."""
    return _Reader(model).n_vocab


def capture_reference(
    model: Model, windows: Sequence[Window], advance: Callable[[int], None] | None = None
) -> Reference:
    """Run a model once, for many comparisons. 1,000 tokens of a model of width 4,096 take 16 MB.

    Raises:
        TrainingError: as `score`.
    """
    require_scored(windows)
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
    require_scored(windows)
    captured = against if isinstance(against, Reference) else None
    reader, other = _Reader(this), _Reader(against.model if isinstance(against, Reference) else against)
    if captured and captured.windows != tuple(windows):
        raise TrainingError(
            "The reference was computed on other windows", next="Compute it again for the windows that are compared."
        )
    require_one_size(reader.n_vocab, other.n_vocab)
    table = ComparisonTable(n_worst)
    start = 0
    for batch in _batches(windows):
        hidden, labels = reader.states(batch)
        if captured:
            theirs = captured.hidden[start : start + len(labels)].to(hidden.device)
        else:
            theirs = other.states(batch)[0].to(hidden.device)
        start += len(labels)
        places = np.array([place for index, window in batch for place in scored_places(index, window)])
        for chunk in _chunks(len(labels), reader.n_vocab):
            pair = reader.logits(hidden[chunk]), other.logits(theirs[chunk])
            for rows in _tiles(pair[0]):
                _add(table, pair[0][rows], pair[1][rows], labels[chunk][rows], places[chunk][rows])
        _tell(advance, batch)
    return table.comparison(windows)


@dataclass(frozen=True)
class PackedPair:
    """Two models that torch runs; a `measure.pair.ScoredPair`."""

    this: Model
    against: Model

    @property
    def n_vocab(self) -> int:
        """Tokens that both know."""
        return vocabulary_size(self.against)

    def compare(
        self, windows: Sequence[Window], *, n_worst: int = N_WORST, advance: Callable[[int], None] | None = None
    ) -> Comparison:
        """See `compare`."""
        return compare(self.this, self.against, windows, n_worst=n_worst, advance=advance)

    def score_against(self, windows: Sequence[Window]) -> TextScore:
        """See `score`."""
        return score(self.against, windows)


def _add(
    table: ComparisonTable, this: torch.Tensor, against: torch.Tensor, labels: torch.Tensor, places: NDArray[np.int64]
) -> None:
    """Logits [n, vocabulary] of both, and the text's tokens [n], on whatever device they are."""
    z, w = this.double(), against.double()
    total_z, total_w = z.logsumexp(-1), w.logsumexp(-1)
    p = (w - total_w.unsqueeze(-1)).exp_()
    # a token of probability zero adds nothing, though its logit may be minus infinity
    kl = torch.where(p > 0, p * (w - z), 0).sum(-1) - total_w + total_z
    wanted = labels.unsqueeze(-1)
    columns = (
        z.gather(-1, wanted).squeeze(-1) - total_z,
        w.gather(-1, wanted).squeeze(-1) - total_w,
        kl.clamp_(min=0),
        z.argmax(-1) == w.argmax(-1),
    )
    scores = TokenScores(*(column.cpu().numpy() for column in columns))
    table.add(
        scores,
        labels.tolist(),
        places,
        lambda index: (likeliest(this[index].float().cpu().numpy()), likeliest(against[index].float().cpu().numpy())),
    )


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
        require_known([int(wanted.max())], self.n_vocab)
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
