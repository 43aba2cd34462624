"""The two models of a measurement, running: in llama.cpp's hands where that is possible, else packed in torch.

In: open models with the adapters that belong on them. Out: a `ScoredPair`, as long as a block runs.
llama.cpp's own logits are those of the model that people run, to the last bit; torch serves NVIDIA cards that only it
can use, and scoring without llama.cpp's rounding of activations.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ollama_forge.engine_logits import LogitsEngine, has_logits_engine, open_logits_engine
from ollama_forge.jobs.adapters import write_fitted
from ollama_forge.jobs.measure_models import OpenModel, require_packages
from ollama_forge.jobs.scratch import scratch_folder
from ollama_forge.measure.pair import EnginePair, ScoredPair


def takes_engine(is_exact: bool = False, device: str = "auto") -> bool:
    """Whether llama.cpp runs the models, which needs nothing but the package itself.

    Raises:
        MissingExtraError: it cannot, and torch is not installed.
    """
    if not is_exact and device != "cuda" and has_logits_engine() and not (device == "auto" and _has_cuda()):
        return True
    require_packages()
    return False


def _has_cuda() -> bool:
    if not importlib.util.find_spec("torch"):
        return False
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def running_pair(
    this: OpenModel, against: OpenModel, context_length: int, *, is_exact: bool = False, device: str = "auto"
) -> Iterator[ScoredPair]:
    """Load both.

    Args:
        context_length: of the longest window.
        is_exact: multiply by float32 activations instead of rounding them as llama.cpp does.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        AdapterError: only a merge could express an adapter.
        EngineError: llama.cpp does not load one.
        MissingExtraError: torch has to run them and is not installed.
        As `train.scored_model`.
    """
    with contextlib.ExitStack() as stack:
        if takes_engine(is_exact, device):
            scratch = stack.enter_context(scratch_folder())
            n_gpu_layers = 0 if device == "cpu" else None
            first = stack.enter_context(_engine(this, scratch, context_length, n_gpu_layers))
            yield EnginePair(first, stack.enter_context(_engine(against, scratch, context_length, n_gpu_layers)))
        else:
            from ollama_forge.train.scored_model import ScoreOptions, scored_model
            from ollama_forge.train.scoring import PackedPair

            options = ScoreOptions(is_exact, device)
            judged = stack.enter_context(scored_model(this.gguf, this.adapters, options))
            yield PackedPair(judged, stack.enter_context(scored_model(against.gguf, against.adapters, options)))


def _engine(model: OpenModel, scratch_dir: Path, context_length: int, n_gpu_layers: int | None) -> LogitsEngine:
    adapters = [(write_fitted(item.fitted, scratch_dir), item.weight) for item in model.adapters]
    return open_logits_engine(
        model.gguf.path, adapters=adapters, context_length=context_length, n_gpu_layers=n_gpu_layers
    )
