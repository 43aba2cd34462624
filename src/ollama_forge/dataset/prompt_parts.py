"""Lists of prompts divided by purpose, so that nothing is judged by what it was made from.

In: the prompts of one list. Out: those a direction is computed from, those by which a choice is made, and those by
which the result is judged. The division depends on nothing but the order in the list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TO_DIVIDE = 8


@dataclass(frozen=True)
class PromptParts:
    """One list, divided. `is_shared`: it was too short, and all three parts are the whole list."""

    computing: tuple[str, ...]
    choosing: tuple[str, ...]
    judging: tuple[str, ...]
    is_shared: bool = False


def divide_prompts(
    prompts: Sequence[str],
    *,
    n_computing: int | None = None,
    n_choosing: int | None = None,
    n_judging: int | None = None,
) -> PromptParts:
    """Of every four prompts two are for computing, one is for choosing and one for judging.

    Args:
        n_computing, n_choosing, n_judging: at most so many of each; None: all.
    """
    if len(prompts) < LEAST_TO_DIVIDE:
        whole = tuple(prompts)
        return PromptParts(whole[:n_computing], whole[:n_choosing], whole[:n_judging], is_shared=True)
    return PromptParts(
        tuple(prompt for index, prompt in enumerate(prompts) if index % 4 < 2)[:n_computing],
        tuple(prompts[2::4])[:n_choosing],
        tuple(prompts[3::4])[:n_judging],
    )
