"""How well a model predicts a text, and how far two models' predictions lie apart.

In: two models (packed GGUFs, any transformers model, or llama.cpp itself) with one vocabulary, and
`dataset.windows.Window`s. Out: perplexities, the Kullback-Leibler divergence KL(against || this) of every scored token
in nats, how often both prefer the same token, and where they differ most. Logits exist for a few hundred tokens at a
time, never for a whole text.

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
from ollama_forge.engine_logits import LogitsEngine
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
Scored = Model | LogitsEngine
"""What can be scored: a model here, or one in llama.cpp's hands."""


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


def score(model: Scored, windows: Sequence[Window], advance: Callable[[int], None] | None = None) -> TextScore:
    """Log-probabilities of the scored tokens, and the perplexity.

    Args:
        advance: told of the tokens that were read.

    Raises:
        TrainingError: nothing is scored, a token lies outside the vocabulary, or the model's numbers are not finite.
        EngineError: as `engine_logits`.
    """
    _require_scored(windows)
    if isinstance(model, LogitsEngine):
        pieces = _engine_pieces(model, windows, advance)
    else:
        pieces = _pieces(model, windows, advance)
    parts = []
    for logits, labels in pieces:
        parts += [_log_probs(logits[rows], labels[rows]) for rows in _tiles(logits)]
    log_probs = torch.cat(parts)
    require_finite(log_probs)
    return TextScore(len(log_probs), perplexity_of(-log_probs), log_probs)


def perplexity(model: Scored, windows: Sequence[Window]) -> float:
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
    this: Scored,
    against: Scored | Reference,
    windows: Sequence[Window],
    *,
    n_worst: int = N_WORST,
    advance: Callable[[int], None] | None = None,
) -> Comparison:
    """Both models on the same windows.

    Args:
        this: the model that is judged.
        against: what it should be like, run as `this` is; or what `capture_reference` kept of it for these windows.
        advance: told of the tokens that were read.

    Raises:
        TrainingError: as `score`; or the models have vocabularies of different sizes.
        EngineError: as `engine_logits`.
    """
    _require_scored(windows)
    table = ComparisonTable(n_worst)
    if isinstance(this, LogitsEngine) and isinstance(against, LogitsEngine):
        pairs = _engine_pairs(this, against, windows, advance)
    else:
        assert not isinstance(this, LogitsEngine) and not isinstance(against, LogitsEngine)
        pairs = _pairs(this, against, windows, advance)
    for mine, theirs, labels, places in pairs:
        for rows in _tiles(mine):
            table.add(mine[rows], theirs[rows], labels[rows], places[rows])
    return table.comparison(windows)


def vocabulary_size(model: Scored) -> int:
    """Tokens that the model knows."""
    return model.n_vocab if isinstance(model, LogitsEngine) else _Reader(model).n_vocab


_Advance = Callable[[int], None] | None
_Piece = tuple[torch.Tensor, torch.Tensor]  # logits [n, vocabulary], tokens [n]
_Pair = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # logits of both, tokens [n], places [n, 2]


def _pieces(model: Model, windows: Sequence[Window], advance: _Advance) -> Iterator[_Piece]:
    reader = _Reader(model)
    for batch in _batches(windows):
        hidden, labels = reader.states(batch)
        for chunk in _chunks(len(labels), reader.n_vocab):
            yield reader.logits(hidden[chunk]), labels[chunk]
        _tell(advance, batch)


def _pairs(this: Model, against: Model | Reference, windows: Sequence[Window], advance: _Advance) -> Iterator[_Pair]:
    captured = against if isinstance(against, Reference) else None
    reader, other = _Reader(this), _Reader(against.model if isinstance(against, Reference) else against)
    if captured and captured.windows != tuple(windows):
        raise TrainingError(
            "The reference was computed on other windows", next="Compute it again for the windows that are compared."
        )
    _require_one_size(reader.n_vocab, other.n_vocab)
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
            yield reader.logits(hidden[chunk]), other.logits(theirs[chunk]), labels[chunk], places[chunk]
        _tell(advance, batch)


def _engine_pieces(model: LogitsEngine, windows: Sequence[Window], advance: _Advance) -> Iterator[_Piece]:
    for batch in _single(windows):
        labels = _scored_labels(batch[0][1], model.n_vocab)
        start = 0
        for logits in model.logits(batch[0][1].input_ids, _predicts(batch[0][1])):
            yield torch.from_numpy(logits), labels[start : start + len(logits)]
            start += len(logits)
        _tell(advance, batch)


def _engine_pairs(
    this: LogitsEngine, against: LogitsEngine, windows: Sequence[Window], advance: _Advance
) -> Iterator[_Pair]:
    """The two take turns, so that each has the whole machine while it computes."""
    _require_one_size(this.n_vocab, against.n_vocab)
    for batch in _single(windows):
        window, places = batch[0][1], _places(batch)
        labels, wanted = _scored_labels(window, this.n_vocab), _predicts(window)
        start = 0
        both = (model.logits(window.input_ids, wanted) for model in (this, against))
        for mine, theirs in zip(*both, strict=True):
            rows = slice(start, start + len(mine))
            yield torch.from_numpy(mine), torch.from_numpy(theirs), labels[rows], places[rows]
            start += len(mine)
        _tell(advance, batch)


def _single(windows: Sequence[Window]) -> Iterator[list[tuple[int, Window]]]:
    return ([(index, window)] for index, window in enumerate(windows) if window.n_scored)


def _predicts(window: Window) -> list[bool]:
    """Of each token, whether the one behind it is scored."""
    return [label != NOT_SCORED for label in window.labels[1:]] + [False]


def _scored_labels(window: Window, n_vocab: int) -> torch.Tensor:
    labels = torch.tensor([label for label in window.labels[1:] if label != NOT_SCORED])
    _require_known(labels, n_vocab)
    return labels


def _require_known(labels: torch.Tensor, n_vocab: int) -> None:
    if int(labels.max()) >= n_vocab:
        raise TrainingError(
            f"The token {int(labels.max())} lies outside the vocabulary of {n_vocab:,}",
            next="Tokenize with the tokenizer of this very model.",
        )


def _require_one_size(this: int, against: int) -> None:
    if this != against:
        raise TrainingError(
            f"The models have vocabularies of {this:,} and {against:,} tokens",
            why="Probabilities can be compared token by token only.",
            next="Compare models that were made from the same base.",
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
        _require_known(wanted, self.n_vocab)
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
