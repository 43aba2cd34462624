"""The end of a downsizing: one table, one plot, one plain sentence.

In: measured models. Out: `comparison.png` and `report.html` in the working folder.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollama_forge.engine import GREEDY, open_engine
from ollama_forge.files import write_bytes
from ollama_forge.jobs.downsizing_plan import PipelinePlan

_SPOKEN_TOKENS = 64
_PROMPT = "The history of the world, told from the beginning, is this:"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class Row:
    """One model as it was measured.

    Attributes:
        kl_mean: mean divergence of the original's predictions from its own, nats per token.
        tokens_per_second: generated through the engine here; 0 where it said nothing.
    """

    name: str
    size_bytes: int
    perplexity: float
    kl_mean: float
    tokens_per_second: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "bytes": self.size_bytes}


def measure_speed(path: Path) -> float:
    """Tokens per second of one greedy answer, the second one: the first loads the weights."""
    from dataclasses import replace

    sampling = replace(GREEDY, max_tokens=_SPOKEN_TOKENS)
    with open_engine(path, context_length=512) as engine:
        engine.generate(_PROMPT, sampling)
        said = engine.generate(_PROMPT, sampling)
    return said.n_tokens / said.seconds if said.seconds > 0 else 0.0


def judge_rows(rows: Sequence[Row]) -> str:
    """Whether the result or the lower quantization of the original is the better choice; they are the last two rows."""
    result, lower = rows[-2], rows[-1]
    sizes = f"{result.size_bytes:,} and {lower.size_bytes:,} bytes"
    numbers = f"{result.kl_mean:.4f} and {lower.kl_mean:.4f} nats from the original, {sizes}"
    is_small = lower.size_bytes <= 1.05 * result.size_bytes
    if lower.kl_mean <= result.kl_mean and is_small:
        return (
            f"The lower quantization is the better choice: {lower.name!r} is as small as {result.name!r} and nearer to "
            f"the original ({numbers})."
        )
    if lower.kl_mean <= result.kl_mean:
        return (
            f"{lower.name!r} is nearer to the original than {result.name!r}, but larger ({numbers}): no plain "
            "quantization here is as small as the result."
        )
    return f"{result.name!r} is nearer to the original than {lower.name!r} ({numbers})."


def write_comparison(folder: Path, ref: str, rows: Sequence[Row], verdict: str, plan: PipelinePlan) -> Path:
    """Write `comparison.png` and `report.html`; returns the page's path."""
    picture = draw_comparison(rows)
    write_bytes(folder / "comparison.png", picture, overwrite=True)
    cells = "".join(
        f"<tr><td>{html.escape(row.name)}</td><td>{row.size_bytes:,}</td><td>{row.perplexity:.3f}</td>"
        f"<td>{row.kl_mean:.4f}</td><td>{row.tokens_per_second:.1f}</td></tr>"
        for row in rows
    )
    steps = "".join(
        f"<li>{step.n_layers} of {plan.n_layers} layers, then {step.tokens:,} tokens of healing</li>"
        for step in plan.steps
    )
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(ref)}, smaller</title><style>{_STYLE}</style><h1>{html.escape(ref)}, smaller</h1>"
        f"<p>{html.escape(verdict)}</p><ol>{steps}</ol>"
        "<table><tr><th>model</th><th>bytes</th><th>perplexity</th><th>KL divergence</th><th>tokens/s</th></tr>"
        f"{cells}</table>"
        f"<img alt='size and divergence' src='data:image/png;base64,{base64.b64encode(picture).decode()}'></html>"
    )
    path = folder / "report.html"
    write_bytes(path, page.encode(), overwrite=True)
    return path


def draw_comparison(rows: Sequence[Row]) -> bytes:
    """Size against divergence from the original, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(row.size_bytes / 1e6, row.kl_mean, "o", markersize=8)
        axes.annotate(row.name, (row.size_bytes / 1e6, row.kl_mean), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel("size (MB)")
    axes.set_ylabel("KL divergence from the original (nats per token)")
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
