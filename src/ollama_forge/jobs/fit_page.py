"""`quantize --fit` as a picture: what the plain mixes and the found one weigh and cost, and which parts got how much.

In: a `Fit`. Out: the bytes of a PNG, or of one self-contained HTML page (the picture inside it, no outside link).
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from ollama_forge.errors import UsageError
from ollama_forge.files import WrittenFile, write_bytes
from ollama_forge.jobs.fit_result import OWN, Fit

SUFFIXES = (".png", ".html")
_SMALLEST = 1e-7  # nats; a logarithmic axis has no 0
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}tr.taken{background:#e8f4e8}img{max-width:100%}"
)


def validate_plot_path(path: Path) -> None:
    """Refuse a name that is neither a PNG's nor a page's, before any work.

    Raises:
        UsageError: with the names that are possible.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--plot {str(path)!r} is neither a .png nor an .html",
            why="The ending says which of the two is written.",
            next=f"Example: --plot {path.stem or 'fit'}.html",
        )


def write_plot(fit: Fit, title: str, path: Path, *, overwrite: bool = False) -> WrittenFile:
    """Write the picture or the page.

    Raises:
        ExistsError: it is there and `overwrite` is false.
    """
    picture = draw_fit(fit)
    content = picture if path.suffix.lower() == ".png" else render_page(fit, title, picture)
    return write_bytes(path, content, overwrite=overwrite)


def draw_fit(fit: Fit) -> bytes:
    """The PNG: divergence over file size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    unit = 1e9 if fit.limit_bytes >= 1e9 else 1e6
    curve = [(size, kl) for size, kl in fit.curve if kl > 0]
    axes.plot(
        [size / unit for size, _ in curve],
        [max(kl, _SMALLEST) for _, kl in curve],
        color="#999",
        linewidth=1,
        label="best mixes, added up from their parts",
    )
    plain = [point for point in fit.points if point.name != OWN]
    axes.plot([p.size_bytes / unit for p in plain], [max(p.kl, _SMALLEST) for p in plain], "o", label="plain mixes")
    for number, point in enumerate(plain):
        place = (point.size_bytes / unit, max(point.kl, _SMALLEST))
        # neighbours above and below their points, so that their names do not lie on each other
        beside = {"xytext": (5, 4)} if number % 2 else {"xytext": (-5, -11), "horizontalalignment": "right"}
        axes.annotate(point.name, place, textcoords="offset points", fontsize=8, **beside)
    own = [point for point in fit.points if point.name == OWN]
    axes.plot([p.size_bytes / unit for p in own], [max(p.kl, _SMALLEST) for p in own], "*", markersize=13, label=OWN)
    room = (fit.limit_bytes - fit.kv_bytes) / unit
    axes.axvline(room, color="#c44", linestyle="--", linewidth=1, label="room for the weights")
    axes.set_yscale("log")
    axes.set_xlabel(f"file ({'GB' if unit == 1e9 else 'MB'})")
    axes.set_ylabel("mean KL divergence from the source (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def render_page(fit: Fit, title: str, picture: bytes) -> bytes:
    """The page."""
    mixes = "".join(
        f"<tr{_class(point.name == fit.chosen)}>"
        + _cells([point.name, f"{point.size_bytes:,}", f"{point.kl:.6f}", "yes" if point.fits else "no"])
        + "</tr>"
        for point in fit.points
    )
    groups = "".join(
        f"<tr>{_cells([item.group, item.type, f'{item.size_bytes:,}', f'{item.kl:.6f}'])}</tr>" for item in fit.choices
    )
    facts = (
        f"{fit.limit_bytes:,} bytes wanted, of which {fit.kv_bytes:,} hold the keys and values of {fit.context:,} "
        f"tokens. Taken: {fit.chosen}."
    )
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(facts)}</p>"
        f"<img alt='divergence over size' src='data:image/png;base64,{base64.b64encode(picture).decode()}'>"
        f"<h2>Mixes</h2><table>{_head('mix', 'file, bytes', 'KL, nats', 'fits')}{mixes}</table>"
        f"<h2>Parts of the found mix</h2><table>{_head('part', 'type', 'bytes', 'KL alone, nats')}{groups}</table>"
        "</html>"
    )
    return page.encode()


def _class(is_taken: bool) -> str:
    return " class='taken'" if is_taken else ""


def _head(*names: str) -> str:
    return "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in names) + "</tr>"


def _cells(texts: Sequence[str]) -> str:
    first, *others = (html.escape(text) for text in texts)
    return f"<td>{first}</td>" + "".join(f"<td class='n'>{text}</td>" for text in others)
