"""A picture of what matters in a model: layers as bars, spans of layers as a map, channels and heads as sorted curves.

In: an `Importance` and which layers go. Out: a PNG, the same bytes for the same numbers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ollama_forge.transform.ranking import Importance, KeptPart

_CURVES = {
    "ffn": "feed-forward channels",
    "kv_heads": "key-value heads",
    "hidden": "hidden channels",
    "experts": "experts",
}
_KEPT, _GONE = "#3b6ea5", "#c8553d"


def draw_ranking(importance: Importance, dropped: Sequence[int], title: str, parts: Sequence[KeptPart] = ()) -> bytes:
    """The picture as a PNG; a dashed line marks behind which share of its parts each curve is cut."""
    cuts = {_CURVES[part.name]: part.n_kept / part.n_all for part in parts}
    curves = {words: values for name, words in _CURVES.items() if (values := getattr(importance, name)) is not None}
    n_axes = 2 + bool(curves)
    figure = Figure(figsize=(5.2 * n_axes, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots(1, n_axes)
    layers = np.arange(importance.n_layers)
    colours = [_GONE if layer in dropped else _KEPT for layer in layers]
    axes[0].bar(layers, importance.influence, color=colours)
    axes[0].set(title="What each layer does to the stream", xlabel="layer (red: goes)", ylabel="1 - cosine")
    shown = np.where(np.triu(np.ones_like(importance.distance), 1) > 0, importance.distance, np.nan)
    image = axes[1].imshow(shown, origin="lower", cmap="viridis")
    axes[1].set(title="Angle between the streams before two layers", xlabel="later", ylabel="earlier")
    figure.colorbar(image, ax=axes[1], label="half turns", shrink=0.85)
    for words, values in curves.items():
        ranked = np.sort(np.atleast_2d(values), axis=1)[:, ::-1].mean(axis=0)
        (line,) = axes[2].plot(np.linspace(0, 1, len(ranked)), ranked / max(float(ranked[0]), 1e-30), label=words)
        if words in cuts:
            axes[2].axvline(cuts[words], color=line.get_color(), linestyle="--", label=f"cut: {cuts[words]:.0%} stay")
    if curves:
        axes[2].set(title="Sorted, mean over layers", xlabel="share of them", ylabel="importance (largest = 1)")
        axes[2].legend()
        axes[2].grid(alpha=0.3)
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
