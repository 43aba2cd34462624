"""One importance pass over one GGUF: load packed, read the text, close.

In: an open GGUF file and rows of tokens. Out: an `Importance`. It is the door through which `jobs` comes in.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from transformers.utils import logging as transformers_logging

from ollama_forge.files import Advance
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.train.block_influence import measure_importance
from ollama_forge.train.load import load_packed
from ollama_forge.transform.ranking import Importance

SMALL_MODEL_BYTES = 16 << 20


def run_importance(
    gguf: GGUFFile,
    rows: Sequence[Sequence[int]],
    parts: Iterable[str] = (),
    *,
    device: str = "auto",
    n_threads: int | None = None,
    advance: Advance | None = None,
) -> Importance:
    """Measure what matters in a GGUF; see `block_influence.measure_importance`.

    Args:
        device: `auto` (a GPU where there is one), `cpu` or `cuda`.

    Raises:
        UnsupportedError: no family of ours.
        TrainingError: nothing to read.
    """
    transformers_logging.set_verbosity_error()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    elif gguf.size_bytes < SMALL_MODEL_BYTES:
        # Threads that wait for each other cost more than they bring where a model fits the processor's cache.
        torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        packed = load_packed(gguf)
        if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
            torch.nn.Module.to(packed.model, "cuda")
        return measure_importance(packed, rows, parts, advance)
