"""Directions in the residual stream of one model, and the file that keeps them.

In: unit vectors by layer, as `train.directions` finds them. Out: `Directions`, which gives an orthonormal basis for any
layer, or between two; and a safetensors file of a few kilobytes. What is done along them is `transform.ablation`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import FormatError, UsageError
from ollama_forge.files import atomic_output
from ollama_forge.weights.header import parse_json
from ollama_forge.weights.safetensors import SafetensorsFolder, open_safetensors

Floats = NDArray[np.float32]

VECTORS = "directions"
HARMLESS = "harmless_means"
_FORMAT = "ollama-forge directions 1"
_SMALLEST = 1e-6


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions at the output of each layer.

    Attributes:
        vectors: float32 [n_layers, n_directions, hidden], unit rows; layer l is what block l hands on.
        best_layer: whose direction says most, by the evidence that was there when they were computed.
        per_layer: meant to be used each in its own layer; else the best layer's everywhere.
        harmless_means: float32 [n_layers, hidden], the mean state on harmless prompts, or None.
        facts: how they were made, as text.
    """

    vectors: Floats
    best_layer: int
    per_layer: bool = False
    harmless_means: Floats | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return int(self.vectors.shape[0])

    @property
    def n_directions(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def hidden_size(self) -> int:
        return int(self.vectors.shape[2])

    def at(self, layer: float, *, projected: bool = False, first: int | None = None) -> Floats:
        """An orthonormal basis [k, hidden] of the directions of a layer; between two layers, of what lies between.

        Args:
            layer: 0 ... n_layers - 1; 3.25 is a quarter of the way from layer 3 to layer 4.
            projected: without the part that lies along the mean state on harmless prompts.
            first: only that many of the directions, the strongest first.

        Raises:
            UsageError: no such layer; nothing to project against; or nothing is left.
        """
        if not (math.isfinite(layer) and 0 <= layer <= self.n_layers - 1):
            raise UsageError(
                f"There is no layer {layer:g}",
                why=f"The directions are those of layers 0 to {self.n_layers - 1}.",
                next=f"Choose one of them, for example --layer {self.best_layer}.",
            )
        low = min(int(layer), self.n_layers - 1)
        share = layer - low
        rows = self.vectors[low, :first].astype(np.float64)
        if share:
            above = self.vectors[low + 1, :first].astype(np.float64)
            # A direction and its opposite are the same thing to remove.
            signs = np.where(np.einsum("ij,ij->i", rows, above) < 0, -1.0, 1.0)
            rows = (1 - share) * rows + share * signs[:, None] * above
        if projected:
            rows = rows - _along(rows, self._harmless_at(low, share))
        return orthonormal(rows)

    def _harmless_at(self, low: int, share: float) -> NDArray[np.float64]:
        if self.harmless_means is None:
            raise UsageError(
                "The directions file holds no mean of the harmless prompts",
                why="It is needed to project it out.",
                next="Compute the directions again: ollama-forge abliterate compute-dir ...",
            )
        mean = self.harmless_means[low].astype(np.float64)
        if share:
            mean = (1 - share) * mean + share * self.harmless_means[low + 1].astype(np.float64)
        length = float(np.linalg.norm(mean))
        return mean / length if length else mean


def orthonormal(rows: NDArray[Any]) -> Floats:
    """Orthonormal rows that span the same as `rows`, in their order; those that say nothing new are left out.

    Raises:
        UsageError: all of them are zero, or not finite.
    """
    kept: list[NDArray[np.float64]] = []
    for row in np.asarray(rows, np.float64):
        length = float(np.linalg.norm(row))
        if not math.isfinite(length) or length < _SMALLEST:
            continue
        rest = row / length
        for _ in range(2):
            for other in kept:
                rest = rest - float(rest @ other) * other
        left = float(np.linalg.norm(rest))
        if left > _SMALLEST:
            kept.append(rest / left)
    if not kept:
        raise UsageError(
            "The direction is zero, or not a number",
            why="The two sets of prompts leave the same state at this layer, so nothing tells them apart.",
            next="Use prompts that differ more, or another layer.",
        )
    return np.array(kept, np.float32)


def _along(rows: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.outer(rows @ unit, unit)
    return result


def write_directions(path: Path, directions: Directions, *, overwrite: bool = False) -> None:
    """Write the file; the same directions give the same bytes.

    Raises:
        ExistsError, DiskError: as `files.atomic_output`.
    """
    tensors = {VECTORS: directions.vectors}
    if directions.harmless_means is not None:
        tensors[HARMLESS] = directions.harmless_means
    facts = {
        **{str(key): str(value) for key, value in directions.facts.items()},
        "format": _FORMAT,
        "best_layer": str(directions.best_layer),
        "per_layer": "yes" if directions.per_layer else "no",
    }
    header: dict[str, Any] = {"__metadata__": dict(sorted(facts.items()))}
    position = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [position, position + 4 * values.size],
        }
        position += 4 * values.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_output(path, overwrite=overwrite, expected_bytes=len(text) + position) as sink:
        sink.write(len(text).to_bytes(8, "little"))
        sink.write(text)
        for values in tensors.values():
            sink.write(np.ascontiguousarray(values, "<f4").tobytes())


def read_directions(path: Path) -> Directions:
    """Read the file, with everything checked.

    Raises:
        FormatError: it is another kind of file, or its numbers do not hold together.
        NotFoundError, SafetensorsError, UnsafeFileError, DiskError: as `weights.safetensors`.
    """
    with open_safetensors(path) as file:
        vectors = _read_floats(file, VECTORS, 3)
        means = _read_floats(file, HARMLESS, 2) if HARMLESS in file.tensors else None
    facts = _read_facts(path)
    best = facts.pop("best_layer", "")
    per_layer = facts.pop("per_layer", "") == "yes"
    facts.pop("format", None)
    n_layers, n_directions, hidden = vectors.shape
    if not best.isdecimal() or int(best) >= n_layers or 0 in (n_layers, n_directions, hidden):
        raise _foreign(path, f"it names {best!r} as the best of {n_layers} layers")
    if means is not None and means.shape != (n_layers, hidden):
        raise _foreign(path, f"{HARMLESS!r} has the shape {means.shape} beside directions of {vectors.shape}")
    lengths = np.linalg.norm(vectors, axis=2)
    if not np.isfinite(vectors).all() or not np.all((np.abs(lengths - 1) < 1e-3) | (lengths == 0)):
        raise _foreign(path, "its directions are not of length 1")
    if means is not None and not np.isfinite(means).all():
        raise _foreign(path, "its means are not finite")
    return Directions(vectors, int(best), per_layer, means, facts)


def _read_floats(file: SafetensorsFolder, name: str, n_dimensions: int) -> Floats:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise _foreign(file.path, f"it has no tensor {name!r}")
    if tensor.dtype != "F32" or len(tensor.shape) != n_dimensions:
        raise _foreign(file.path, f"its {name!r} is {tensor.dtype} of shape {tensor.shape}")
    return np.frombuffer(file.read(name), "<f4").reshape(tensor.shape).astype(np.float32)


def _read_facts(path: Path) -> dict[str, str]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        metadata = parse_json(stream.read(length), path).get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise _foreign(path, "it does not say that it is one")
    return {str(key): str(value) for key, value in metadata.items()}


def _foreign(path: Path, why: str) -> FormatError:
    return FormatError(
        f"{str(path)!r} is no file of directions: {why}",
        why="Such a file is made for one model by `abliterate compute-dir`.",
        next="ollama-forge abliterate compute-dir --model REF --harmful FILE --harmless FILE --output DIR.safetensors",
    )
