"""Two loaded models that are compared on texts.

In: two models in llama.cpp's hands, and `dataset.windows.Window`s. Out: `Comparison` and `TextScore`. `ScoredPair` is
what such a pair can do, whatever runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ollama_forge.dataset.windows import Window, scored_places
from ollama_forge.engine_logits import LogitsEngine
from ollama_forge.gguf.native import usable_cores
from ollama_forge.measure.comparison import (
    N_WORST,
    Comparison,
    ComparisonTable,
    TextScore,
    TokenScores,
    Top,
    require_known,
    require_one_size,
    require_scored,
    text_score,
)
from ollama_forge.measure.logits import Logits, likeliest, log_probs, token_scores

_TILE_BYTES = 2 << 20  # turned into probabilities while in the processor's cache
Advance = Callable[[int], None]
"""Told of the tokens that were read."""


class ScoredPair(Protocol):
    """The model that is judged, and what it should be like."""

    @property
    def n_vocab(self) -> int:
        """Tokens that both know."""

    def compare(
        self, windows: Sequence[Window], *, n_worst: int = N_WORST, advance: Advance | None = None
    ) -> Comparison:
        """Both on the same windows.

        Raises:
            TrainingError: nothing is scored, a token lies outside the vocabulary, the vocabularies differ in size, or
                numbers are not finite.
        """

    def score_against(self, windows: Sequence[Window]) -> TextScore:
        """What the second model alone expects.

        Raises:
            TrainingError: as `compare`.
        """


@dataclass(frozen=True)
class EnginePair:
    """Two models that llama.cpp runs; they take turns, so that each has the whole machine while it computes."""

    this: LogitsEngine
    against: LogitsEngine

    @property
    def n_vocab(self) -> int:
        """Tokens that both know."""
        return self.against.n_vocab

    def compare(
        self, windows: Sequence[Window], *, n_worst: int = N_WORST, advance: Advance | None = None
    ) -> Comparison:
        """As `ScoredPair.compare`.

        Raises:
            EngineError: as `engine_logits`.
        """
        require_scored(windows)
        require_one_size(self.this.n_vocab, self.against.n_vocab)
        table = ComparisonTable(n_worst)
        with ThreadPoolExecutor(usable_cores()) as pool:
            for index, window, labels, wanted in self._asked(windows):
                places = np.array(scored_places(index, window))
                both = (model.logits(window.input_ids, wanted) for model in (self.this, self.against))
                start = 0
                for mine, theirs in zip(*both, strict=True):
                    rows = slice(start, start + len(mine))
                    scores = _token_scores(pool, mine, theirs, labels[rows])
                    table.add(scores, labels[rows], places[rows], _expectations(mine, theirs))
                    start = rows.stop
                if advance:
                    advance(len(window.input_ids))
        return table.comparison(windows)

    def score_against(self, windows: Sequence[Window]) -> TextScore:
        """As `ScoredPair.score_against`.

        Raises:
            EngineError: as `engine_logits`.
        """
        require_scored(windows)
        parts = []
        for _, window, labels, wanted in self._asked(windows):
            start = 0
            for logits in self.against.logits(window.input_ids, wanted):
                parts.append(log_probs(logits, labels[start : start + len(logits)]))
                start += len(logits)
        return text_score(np.concatenate(parts))

    def _asked(self, windows: Sequence[Window]) -> Iterator[tuple[int, Window, list[int], list[bool]]]:
        """(index, window, its scored tokens, of each token whether the one behind it is scored)."""
        for index, window in enumerate(windows):
            positions = [position for _, position in scored_places(index, window)]
            if positions:
                labels = [window.labels[position] for position in positions]
                require_known(labels, self.n_vocab)
                wanted = [False] * len(window.input_ids)
                for position in positions:
                    wanted[position - 1] = True
                yield index, window, labels, wanted


def _token_scores(pool: ThreadPoolExecutor, mine: Logits, theirs: Logits, labels: Sequence[int]) -> TokenScores:
    step = max(1, _TILE_BYTES // (8 * mine.shape[1]))

    def score_tile(start: int) -> TokenScores:
        rows = slice(start, start + step)
        return token_scores(mine[rows], theirs[rows], labels[rows])

    parts = list(pool.map(score_tile, range(0, len(mine), step)))
    return TokenScores(
        np.concatenate([part.this for part in parts]),
        np.concatenate([part.against for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.is_same_top for part in parts]),
    )


def _expectations(mine: Logits, theirs: Logits) -> Callable[[int], tuple[Top, Top]]:
    return lambda index: (likeliest(mine[index]), likeliest(theirs[index]))
