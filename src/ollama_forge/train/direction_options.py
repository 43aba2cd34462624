"""How directions are computed: a value without torch, so that a command can be refused before torch is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ollama_forge.errors import UsageError

METHODS = ("mean", "median")


@dataclass(frozen=True)
class DirectionOptions:
    """How directions are computed and which layer is chosen.

    Attributes:
        method: `mean`, the difference of the means; `median`, that of the geometric medians.
        n_directions: the first is that difference; the others are the strongest of what the pairs (first harmful with
            first harmless prompt, ...) differ in beside it.
        projected: without what lies along the mean of the harmless prompts.
        per_layer: each layer will use its own, not the best one's.
        layers: among which the best is chosen; empty: all of the first 80 %.
        positions: of the token in the prompt, from its end: -1 is the last one. Of several the best is chosen.
    """

    method: str = "mean"
    n_directions: int = 1
    projected: bool = False
    per_layer: bool = False
    layers: tuple[int, ...] = ()
    positions: tuple[int, ...] = (-1,)

    def validate(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: with the option.
        """
        if self.method not in METHODS:
            raise UsageError(
                f"There is no method {self.method!r}", why=f"Known: {', '.join(METHODS)}.", next="Use --method mean."
            )
        if self.n_directions < 1:
            raise UsageError(f"{self.n_directions} directions cannot be computed", next="Ask for 1 or more.")
        if not self.positions or any(position >= 0 for position in self.positions):
            raise UsageError(
                f"Positions {self.positions} are not counted from the end of the prompt", next="-1 is the last token."
            )
