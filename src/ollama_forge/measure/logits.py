"""Logits become the numbers of a comparison.

In: float32 logits of both models at the same places. Out: `TokenScores`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ollama_forge.measure.comparison import N_TOP, Numbers, TokenScores, Top

Logits = NDArray[np.float32]


def token_scores(this: Logits, against: Logits, labels: Sequence[int]) -> TokenScores:
    """Both models at some places.

    Args:
        this, against: [n, vocabulary].
        labels: the text's token at each.
    """
    z, w = this.astype(np.float64), against.astype(np.float64)
    same = z.argmax(-1) == w.argmax(-1)
    rows = np.arange(len(labels))
    with np.errstate(invalid="ignore"):  # of what is not finite is told at the end, with its place
        total_z, _ = _exponentials(z)
        total_w, p = _exponentials(w)
        this_label, against_label = z[rows, labels] - total_z, w[rows, labels] - total_w
        # a token of probability zero adds nothing, though its logit may be minus infinity
        np.subtract(w, z, out=w)
        np.multiply(p, w, out=w, where=p > 0)
        w[p == 0] = 0
        kl = w.sum(-1) - total_w + total_z
    return TokenScores(this_label, against_label, np.maximum(kl, 0), same)


def log_probs(logits: Logits, labels: Sequence[int]) -> Numbers:
    """Of the text's tokens, float64 [n]."""
    z = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        picked: Numbers = z[np.arange(len(labels)), labels] - _exponentials(z)[0]
    return picked


def likeliest(logits: Logits) -> Top:
    """The tokens that a row [vocabulary] holds likeliest."""
    z = logits.astype(np.float64)
    chosen = np.argsort(-z, kind="stable")[:N_TOP]
    total = _exponentials(z[None])[0][0]
    return tuple((int(index), float(np.exp(z[index] - total))) for index in chosen)


def _exponentials(z: Numbers) -> tuple[Numbers, Numbers]:
    """(logarithm of the sum of e^z of each row [n], probabilities [n, vocabulary])."""
    largest = z.max(-1, keepdims=True)
    p = np.exp(z - largest)
    sums = p.sum(-1, keepdims=True)
    p /= sums
    return (np.log(sums) + largest)[:, 0], p
