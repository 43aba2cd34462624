"""One self-contained page about a training run, and its loss curve as a PNG.

In: numbers that were recorded during training. Out: `report.html` (the picture inside it, no outside link) and
`loss.png`. All text from data or models is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from ollama_forge.files import write_bytes
from ollama_forge.train.options import LossPoint

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}img{max-width:100%}pre{background:#f4f4f4;padding:.8rem;overflow:auto;white-space:pre-wrap}"
)


@dataclass(frozen=True)
class AnswerPair:
    """What the model said to one prompt before and after training."""

    prompt: str
    before: str
    after: str


def draw_losses(train: Sequence[LossPoint], validation: Sequence[LossPoint]) -> bytes:
    """The curves as a PNG."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot([p.step for p in train], [p.loss for p in train], label="training", linewidth=1.4)
    if validation:
        axes.plot([p.step for p in validation], [p.loss for p in validation], "o-", label="validation", markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def write_report(
    folder: Path,
    title: str,
    facts: Mapping[str, str],
    train: Sequence[LossPoint],
    validation: Sequence[LossPoint],
    answers: Sequence[AnswerPair],
    undo: Sequence[str],
) -> Path:
    """Write `report.html` and `loss.png` into `folder`; returns the page's path."""
    picture = draw_losses(train, validation)
    write_bytes(folder / "loss.png", picture, overwrite=True)
    rows = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in facts.items())
    said = "".join(
        f"<tr><td>{html.escape(pair.prompt)}</td><td>{html.escape(pair.before)}</td><td>{html.escape(pair.after)}</td></tr>"
        for pair in answers
    )
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<table>{rows}</table><h2>Loss</h2>"
        f"<img alt='loss curves' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
        + (
            f"<h2>Answers</h2><table><tr><th>prompt</th><th>before</th><th>after</th></tr>{said}</table>"
            if said
            else ""
        )
        + f"<h2>How to undo it</h2><pre>{html.escape(chr(10).join(undo))}</pre></html>"
    )
    path = folder / "report.html"
    write_bytes(path, page.encode(), overwrite=True)
    return path
