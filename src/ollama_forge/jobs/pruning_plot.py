"""The ranking of a pruning as a picture, or as a page that holds the picture and the numbers.

In: a `PrunedModel`. Out: a `.png`, or a `.html` without any outside link.
"""

from __future__ import annotations

import base64
import html
from pathlib import Path

from ollama_forge.errors import UsageError
from ollama_forge.files import refuse_existing, write_bytes
from ollama_forge.jobs.measure_models import require_matplotlib
from ollama_forge.jobs.pruning import PrunedModel
from ollama_forge.transform.ranking import render_layers

_SUFFIXES = (".png", ".html")
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:right}"
    "tr.goes{background:#f7e3de}img{max-width:100%}"
)


def require_plot(path: Path, *, overwrite: bool) -> None:
    """Refuse before any work what could not be drawn.

    Raises:
        UsageError: neither .png nor .html.
        MissingExtraError: nothing here can draw.
        ExistsError: it is there, and `overwrite` is false.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"--plot {str(path)!r} is neither a .png nor a .html file", next="Example: --plot ranking.html"
        )
    require_matplotlib()
    refuse_existing(path, overwrite=overwrite)


def write_plot(pruned: PrunedModel, path: Path, *, overwrite: bool = False) -> None:
    """Draw it.

    Raises:
        UsageError: nothing was measured, so there is nothing to draw.
    """
    from ollama_forge.train.ranking_plot import draw_ranking

    if pruned.importance is None:
        raise UsageError(
            "There is no ranking to draw", why="--drop-layers says which layers go, so nothing was measured."
        )
    goes = f"layers {render_layers(pruned.dropped)} go" if pruned.dropped else "all layers stay"
    title = f"{pruned.kept_share:.0%} of the parameters stay; {goes}"
    picture = draw_ranking(pruned.importance, pruned.dropped, title, pruned.parts)
    if path.suffix.lower() == ".html":
        write_bytes(path, _page(pruned, title, picture).encode(), overwrite=overwrite)
    else:
        write_bytes(path, picture, overwrite=overwrite)


def _page(pruned: PrunedModel, title: str, picture: bytes) -> str:
    importance = pruned.importance
    assert importance is not None
    rows = "".join(
        f"<tr{' class=goes' if layer in pruned.dropped else ''}><td>{layer}</td><td>{influence:.5f}</td>"
        f"<td>{importance.distance[layer, layer + 1]:.5f}</td></tr>"
        for layer, influence in enumerate(importance.influence.tolist())
    )
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{pruned.source_bytes:,} bytes become {pruned.size_bytes:,}; {importance.n_tokens:,} tokens were read.</p>"
        f"<img alt='ranking' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
        f"<table><tr><th>layer</th><th>influence</th><th>angle</th></tr>{rows}</table></html>"
    )
