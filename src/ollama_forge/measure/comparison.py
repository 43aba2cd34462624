"""The numbers of a comparison of two models, gathered token by token.

In: `TokenScores`, a few hundred tokens at a time. Out: a `Comparison`. Everything is float64, so that equal logits give
exactly 0. The definitions are those of llama.cpp's tool (tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.dataset.windows import Window
from ollama_forge.errors import TrainingError

N_BUCKETS = 8
N_TOP = 3
N_WORST = 10
_SHOWN_BEFORE = 48

Numbers = NDArray[np.float64]
Top = tuple[tuple[int, float], ...]
"""(token id, probability) of the tokens that a model holds likeliest, likeliest first."""


@dataclass(frozen=True)
class Estimate:
    """A mean (or what was made of one) and its standard error."""

    value: float
    error: float

    def document(self) -> dict[str, float]:
        """The JSON form."""
        return {"value": self.value, "error": self.error}


@dataclass(frozen=True)
class Spread:
    """How some numbers are spread; percentiles are interpolated linearly."""

    mean: float
    error: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    max: float

    def document(self) -> dict[str, float]:
        """The JSON form."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Bucket:
    """The tokens that stand at places `first` to `last` (counted from 0) of their windows."""

    first: int
    last: int
    tokens: int
    kl_mean: float
    perplexity_this: float
    perplexity_against: float
    same_top: float

    def document(self) -> dict[str, float]:
        """The JSON form."""
        return dict(self.__dict__)


@dataclass(frozen=True)
class Divergence:
    """One token at which the models differ much.

    Attributes:
        window, position: which one; `position` is that of the scored token.
        kl: in nats.
        token_id: what the text has there.
        before: the tokens before it, at most 48.
        log_prob_this, log_prob_against: of that token.
        top_this, top_against: what each expected there.
    """

    window: int
    position: int
    kl: float
    token_id: int
    before: tuple[int, ...]
    log_prob_this: float
    log_prob_against: float
    top_this: Top
    top_against: Top


