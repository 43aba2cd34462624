"""A GGUF made ready to be scored: packed, with its adapters on, on the right device, rounding as the engine does.

In: open GGUF files and fitted adapters. Out: packed models for `train.scoring`, as long as a block runs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.train.attach import attached
from ollama_forge.train.device import require_device
from ollama_forge.train.engine_rounding import engine_rounding
from ollama_forge.train.load import PackedModel, load_packed
from ollama_forge.transform.lora import WeightedAdapter

SMALL_MODEL_BYTES = 16 << 20
_WORKSPACE_BYTES = 64 << 20  # forward alone asks for nothing twice, so a model needs room for the piece under way only


@dataclass(frozen=True)
class ScoreOptions:
    """How models are run when they are scored.

    Attributes:
        is_exact: multiply by float32 activations instead of rounding them as llama.cpp does.
        device: `auto`, `cpu` or `cuda`.
    """

    is_exact: bool = False
    device: str = "auto"


@contextlib.contextmanager
def scored_model(
    source: Path | GGUFFile, adapters: Sequence[WeightedAdapter] = (), options: ScoreOptions | None = None
) -> Iterator[PackedModel]:
    """Load a model for scoring; a path is opened and closed again.

    Raises:
        UsageError: `cuda` is asked for and not there.
        As `load.load_packed` and `attach.attached`.
    """
    with contextlib.ExitStack() as undo:
        gguf = source if isinstance(source, GGUFFile) else undo.enter_context(open_gguf(source))
        undo.enter_context(_few_threads(gguf.size_bytes))
        yield undo.enter_context(_made_ready(gguf, adapters, options or ScoreOptions()))


@contextlib.contextmanager
def _made_ready(gguf: GGUFFile, adapters: Sequence[WeightedAdapter], options: ScoreOptions) -> Iterator[PackedModel]:
    require_device(options.device)
    with contextlib.ExitStack() as undo:
        undo.enter_context(_quiet())
        packed = load_packed(gguf, workspace_bytes=_WORKSPACE_BYTES)
        if torch.cuda.is_available() and options.device != "cpu":
            packed.model.to("cuda")  # type: ignore[arg-type]
        undo.enter_context(attached(packed, adapters))
        if not options.is_exact:
            undo.enter_context(engine_rounding(packed))
        yield packed


@contextlib.contextmanager
def _few_threads(size_bytes: int) -> Iterator[None]:
    """One thread where a model fits the processor's cache: waiting for each other costs more than threads bring."""
    before = torch.get_num_threads()
    if size_bytes < SMALL_MODEL_BYTES:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            yield
    finally:
        transformers_logging.set_verbosity(before)
