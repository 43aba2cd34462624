"""Two models on the same answers: how far the predictions of one lie from the other's, at the first token and along.

In: a pair of models, (prompt, answer) pairs as token ids, and windows of a text. Out: `AnswerScores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ollama_forge.dataset.verdicts import SURPRISE_TOKENS
from ollama_forge.dataset.windows import Window, make_window
from ollama_forge.measure.comparison import Comparison, Numbers, TextScore
from ollama_forge.measure.pair import ScoredPair

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt, and of the answer to it."""


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """KL(against || this).

    Attributes:
        first_kl: float64 [answers], nats, of the first token of each answer.
        answers: over all tokens of the answers.
        text: over a text that neither wrote; None where there is none.
        surprises: of each of `this` model's own answers, see `find_surprises`.
    """

    first_kl: Numbers
    answers: Comparison
    text: Comparison | None
    surprises: Sequence[float | None] = ()


def compare_answers(
    models: ScoredPair, pairs: Sequence[Pair], own: Sequence[Pair] = (), text: Sequence[Window] = ()
) -> AnswerScores:
    """Compare on every token of the answers, none of which is empty, and on a text.

    Args:
        pairs: what the second model answered.
        own: what the first answered; the second says how likely that is.

    Raises:
        TrainingError: the vocabularies differ, or the probabilities are not finite.
    """
    answers = models.compare(answer_windows(pairs))
    return AnswerScores(
        first_kl=answers.kl_values[first_places(pairs)],
        answers=answers,
        text=models.compare(text) if text else None,
        surprises=find_surprises(models.score_against, own, models.n_vocab),
    )


def find_surprises(
    score: Callable[[Sequence[Window]], TextScore], pairs: Sequence[Pair], n_vocab: int
) -> list[float | None]:
    """For each answer the median of -ln(probability) / ln(vocabulary) over its tokens; None for a very short one.

    Raises:
        TrainingError: the probabilities are not finite.
    """
    wanted = [index for index, (_, answer) in enumerate(pairs) if len(answer) >= SURPRISE_TOKENS]
    found: list[float | None] = [None] * len(pairs)
    if not wanted:
        return found
    log_probs = score(answer_windows([pairs[index] for index in wanted])).log_probs
    start = 0
    for index in wanted:
        end = start + len(pairs[index][1])
        found[index] = float(np.median(-log_probs[start:end])) / math.log(n_vocab)
        start = end
    return found


def answer_windows(pairs: Sequence[Pair]) -> tuple[Window, ...]:
    """Windows in which the tokens of the answers are scored and those of the prompts are not."""
    return tuple(make_window([*prompt, *answer], first_scored=len(prompt)) for prompt, answer in pairs)


def first_places(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Where the first token of each answer stands among all scored tokens, int64 [answers]."""
    lengths = np.array([len(answer) for _, answer in pairs], np.int64)
    return np.cumsum(lengths) - lengths
