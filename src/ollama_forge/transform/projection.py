"""One tensor that writes the residual stream, and what is taken out of what it writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ollama_forge.arch.rows import Transform
from ollama_forge.gguf.types import GGMLType
from ollama_forge.transform.directions import Floats
from ollama_forge.weights.checkpoint import StoredTensor


class Part(Enum):
    """Which part of the model writes."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"


@dataclass(frozen=True, eq=False)
class Projection:
    """What a tensor gives, y, becomes y - strength * basis^T (basis y); for a matrix: W' = W - s B^T (B W).

    A matrix and the bias beside it have the same basis and strength, so a hook on the whole layer's output does both.

    Attributes:
        tensor: with its names in both vocabularies (`tensor.gguf_name`, `tensor.hf_name`) and its layer and expert.
        basis: orthonormal float32 [k, hidden], in the coordinates of what the tensor gives (before a norm that
            follows).
    """

    tensor: StoredTensor
    part: Part
    basis: Floats = field(repr=False)
    strength: float

    @property
    def axis(self) -> int:
        """The axis of the tensor as it is stored that runs along the residual stream: -1 or -2."""
        row = self.tensor.row
        if len(self.tensor.spec.shape) < 2:
            return -1
        is_swapped = row.transform is Transform.TRANSPOSE and not isinstance(self.tensor.spec.encoding, GGMLType)
        return -3 - row.residual_axis if is_swapped else row.residual_axis
