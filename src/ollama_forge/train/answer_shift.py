"""Two models on the same answers: how far the predictions of one lie from the other's, at the first token and along.

In: two models, (prompt, answer) pairs as token ids, and windows of a text. Out: `AnswerScores`. The sums are
`scoring`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ollama_forge.dataset.verdicts import SURPRISE_TOKENS
from ollama_forge.dataset.windows import Window, make_window
from ollama_forge.train.scoring import Comparison, Scored, compare, score, vocabulary_size

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

    first_kl: torch.Tensor
    answers: Comparison
    text: Comparison | None
    surprises: Sequence[float | None] = ()


def compare_answers(
    this: Scored, against: Scored, pairs: Sequence[Pair], own: Sequence[Pair] = (), text: Sequence[Window] = ()
) -> AnswerScores:
    """Compare on every token of the answers, none of which is empty, and on a text.

    Args:
        pairs: what `against` answered.
        own: what `this` answered; `against` says how likely that is.

    Raises:
        TrainingError: the vocabularies differ, or the probabilities are not finite.
    """
    answers = compare(this, against, answer_windows(pairs))
    return AnswerScores(
        first_kl=answers.kl_values[first_places(pairs)],
        answers=answers,
        text=compare(this, against, text) if text else None,
        surprises=find_surprises(against, own),
    )


def find_surprises(model: Scored, pairs: Sequence[Pair]) -> list[float | None]:
    """For each answer the median of -ln(probability) / ln(vocabulary) over its tokens; None for a very short one.

    Raises:
        TrainingError: the probabilities are not finite.
    """
    wanted = [index for index, (_, answer) in enumerate(pairs) if len(answer) >= SURPRISE_TOKENS]
    found: list[float | None] = [None] * len(pairs)
    if not wanted:
        return found
    log_probs = score(model, answer_windows([pairs[index] for index in wanted])).log_probs
    largest = math.log(vocabulary_size(model))
    start = 0
    for index in wanted:
        end = start + len(pairs[index][1])
        found[index] = float(-log_probs[start:end].median()) / largest
        start = end
    return found


def answer_windows(pairs: Sequence[Pair]) -> tuple[Window, ...]:
    """Windows in which the tokens of the answers are scored and those of the prompts are not."""
    return tuple(make_window([*prompt, *answer], first_scored=len(prompt)) for prompt, answer in pairs)


def first_places(pairs: Sequence[Pair]) -> torch.Tensor:
    """Where the first token of each answer stands among all scored tokens, int64 [answers]."""
    lengths = torch.tensor([len(answer) for _, answer in pairs])
    return lengths.cumsum(0) - lengths
