"""The values of `quantize --fit`: what is wanted, what has to be measured, and what came of it.

In: nothing; these are the types that `jobs.quantize_fit` fills, and the size as a person types it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import UsageError
from ollama_forge.jobs.conversion import ConvertedFile

OWN = "own mix"
UNCHANGED = "unchanged"
DEFAULT_CONTEXT = 8192
DEFAULT_PASSES = 200
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]I?)?B?", re.IGNORECASE)


@dataclass(frozen=True)
class FitRequest:
    """What is wanted.

    Attributes:
        limit_bytes: for weights, keys and values.
        context: tokens of keys and values; None: 8192, or what the model was trained for where that is less.
        text: what the model is run on while it is measured, whole.
        max_passes: runs of the model to find the mix with; blocks are put together until they suffice.
        device: `auto`, `cpu` or `cuda`.
    """

    limit_bytes: int
    text: str
    context: int | None = None
    max_passes: int = DEFAULT_PASSES
    device: str = "auto"


@dataclass(frozen=True)
class FitPoint:
    """A mix beside others: the bytes of its file, and its mean divergence from the source in nats."""

    name: str
    size_bytes: int
    kl: float
    fits: bool


@dataclass(frozen=True)
class FitChoice:
    """What one group of tensors became; `kl` is what it alone costs."""

    group: str
    tensors: int
    type: str
    size_bytes: int
    kl: float


@dataclass(frozen=True)
class FitPlan:
    """What has to be measured.

    Attributes:
        groups: parts that get their types together; the blocks lie in `bands`.
        passes: runs of the model that say what each part costs; `passes_missing` of them were not made before.
        mixes: whole mixes that are measured then, one run each.
        smallest_bytes, source_bytes: of the smallest file that can be made, and of the source in one file.
    """

    groups: int
    bands: int
    passes: int
    passes_missing: int
    mixes: int
    tokens_per_pass: int
    smallest_bytes: int
    source_bytes: int


@dataclass(frozen=True)
class Fit:
    """A model that fits, or with `is_dry_run` what would be measured.

    Attributes:
        kv_bytes: of keys and values at `context`.
        chosen: `own mix`, the name of a plain mix, or `unchanged`; empty where a dry run cannot know it yet.
        kl: of what was chosen, measured; None where nothing was.
        predicted_kl: the sum of the parts of the mix that was found.
        points: the plain mixes and the found one, smallest first.
        choices: the groups of the found mix.
        curve: (file bytes, predicted divergence) of the best mixes of all sizes, thinned out.
        written: the file.
    """

    limit_bytes: int
    context: int
    kv_bytes: int
    plan: FitPlan
    chosen: str
    kl: float | None
    predicted_kl: float | None
    points: tuple[FitPoint, ...]
    choices: tuple[FitChoice, ...]
    curve: tuple[tuple[int, float], ...]
    written: ConvertedFile | None
    passes_run: int
    seconds: float
    warnings: tuple[str, ...]
    is_dry_run: bool

    def document(self) -> dict[str, Any]:
        """The JSON form; what was written stands beside it, as `quantize` promises."""
        return {
            "limit": self.limit_bytes,
            "context": self.context,
            "kv_cache_bytes": self.kv_bytes,
            "total_bytes": (self.written.size_bytes + self.kv_bytes) if self.written else None,
            "chosen": self.chosen,
            "kl_divergence": self.kl,
            "predicted_kl_divergence": self.predicted_kl,
            "plan": dict(self.plan.__dict__),
            "passes_run": self.passes_run,
            "mixes": [dict(point.__dict__) for point in self.points],
            "groups": [dict(choice.__dict__) for choice in self.choices],
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def parse_limit(text: str) -> int:
    """`6GB`, `5.5 GiB`, `800M` or a number of bytes.

    Raises:
        UsageError: something else, or nothing.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UsageError(
            f"{text!r} is not a size", why="A number with MB, GB or GiB is expected.", next="Example: --fit 6GB"
        )
    return size
