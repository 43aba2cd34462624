"""How much a type changes a tensor's weights, from some of its rows: no model is run.

In: an open GGUF file, a tensor's name and a type. Out: the relative squared error. What such an error does to the model
is measured by `train.probe`; between two measured types this error says where a third one lies.
"""

from __future__ import annotations

import numpy as np

from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.quantize import find_importance
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import GGMLType, row_bytes

SAMPLED_ROWS = 64


def weight_error(file: GGUFFile, name: str, type: GGMLType, imatrix: Imatrix | None = None) -> float:
    """Sum of squared changes over sum of squares, 0 for the type that the tensor has.

    The squares are weighted by the importance of their columns where it is known, as the quantizer weights them.

    Raises:
        FormatError: the importance matrix belongs to another model.
        GGUFError: a weight that the type cannot hold.
    """
    tensor = file.find_tensor(name)
    if type == tensor.type:
        return 0.0
    n_columns = tensor.shape[-1]
    stored = np.frombuffer(file.read(name), np.uint8).reshape(-1, row_bytes(tensor.type, n_columns))
    rows = np.unique(np.linspace(0, len(stored) - 1, min(SAMPLED_ROWS, len(stored))).astype(np.int64))
    before = dequantize(np.ascontiguousarray(stored[rows]), tensor.type, (len(rows), n_columns), n_threads=1)
    importance = find_importance(imatrix, name, tensor.shape)
    weights = np.ones((1, n_columns), np.float32) if importance is None else importance.reshape(-1, n_columns)
    matrices = rows // tensor.shape[-2]
    wrong = total = 0.0
    for number in np.unique(matrices):
        part = before[matrices == number]
        given = np.ascontiguousarray(weights[number % len(weights)])
        encoded = quantize(part, type, None if importance is None else given, n_threads=1)
        after = dequantize(encoded, type, part.shape, n_threads=1)
        wrong += float((given * np.square(part - after, dtype=np.float64)).sum())
        total += float((given * np.square(part, dtype=np.float64)).sum())
    return wrong / total if total else 0.0
