"""The evidence for directions as a picture: separation, cosines and lengths over the layers."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from ollama_forge.train.directions import DirectionReport


def draw_evidence(report: DirectionReport) -> bytes:
    """Two panels over the layers as a PNG; the chosen layer is marked."""
    layers = [item.layer for item in report.layers]
    figure = Figure(figsize=(8, 6), dpi=120, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot(layers, [item.silhouette for item in report.layers], "o-", markersize=4, label="silhouette")
    above.plot(layers, [item.means_cosine for item in report.layers], label="cosine of the two means")
    above.plot(layers, [item.best_cosine for item in report.layers], label="cosine with the chosen direction")
    above.set_ylim(-1.05, 1.05)
    below.plot(layers, [item.harmful_norm for item in report.layers], label="mean state, harmful")
    below.plot(layers, [item.harmless_norm for item in report.layers], label="mean state, harmless")
    below.plot(layers, [item.gap for item in report.layers], label="their difference")
    below.set_ylabel("length")
    below.set_xlabel("layer")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (above, below):
        axes.axvline(report.directions.best_layer, color="0.6", linestyle=":", zorder=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
