"""Where ablations are tried before one is written: a loaded model, prompts that were kept aside, the refusal detector.

In: a GGUF, its directions, prompts. Out: for any `AblationOptions` a `TrialScore`: refusals and broken answers in short
greedy answers, and how far the harmless answers moved. The same detector judges the model that ships, in full answers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.refusal_markers import Markers
from ollama_forge.dataset.render import render_prompt
from ollama_forge.dataset.verdicts import Kind, Tally, count_verdicts, doubt_answer, judge_answer, without_thoughts
from ollama_forge.errors import DatasetError, UsageError
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.jobs.refusal_answers import require_template
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.run import opening_turns
from ollama_forge.tokenizer.decode import decode_tokens
from ollama_forge.weights.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from ollama_forge.train.ablation_trials import TrialModel
    from ollama_forge.transform.ablation import AblationOptions, Directions

TRIAL_TOKENS = 40
"""Refusals of most models show within so many tokens; the model that is chosen is asked for full answers."""


@dataclass(frozen=True)
class BenchRequest:
    """What trials are judged by.

    Attributes:
        harmful, harmless: prompts that no direction was computed from.
        max_tokens: of an answer.
        device: `auto`, `cpu` or `cuda`.
    """

    harmful: tuple[str, ...]
    harmless: tuple[str, ...]
    markers: Markers
    max_tokens: int = TRIAL_TOKENS
    device: str = "auto"


@dataclass(frozen=True)
class TrialScore:
    """What one ablation does. `kl` is along the harmless answers, `first_kl` at their first token, in nats."""

    tally: Tally
    first_kl: float
    kl: float

    @property
    def bad_rate(self) -> float:
        """Share of the answers that are refused or broken: a broken answer is no success."""
        return self.tally.rate(Kind.REFUSED) + self.tally.rate(Kind.DEGENERATE)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "asked": self.tally.n,
            "refused": self.tally.refused,
            "degenerate": self.tally.degenerate,
            "kl": self.kl,
            "first_kl": self.first_kl,
        }


class AblationBench:
    """A loaded model with its directions.

    Attributes:
        untouched: the score of the model as it is; both divergences are 0.
        untouched_harmless: what its answers to the harmless prompts are.
        n_layers: of the model.
    """

    def __init__(
        self,
        trials: TrialModel,
        checkpoint: Checkpoint,
        directions: Directions,
        chat_format: ChatFormat,
        markers: Markers,
    ) -> None:
        self._trials = trials
        self._checkpoint = checkpoint
        self._directions = directions
        self._chat_format = chat_format
        self._markers = markers
        self.n_layers = checkpoint.config.n_layers
        self.untouched = TrialScore(self._judge(trials.harmful_answers), 0.0, 0.0)
        self._require_answers(trials.harmful_answers)
        self.untouched_harmless = self._judge(trials.harmless_answers)

    def measure(self, options: AblationOptions) -> TrialScore:
        """Try one ablation; strengths of 0 everywhere are the untouched model.

        Raises:
            UsageError: options that mean nothing, or do not go with the directions.
        """
        from ollama_forge.transform.ablation import plan_projections

        projections = plan_projections(self._checkpoint, self._directions, options)
        found = self._trials.measure(projections)
        return TrialScore(self._judge(found.answers, found.surprises), found.first_kl, found.answer_kl)

    def _require_answers(self, answers: Sequence[Sequence[int]]) -> None:
        """Refuse to try anything on a model that is still thinking when its answer ends."""
        thoughts = [without_thoughts(text) is None for text in self._texts(answers)]
        if sum(thoughts) > len(thoughts) / 2:
            raise UsageError(
                f"{sum(thoughts)} of {len(thoughts)} answers of the untouched model are thoughts that do not end",
                why="It thinks before it answers, so within so few tokens nobody sees whether it refuses.",
                next="Let it speak longer: --trial-tokens 400, and --max-tokens 1000.",
            )

    def _texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        ends = self._chat_format.end_ids
        return [
            decode_tokens(self._chat_format.tokenizer, [token for token in answer if token not in ends])
            for answer in answers
        ]

    def _judge(self, answers: Sequence[Sequence[int]], surprises: Sequence[float | None] = ()) -> Tally:
        known = surprises or [None] * len(answers)
        return count_verdicts(
            doubt_answer(judge_answer(text, self._markers), surprise)
            for text, surprise in zip(self._texts(answers), known, strict=True)
        )


@contextlib.contextmanager
def open_bench(model: ResolvedModel, directions: Directions, request: BenchRequest) -> Iterator[AblationBench]:
    """Load the model and ask it everything once.

    Raises:
        TemplateError: no chat template. DatasetError: a prompt is longer than the context, or the files are swapped.
        UnsupportedError: a family without rows.
    """
    from ollama_forge.train.ablation_trials import TrialModel
    from ollama_forge.train.scored_model import ScoreOptions, scored_model

    assert model.gguf_path is not None
    require_template(model)
    with open_checkpoint(model.gguf_path) as checkpoint:
        assert checkpoint.gguf is not None
        chat_format = chat_format_of(checkpoint.gguf.metadata)
        prompts = [
            [prompt_ids(model, checkpoint.gguf, chat_format, prompt, request.max_tokens) for prompt in part]
            for part in (request.harmful, request.harmless)
        ]
        with scored_model(checkpoint.gguf, options=ScoreOptions(device=request.device)) as packed:
            trials = TrialModel(packed, prompts[0], prompts[1], chat_format.end_ids, request.max_tokens)
            bench = AblationBench(trials, checkpoint, directions, chat_format, request.markers)
            require_not_swapped(bench.untouched.tally, bench.untouched_harmless)
            yield bench


def require_not_swapped(harmful: Tally, harmless: Tally) -> None:
    """Refuse to take out what makes a model answer.

    Raises:
        DatasetError: the model refuses most of the harmless prompts and few of the harmful ones.
    """
    if harmless.rate(Kind.REFUSED) > 0.5 > 2 * harmful.rate(Kind.REFUSED):
        raise DatasetError(
            f"The two files look swapped: the model refuses {harmless.refused} of {harmless.n} harmless prompts and "
            f"{harmful.refused} of {harmful.n} harmful ones",
            why="With the files exchanged the direction would point the other way.",
            next="Exchange --harmful and --harmless.",
        )


def prompt_ids(model: ResolvedModel, gguf: GGUFFile, chat_format: ChatFormat, prompt: str, room: int = 0) -> list[int]:
    """What the engine sends for a prompt: the model's own opening turns, the prompt, and what makes it answer.

    Args:
        room: tokens that the answer needs.

    Raises:
        DatasetError: the prompt is longer than the context.
    """
    before = [{"role": turn.role, "content": turn.content} for turn in opening_turns(model)]
    ids = render_prompt(chat_format, [*before, {"role": "user", "content": prompt}])
    limit = gguf.arch_value("context_length")
    if isinstance(limit, int) and 0 < limit < len(ids) + room:
        raise DatasetError(
            f"A prompt has {len(ids):,} tokens, and with {room} for the answer the context of {limit:,} is too short: "
            f"{prompt[:60]!r}",
            why="Nothing is cut off a prompt in silence: another prompt would be measured.",
            next="Shorten or remove it.",
        )
    return ids
