"""The kernels alone: dequantize and quantize what a file to Q4_K_M needs, from memory, writing nothing.

    python bench/kernels.py MODEL-bf16.gguf N_THREADS

Each tensor is read to float32 and quantized with the type that Q4_K_M gives it, and the result is thrown away. What a
tool needs beyond this time is its own: reading the folder, hashing, writing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ollama_forge.gguf import native
from ollama_forge.gguf.quantize import QuantizeOptions, plan_quantization
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType

CHUNK_ELEMENTS = 1 << 24


def main() -> None:
    path, n_threads = Path(sys.argv[1]), int(sys.argv[2])
    with open_gguf(path) as source:
        planned = {entry.name: entry.type for entry in plan_quantization(source, _options()).entries}
        for name, tensor in source.tensors.items():
            if planned[name] == tensor.type:
                continue
            columns = tensor.shape[-1]
            rows_at_once = max(1, CHUNK_ELEMENTS // columns)
            stored = np.frombuffer(source.read(name), np.uint8).reshape(
                -1, tensor.nbytes * columns // tensor.n_elements
            )
            for start in range(0, len(stored), rows_at_once):
                part = stored[start : start + rows_at_once]
                values = native.dequantize(part, tensor.type, (len(part), columns), n_threads=n_threads)
                native.quantize(values, planned[name], n_threads=n_threads)


def _options() -> QuantizeOptions:
    return QuantizeOptions(file_type=FileType.MOSTLY_Q4_K_M)


if __name__ == "__main__":
    main()
