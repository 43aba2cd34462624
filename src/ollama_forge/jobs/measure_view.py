"""A measurement in words, the same in the terminal and on the page.

In: a `Measurement`. Out: rows of text, or an HTML file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ollama_forge.files import write_bytes
from ollama_forge.jobs.measure import Measurement, Place

POSITION_HEAD = ("PLACES", "TOKENS", "MEAN KL", "PPL AGAINST", "PPL THIS", "SAME TOP")


def measured_facts(measured: Measurement) -> dict[str, str]:
    """The numbers, each with a name."""
    numbers = measured.comparison
    kl = numbers.kl
    return {
        "this": measured.this,
        "against": measured.against,
        "text": f"{measured.source}: {numbers.tokens:,} tokens scored in {measured.windows:,} windows of up to "
        f"{measured.context:,}" + (f"; {measured.left_out:,} left out" if measured.left_out else ""),
        "perplexity": f"{numbers.perplexity_this.value:.4f} ± {numbers.perplexity_this.error:.4f} (against: "
        f"{numbers.perplexity_against.value:.4f} ± {numbers.perplexity_against.error:.4f})",
        "change": f"{100 * _growth(numbers.log_ratio.value):+.2f} % ± {100 * numbers.log_ratio.error:.2f} %",
        "KL mean": f"{kl.mean:.6f} ± {kl.error:.6f} nats",
        "KL median": f"{kl.median:.6f}",
        "KL 99 %": f"{kl.p99:.6f}",
        "KL max": f"{kl.max:.6f}",
        "run by": "llama.cpp" if measured.engine == "llama.cpp" else "torch, over the packed blocks",
        "same top token": f"{100 * numbers.same_top.value:.2f} % ± {100 * numbers.same_top.error:.2f} %",
    }


def _growth(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, 700.0))


def position_rows(measured: Measurement) -> list[tuple[str, ...]]:
    """Rows under `POSITION_HEAD`."""
    return [
        (
            f"{bucket.first}-{bucket.last}",
            f"{bucket.tokens:,}",
            f"{bucket.kl_mean:.6f}",
            f"{bucket.perplexity_against:.3f}",
            f"{bucket.perplexity_this:.3f}",
            f"{100 * bucket.same_top:.1f} %",
        )
        for bucket in measured.comparison.buckets
    ]


def place_row(place: Place) -> tuple[str, str, str, str, str]:
    """(KL, text before, token, what the other model expected, what this one expects)."""
    return f"{place.kl:.4f}", place.before, place.token, expected(place.against), expected(place.this)


def expected(top: Sequence[tuple[str, float]]) -> str:
    """`' the' 61 %, ' a' 20 %`."""
    return ", ".join(f"{token!r} {100 * share:.0f} %" for token, share in top)


def write_measure_page(measured: Measurement, path: Path, *, overwrite: bool = False) -> None:
    """One self-contained HTML page.

    Raises:
        ExistsError: the file is there and `overwrite` is false.
    """
    from ollama_forge.measure.page import render_measure_page

    page = render_measure_page(
        f"{measured.this} beside {measured.against}",
        measured_facts(measured),
        measured.comparison,
        (POSITION_HEAD, position_rows(measured)),
        [place_row(place) for place in measured.places],
    )
    write_bytes(path, page, overwrite=overwrite)