@dataclass(frozen=True, eq=False)
class Comparison:
    """`this` beside `against`, over all scored tokens.

    Attributes:
        tokens: scored.
        perplexity_this, perplexity_against: with standard errors.
        log_ratio: ln(perplexity_this / perplexity_against); its error knows that both read the same text.
        kl: of KL(against || this), nats.
        same_top: share of tokens at which both prefer the same.
        probability_mean, probability_rms: change of the probability of the text's own token, this - against.
        buckets: by place in the window.
        worst: the largest divergences, largest first.
        kl_values: float64 [tokens], in the order of the windows.
    """

    tokens: int
    perplexity_this: Estimate
    perplexity_against: Estimate
    log_ratio: Estimate
    kl: Spread
    same_top: Estimate
    probability_mean: float
    probability_rms: float
    buckets: tuple[Bucket, ...]
    worst: tuple[Divergence, ...]
    kl_values: Numbers = field(repr=False)


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
    log_probs: Numbers


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Both models at some places of a text.

    Attributes:
        this, against: float64 [n], the log-probability of the text's own token.
        kl: float64 [n], KL(against || this) in nats.
        is_same_top: bool [n], whether both prefer the same token.
    """

    this: Numbers
    against: Numbers
    kl: Numbers
    is_same_top: NDArray[np.bool_]


class ComparisonTable:
    """Numbers of every scored token as they come, and the tokens that differ most."""

    def __init__(self, n_worst: int) -> None:
        self._n_worst = n_worst
        self._worst: list[tuple[float, int, int, dict[str, Any]]] = []
        self._parts: list[tuple[TokenScores, NDArray[np.int64]]] = []

    def add(
        self,
        scores: TokenScores,
        labels: Sequence[int],
        places: NDArray[np.int64],
        likeliest: Callable[[int], tuple[Top, Top]],
    ) -> None:
        """The next tokens.

        Args:
            labels: the text's tokens.
            places: (window, position) of each, int64 [n, 2].
            likeliest: what `this` and `against` expect at the token of an index; asked of the worst only.
        """
        self._parts.append((scores, places[:, 1]))
        values = scores.kl.tolist()
        for index in heapq.nlargest(self._n_worst, range(len(values)), key=values.__getitem__):
            if len(self._worst) >= self._n_worst and values[index] <= self._worst[0][0]:
                return
            window, position = (int(number) for number in places[index])
            top_this, top_against = likeliest(index)
            found = {
                "token_id": int(labels[index]),
                "log_prob_this": float(scores.this[index]),
                "log_prob_against": float(scores.against[index]),
                "top_this": top_this,
                "top_against": top_against,
            }
            # of equal divergences the first in the text stays
            heapq.heappush(self._worst, (values[index], -window, -position, found))
            if len(self._worst) > self._n_worst:
                heapq.heappop(self._worst)

    def comparison(self, windows: Sequence[Window]) -> Comparison:
        """The numbers over all that was added.

        Raises:
            TrainingError: some are not finite.
        """
        scores = TokenScores(
            *(
                np.concatenate([getattr(part, name) for part, _ in self._parts])
                for name in ("this", "against", "kl", "is_same_top")
            )
        )
        positions = np.concatenate([places for _, places in self._parts])
        for values in (scores.this, scores.against, scores.kl):
            require_finite(values)
        change = np.exp(scores.this) - np.exp(scores.against)
        n = len(scores.kl)
        same = float(scores.is_same_top.mean())
        return Comparison(
            tokens=n,
            perplexity_this=perplexity_of(-scores.this),
            perplexity_against=perplexity_of(-scores.against),
            log_ratio=_mean(scores.against - scores.this),
            kl=_spread(scores.kl),
            same_top=Estimate(same, math.sqrt(same * (1 - same) / max(1, n - 1))),
            probability_mean=float(change.mean()),
            probability_rms=math.sqrt(float((change * change).mean())),
            buckets=_buckets(scores, positions),
            worst=tuple(
                Divergence(
                    window=-window,
                    position=-position,
                    kl=kl,
                    before=tuple(windows[-window].input_ids[max(0, -position - _SHOWN_BEFORE) : -position]),
                    **found,
                )
                for kl, window, position, found in sorted(self._worst, key=lambda item: item[:3], reverse=True)
            ),
            kl_values=scores.kl,
        )


def text_score(log_probs: Numbers) -> TextScore:
    """What is said of one model.

    Raises:
        TrainingError: some are not finite.
    """
    require_finite(log_probs)
    return TextScore(len(log_probs), perplexity_of(-log_probs), log_probs)


def _mean(values: Numbers) -> Estimate:
    error = float(values.std()) / math.sqrt(len(values) - 1) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error)


def perplexity_of(losses: Numbers) -> Estimate:
    """e to the mean of some negative log-probabilities."""
    mean = _mean(losses)
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value, value * mean.error)


def _spread(values: Numbers) -> Spread:
    mean = _mean(values)
    places = np.percentile(values, (50, 90, 95, 99, 99.9, 100))
    return Spread(mean.value, mean.error, *(float(place) for place in places))


def _buckets(scores: TokenScores, positions: NDArray[np.int64]) -> tuple[Bucket, ...]:
    first, end = int(positions.min()), int(positions.max()) + 1
    step = -(-(end - first) // N_BUCKETS)
    found = []
    for start in range(first, end, step):
        mask = (positions >= start) & (positions < start + step)
        n = int(mask.sum())
        if n:
            found.append(
                Bucket(
                    first=start,
                    last=min(start + step, end) - 1,
                    tokens=n,
                    kl_mean=float(scores.kl[mask].mean()),
                    perplexity_this=perplexity_of(-scores.this[mask]).value,
                    perplexity_against=perplexity_of(-scores.against[mask]).value,
                    same_top=float(scores.is_same_top[mask].mean()),
                )
            )
    return tuple(found)


def require_scored(windows: Sequence[Window]) -> None:
    """Refuse a text in which nothing is scored.

    Raises:
        TrainingError: that is so.
    """
    if not any(window.n_scored for window in windows):
        raise TrainingError(
            f"None of the {len(windows)} windows has a token to score",
            next="Give a longer text, or prompts of at least two tokens.",
        )


def require_known(labels: Sequence[int], n_vocab: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        TrainingError: with the largest.
    """
    if max(labels) >= n_vocab:
        raise TrainingError(
            f"The token {max(labels)} lies outside the vocabulary of {n_vocab:,}",
            next="Tokenize with the tokenizer of this very model.",
        )


def require_one_size(this: int, against: int) -> None:
    """Refuse vocabularies of different sizes.

    Raises:
        TrainingError: with both.
    """
    if this != against:
        raise TrainingError(
            f"The models have vocabularies of {this:,} and {against:,} tokens",
            why="Probabilities can be compared token by token only.",
            next="Compare models that were made from the same base.",
        )


def require_finite(values: Numbers) -> None:
    """Refuse NaN and infinity.

    Raises:
        TrainingError: there is one.
    """
    is_finite = np.isfinite(values)
    if not is_finite.all():
        n_bad = int((~is_finite).sum())
        raise TrainingError(
            f"At {n_bad:,} of {len(values):,} tokens the model's probabilities are not finite numbers",
            why="Its weights hold NaN or infinity, or overflow on this text.",
            next="Make the model again from a source that is whole.",
        )
