"""One self-contained page about a measurement: numbers, pictures, and the places where the models differ most.

In: numbers and words. Out: the bytes of an HTML page with its picture inside and no outside link. All text from models
and files is escaped.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from ollama_forge.measure.comparison import Bucket, Comparison

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
    "mark{background:#fde68a}pre{white-space:pre-wrap;margin:0;font:14px/1.4 ui-monospace,monospace}"
)
Row = Sequence[str]


def draw_comparison(comparison: Comparison) -> bytes:
    """A PNG: how the divergence is spread, and divergence and perplexity by place in the window."""
    figure = Figure(figsize=(11, 3.6), dpi=120, layout="constrained")
    spread, places, surprise = figure.subplots(1, 3)
    values = sorted(comparison.kl_values.tolist())
    shares = [100 * (index + 1) / len(values) for index in range(len(values))]
    spread.plot([max(value, 1e-9) for value in values], shares, linewidth=1.4)
    spread.set_xscale("log")
    spread.set_xlabel("KL divergence of a token (nats)")
    spread.set_ylabel("tokens with at most that (%)")
    buckets = comparison.buckets
    centres = [(bucket.first + bucket.last) / 2 for bucket in buckets]
    places.bar(centres, [bucket.kl_mean for bucket in buckets], width=_width(buckets))
    places.set_xlabel("place in the window")
    places.set_ylabel("mean KL divergence (nats)")
    surprise.plot(centres, [bucket.perplexity_against for bucket in buckets], "o-", label="against", markersize=4)
    surprise.plot(centres, [bucket.perplexity_this for bucket in buckets], "o-", label="this", markersize=4)
    surprise.set_xlabel("place in the window")
    surprise.set_ylabel("perplexity")
    surprise.legend()
    for axes in (spread, places, surprise):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _width(buckets: Sequence[Bucket]) -> float:
    return 0.9 * max(bucket.last - bucket.first + 1 for bucket in buckets)


def render_measure_page(
    title: str,
    facts: Mapping[str, str],
    comparison: Comparison,
    positions: tuple[Row, Sequence[Row]],
    places: Sequence[tuple[str, str, str, str, str]],
) -> bytes:
    """The page.

    Args:
        facts: a table of two columns.
        positions: head and rows of the table by place in the window.
        places: (KL, text before, token, what the other model expected, what this one expects).
    """
    picture = base64.b64encode(draw_comparison(comparison)).decode()
    escape = html.escape
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in facts.items())
    head = "".join(f"<th>{escape(cell)}</th>" for cell in positions[0])
    body = "".join(
        "<tr>" + "".join(f"<td class='n'>{escape(cell)}</td>" for cell in row) + "</tr>" for row in positions[1]
    )
    said = "".join(
        f"<tr><td class='n'>{escape(kl)}</td><td><pre>{escape(before)}<mark>{escape(token)}</mark></pre></td>"
        f"<td>{escape(against)}</td><td>{escape(this)}</td></tr>"
        for kl, before, token, against, this in places
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<table>{rows}</table><img alt='divergence and perplexity' src='data:image/png;base64,{picture}'>"
        f"<h2>By place in the window</h2><table><tr>{head}</tr>{body}</table>"
        "<h2>Where they differ most</h2><p>The text, with the marked token as the one to predict, and what each model "
        "held likeliest there.</p>"
        f"<table><tr><th>KL</th><th>text</th><th>against</th><th>this</th></tr>{said}</table></html>"
    ).encode()
