"""Texts and prompts as rows of tokens on which models are compared: what they read, and which tokens are scored.

In: a tokenizer and a text, or rendered prompts. Out: `Window`s. A text is cut as llama.cpp's perplexity tool cuts it
(tools/perplexity/perplexity.cpp): whole windows only, the begin token over the first token of each where the model
begins texts with one, and only the second half of each window scored, so that every scored token has a context.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from ollama_forge.errors import UsageError
from ollama_forge.tokenizer.encode import GGUFTokenizer

NOT_SCORED = -100
DEFAULT_CONTEXT = 512


@dataclass(frozen=True)
class Window:
    """A row of tokens.

    Attributes:
        input_ids: what the models read.
        labels: the same id where the token is scored, -100 elsewhere; not shifted. The first is never scored.
    """

    input_ids: array[int]
    labels: array[int]

    @property
    def n_scored(self) -> int:
        """Tokens whose probability counts."""
        return len(self.labels) - 1 - self.labels[1:].count(NOT_SCORED) if self.labels else 0


def text_windows(tokenizer: GGUFTokenizer, text: str, context: int = DEFAULT_CONTEXT) -> tuple[Window, ...]:
    """Cut a text; words that look like special tokens stay words. See `cut_windows`.

    Raises:
        UsageError: fewer than two tokens, or a context below two.
    """
    return cut_windows(tokenizer, text_ids(tokenizer, text), context)


def text_ids(tokenizer: GGUFTokenizer, text: str) -> list[int]:
    """The tokens of a text, with the begin token in front where the model begins texts with one."""
    ids = tokenizer.encode(text, parse_special=False)
    return ids if _begin(tokenizer) is None else [tokenizer.bos_id or 0, *ids]


def cut_windows(tokenizer: GGUFTokenizer, ids: Sequence[int], context: int = DEFAULT_CONTEXT) -> tuple[Window, ...]:
    """Windows of exactly `context` tokens; what is left after the last whole one is not read.

    A text that does not fill one window becomes a shorter one, of which every token but the first is scored.

    Raises:
        UsageError: fewer than two tokens, or a context below four.
    """
    if context < 4:
        raise UsageError(f"A context of {context} tokens leaves nothing to score", next="Give --context 512, or more.")
    if len(ids) < 2:
        raise UsageError(
            f"The text has {len(ids)} token(s)",
            why="A token is scored by what stands before it, so two are needed; a few hundred say something.",
            next="Give a longer text with --text FILE, or leave the option out for the text of this package.",
        )
    if len(ids) < context:
        return (make_window(ids, first_scored=1),)
    begin = _begin(tokenizer)
    windows = []
    for start in range(0, len(ids) - context + 1, context):
        piece = list(ids[start : start + context])
        if begin is not None:
            piece[0] = begin
        windows.append(make_window(piece, first_scored=context // 2 + 1))
    return tuple(windows)


def make_window(ids: Sequence[int], first_scored: int = 1) -> Window:
    """A window whose tokens are scored from the index `first_scored` on."""
    labels = array("i", [NOT_SCORED]) * min(first_scored, len(ids)) + array("i", ids[first_scored:])
    return Window(array("i", ids), labels)


def scored_places(index: int, window: Window) -> list[tuple[int, int]]:
    """(index, position) of each scored token of the window with that index."""
    return [(index, position) for position, label in enumerate(window.labels) if position and label != NOT_SCORED]


def longest_window(windows: Sequence[Window]) -> int:
    """Tokens of the longest; 0 of none."""
    return max((len(window.input_ids) for window in windows), default=0)


def _begin(tokenizer: GGUFTokenizer) -> int | None:
    return tokenizer.bos_id if tokenizer.adds_bos else None
