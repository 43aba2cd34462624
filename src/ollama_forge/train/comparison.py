"""The numbers of a comparison of two models, gathered token by token.

In: logits of both at the same places, a few hundred at a time. Out: a `Comparison`. Everything is computed in float64,
so that equal logits give exactly 0. The definitions are those of llama.cpp's tool (tools/perplexity/perplexity.cpp).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ollama_forge.dataset.windows import Window
from ollama_forge.errors import TrainingError

N_BUCKETS = 8
N_TOP = 3
_SHOWN_BEFORE = 48


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
        top_this, top_against: (token id, probability) of the likeliest, likeliest first.
    """

    window: int
    position: int
    kl: float
    token_id: int
    before: tuple[int, ...]
    log_prob_this: float
    log_prob_against: float
    top_this: tuple[tuple[int, float], ...]
    top_against: tuple[tuple[int, float], ...]


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
    kl_values: torch.Tensor = field(repr=False)


class ComparisonTable:
    """Numbers of every scored token as they come, and the tokens that differ most."""

    def __init__(self, n_worst: int) -> None:
        self._n_worst = n_worst
        self._worst: list[tuple[float, int, int, dict[str, Any]]] = []
        self._columns: dict[str, list[torch.Tensor]] = {name: [] for name in ("this", "against", "kl", "same", "place")}

    def add(self, this: torch.Tensor, against: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> None:
        """Logits [n, vocabulary] of both, the text's tokens [n], and (window, position) of each [n, 2]."""
        z, w = this.double(), against.double()
        total_z, total_w = z.logsumexp(-1), w.logsumexp(-1)
        p = (w - total_w.unsqueeze(-1)).exp_()
        # a token of probability zero adds nothing, though its logit may be minus infinity
        kl = torch.where(p > 0, p * (w - z), 0).sum(-1) - total_w + total_z
        wanted = labels.unsqueeze(-1)
        row = {
            "this": z.gather(-1, wanted).squeeze(-1) - total_z,
            "against": w.gather(-1, wanted).squeeze(-1) - total_w,
            "kl": kl.clamp_(min=0),
            "same": (z.argmax(-1) == w.argmax(-1)).double(),
        }
        for name, values in row.items():
            self._columns[name].append(values.cpu())
        self._columns["place"].append(places[:, 1])
        self._keep_worst(row, (z, total_z), (w, total_w), labels, places)

    def _keep_worst(
        self,
        row: dict[str, torch.Tensor],
        this: tuple[torch.Tensor, torch.Tensor],
        against: tuple[torch.Tensor, torch.Tensor],
        labels: torch.Tensor,
        places: torch.Tensor,
    ) -> None:
        values = row["kl"].tolist()
        for index in heapq.nlargest(self._n_worst, range(len(values)), key=values.__getitem__):
            if len(self._worst) >= self._n_worst and values[index] <= self._worst[0][0]:
                return
            window, position = (int(number) for number in places[index])
            found = {
                "token_id": int(labels[index]),
                "log_prob_this": float(row["this"][index]),
                "log_prob_against": float(row["against"][index]),
                "top_this": _likeliest(this[0][index], this[1][index]),
                "top_against": _likeliest(against[0][index], against[1][index]),
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
        columns = {name: torch.cat(parts) for name, parts in self._columns.items()}
        for name in ("this", "against", "kl"):
            require_finite(columns[name])
        loss, base_loss = -columns["this"], -columns["against"]
        change = (-loss).exp() - (-base_loss).exp()
        n = len(loss)
        same = float(columns["same"].mean())
        return Comparison(
            tokens=n,
            perplexity_this=perplexity_of(loss),
            perplexity_against=perplexity_of(base_loss),
            log_ratio=_mean(loss - base_loss),
            kl=_spread(columns["kl"]),
            same_top=Estimate(same, math.sqrt(same * (1 - same) / max(1, n - 1))),
            probability_mean=float(change.mean()),
            probability_rms=float(change.square().mean().sqrt()),
            buckets=_buckets(columns),
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
            kl_values=columns["kl"],
        )


def _likeliest(logits: torch.Tensor, total: torch.Tensor) -> tuple[tuple[int, float], ...]:
    values, ids = logits.topk(min(N_TOP, len(logits)))
    return tuple(zip(ids.tolist(), (values - total).exp().tolist(), strict=True))


def _mean(values: torch.Tensor) -> Estimate:
    error = float(values.std(correction=0)) / math.sqrt(len(values) - 1) if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error)


def perplexity_of(losses: torch.Tensor) -> Estimate:
    """e to the mean of some negative log-probabilities."""
    mean = _mean(losses)
    value = math.exp(min(mean.value, 700.0))
    return Estimate(value, value * mean.error)


def _spread(values: torch.Tensor) -> Spread:
    mean = _mean(values)
    ordered = values.sort().values

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))

    return Spread(mean.value, mean.error, at(0.5), at(0.9), at(0.95), at(0.99), at(0.999), float(ordered[-1]))


def _buckets(columns: dict[str, torch.Tensor]) -> tuple[Bucket, ...]:
    places = columns["place"]
    first, end = int(places.min()), int(places.max()) + 1
    step = -(-(end - first) // N_BUCKETS)
    found = []
    for start in range(first, end, step):
        mask = (places >= start) & (places < start + step)
        n = int(mask.sum())
        if n:
            found.append(
                Bucket(
                    first=start,
                    last=min(start + step, end) - 1,
                    tokens=n,
                    kl_mean=float(columns["kl"][mask].mean()),
                    perplexity_this=perplexity_of(-columns["this"][mask]).value,
                    perplexity_against=perplexity_of(-columns["against"][mask]).value,
                    same_top=float(columns["same"][mask].mean()),
                )
            )
    return tuple(found)


def require_finite(values: torch.Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        TrainingError: there is one.
    """
    if not bool(values.isfinite().all()):
        n_bad = int((~values.isfinite()).sum())
        raise TrainingError(
            f"At {n_bad:,} of {len(values):,} tokens the model's probabilities are not finite numbers",
            why="Its weights hold NaN or infinity, or overflow on this text.",
            next="Make the model again from a source that is whole.",
        )
