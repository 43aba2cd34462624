"""How far a model moved from the one that it was made from: along harmless answers, and on a text.

In: both models, and what the original answered. Out: `AnswerShift`: the divergence of the first token, of all tokens of
these answers, and perplexities. Both run as they do in Ollama, with their adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.dataset.chat_format import chat_format_of
from ollama_forge.dataset.windows import DEFAULT_CONTEXT, Window, cut_windows, longest_window, text_ids
from ollama_forge.errors import UnsupportedError
from ollama_forge.jobs.measure import built_in_text
from ollama_forge.jobs.measure_models import (
    MeasuredModel,
    OpenModel,
    open_measured,
    validate_comparable,
)
from ollama_forge.jobs.measure_run import running_pair
from ollama_forge.jobs.refusal_answers import GivenAnswer
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.measure.answer_shift import AnswerScores, Pair, answer_windows, compare_answers


@dataclass(frozen=True)
class AnswerShift:
    """KL(against || this) in nats, over the original's own answers to the harmless prompts.

    Attributes:
        answers: how many.
        tokens: scored, end tokens included.
        first_kl: mean over the first token of each answer.
        first_kl_max: the largest of these.
        answer_kl: mean over all tokens.
        answer_kl_p99: 99 % are below.
        same_top: share of tokens at which both prefer the same.
        perplexity_this, perplexity_against: of these answers.
        text_perplexity_this, text_perplexity_against: of the text of this package.
        text_kl: mean over that text.
    """

    answers: int
    tokens: int
    first_kl: float
    first_kl_max: float
    answer_kl: float
    answer_kl_p99: float
    same_top: float
    perplexity_this: float
    perplexity_against: float
    text_perplexity_this: float
    text_perplexity_against: float
    text_kl: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return dict(self.__dict__)


def measure_shift(
    this: ResolvedModel, against: ResolvedModel, answers: Sequence[GivenAnswer], own: Sequence[GivenAnswer]
) -> tuple[AnswerShift, list[float | None]]:
    """Score the original's answers, and a text, with both models; and the other model's answers with the original.

    Args:
        answers: what `against` said to the harmless prompts.
        own: what `this` said; how surprising each of them is to `against` is the second part of the result.

    Raises:
        MissingExtraError: training's extra is not installed.
        UnsupportedError: a family without rows, or no answer at all.
        UsageError: the vocabularies differ. AdapterError, TrainingError: as `measure_models` and `measure.pair` say.
    """
    pairs = [(answer.prompt_ids, answer.token_ids) for answer in answers if answer.token_ids]
    if not pairs:
        raise UnsupportedError(f"{against.text!r} gave no answer to any harmless prompt")
    with contextlib.ExitStack() as files:
        scratch = files.enter_context(scratch_folder())
        first, second = (
            files.enter_context(open_measured(_with_adapters(model), scratch)) for model in (this, against)
        )
        validate_comparable(first, second)
        mine = [(answer.prompt_ids, answer.token_ids) for answer in own]
        scores = _compare(first, second, pairs, mine, _text(first, second))
    return _summary(scores), list(scores.surprises)


def _with_adapters(model: ResolvedModel) -> MeasuredModel:
    return MeasuredModel(model.text, model, tuple((path, 1.0) for path in model.adapters))


def _text(this: OpenModel, against: OpenModel) -> tuple[Window, ...]:
    limits = [model.context_length for model in (this, against) if model.context_length is not None]
    tokenizer = chat_format_of(this.gguf.metadata).tokenizer
    return cut_windows(tokenizer, text_ids(tokenizer, built_in_text()), min([DEFAULT_CONTEXT, *limits]))


def _compare(
    this: OpenModel, against: OpenModel, pairs: Sequence[Pair], own: Sequence[Pair], text: Sequence[Window]
) -> AnswerScores:
    longest = longest_window((*answer_windows([*pairs, *own]), *text))
    with running_pair(this, against, longest) as models:
        return compare_answers(models, pairs, own, text)


def _summary(scores: AnswerScores) -> AnswerShift:
    answers, text = scores.answers, scores.text
    assert text is not None
    return AnswerShift(
        answers=len(scores.first_kl),
        tokens=answers.tokens,
        first_kl=float(scores.first_kl.mean()),
        first_kl_max=float(scores.first_kl.max()),
        answer_kl=answers.kl.mean,
        answer_kl_p99=answers.kl.p99,
        same_top=answers.same_top.value,
        perplexity_this=answers.perplexity_this.value,
        perplexity_against=answers.perplexity_against.value,
        text_perplexity_this=text.perplexity_this.value,
        text_perplexity_against=text.perplexity_against.value,
        text_kl=text.kl.mean,
    )
