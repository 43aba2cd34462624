"""What a build will take: disk, memory and time of each step that is still to be done, from headers alone.

Sizes of conversions and quantizations are exact. Times are rough: they are rates measured once on two cores (DESIGN),
scaled by this machine's, and a network of 10 MB/s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.files import require_free_space
from ollama_forge.jobs.conversion import convert_options, open_folder, open_quantization, quantize_options
from ollama_forge.jobs.fit_result import DEFAULT_PASSES, parse_limit
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.plan import BuildPlan
from ollama_forge.recipe.schema import (
    AbliterateStep,
    AdapterStep,
    DownsizeStep,
    FinetuneStep,
    FitStep,
    MergeStep,
    QuantizeStep,
)
from ollama_forge.recipe.steps import current_model, in_recipe_words
from ollama_forge.recipe.work import StepResult
from ollama_forge.store.catalog import open_store

NETWORK_BYTES_PER_SECOND = 10e6
DISK_BYTES_PER_SECOND = 400e6
QUANTIZED_BYTES_PER_SECOND_AND_CORE = 40e6  # 16-bit weights in, K-quants out
STREAMING_BYTES = 400 << 20
_TRAINING_BYTES = 1 << 30
ENGINE_BYTES = 600_000_000


@dataclass(frozen=True)
class StepEstimate:
    """One step. `disk_bytes` None: not known before it is done."""

    kind: str
    disk_bytes: int | None
    memory_bytes: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "kind": self.kind,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class BuildEstimate:
    """All that is still to be done."""

    steps: tuple[StepEstimate, ...] = ()

    @property
    def disk_bytes(self) -> int:
        return sum(step.disk_bytes or 0 for step in self.steps)

    @property
    def memory_bytes(self) -> int:
        return max((step.memory_bytes for step in self.steps), default=0)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "steps": [step.document() for step in self.steps],
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds, 1),
        }


def estimate_build(plan: BuildPlan, options: LandOptions) -> BuildEstimate:
    """What the rest of a build takes.

    Raises:
        DiskError: the work folder or the store has no room for it.
    """
    found = []
    if plan.source.missing_bytes:
        seconds = plan.source.missing_bytes / NETWORK_BYTES_PER_SECOND
        found.append(StepEstimate("download", plan.source.missing_bytes, 0, seconds))
    state, size_bytes = StepResult(), plan.source.size_bytes
    model: ResolvedModel | None = plan.source.local
    for number, step in enumerate(plan.steps):
        if step.result is not None:
            state = step.result
            size_bytes = int(state.facts.get("bytes", size_bytes)) if state.weights is not None else size_bytes
            model = current_model(plan.source.local, state) if plan.source.local is not None else None
        elif number >= plan.first_to_do:
            with in_recipe_words(step.step):
                estimate = _estimate_step(step.step, model, size_bytes, plan.recipe.folder)
            is_weights = isinstance(step.step, (QuantizeStep, FitStep, MergeStep)) or getattr(step.step, "merge", False)
            size_bytes = estimate.disk_bytes or size_bytes if is_weights else size_bytes
            found.append(estimate)
    is_shared = plan.source.local is not None and plan.source.local.installed is not None and not plan.steps
    is_local = options.server is None
    store_bytes = 0 if is_shared else size_bytes
    found.append(StepEstimate("create", store_bytes, size_bytes + ENGINE_BYTES, 2 + size_bytes / DISK_BYTES_PER_SECOND))
    if is_local:
        require_free_space(open_store(options.store_path).models_dir, store_bytes, plan.recipe.name)
    require_free_space(plan.work.root, sum(step.disk_bytes or 0 for step in found[:-1]), "the steps of the build")
    return BuildEstimate(tuple(found))


def _estimate_step(step: Any, model: ResolvedModel | None, size_bytes: int, folder: Path) -> StepEstimate:
    cores = os.cpu_count() or 1
    if isinstance(step, QuantizeStep):
        seconds = size_bytes / (QUANTIZED_BYTES_PER_SECOND_AND_CORE * cores)
        return StepEstimate("quantize", _quantized_bytes(step, model, folder), STREAMING_BYTES, seconds)
    if isinstance(step, FitStep):
        # Each run reads some 2,000 tokens, forward only: a third of what training on them costs.
        seconds = training_seconds(size_bytes, (step.passes or DEFAULT_PASSES) * 2_000 / 3)
        return StepEstimate("fit", min(size_bytes, parse_limit(step.size)), size_bytes + _TRAINING_BYTES, seconds)
    if isinstance(step, MergeStep):
        return StepEstimate("merge", size_bytes, STREAMING_BYTES, 2 * size_bytes / DISK_BYTES_PER_SECOND)
    if isinstance(step, FinetuneStep):
        data = sum(_size(locate(folder, text)) for text in step.data)
        tokens = max(1, data // 4) * step.epochs
        # About eight operations for each weight and token; a core does some ten thousand million of them a second.
        weights = size_bytes * 8 / 5
        seconds = 30 + 8 * weights * tokens / (50e9 * cores)
        return StepEstimate(
            "finetune", size_bytes if step.merge else size_bytes // 50, size_bytes + _TRAINING_BYTES, seconds
        )
    if isinstance(step, (AbliterateStep, DownsizeStep)):
        # Both read the model's answers or a text several times, and write it twice; how often depends on what they see.
        seconds = training_seconds(size_bytes, 20_000)
        return StepEstimate(step.kind, 2 * size_bytes, size_bytes + _TRAINING_BYTES, seconds)
    assert isinstance(step, AdapterStep)
    return StepEstimate("adapter", None, STREAMING_BYTES, 1.0)


def training_seconds(base_bytes: int, tokens: float) -> float:
    """A fine-tune of so many tokens: eight operations for each weight (of some five bits) and token, on all cores (two
    of them took 20 s for 512 tokens of 1.1 B weights), and half a minute for all around it."""
    weights = base_bytes * 8 / 5
    return 30 + 8 * weights * tokens / (110e9 * (os.cpu_count() or 1))


def _quantized_bytes(step: QuantizeStep, model: ResolvedModel | None, folder: Path) -> int | None:
    """The exact size, where the weights (or others of the same shapes) lie here."""
    if model is None:
        return None
    options = quantize_options(
        step.type,
        tensor_types=step.tensor_types,
        imatrix=locate(folder, step.imatrix) if step.imatrix else None,
        output_type=step.output_tensor_type,
        embedding_type=step.token_embedding_type,
        pure=step.pure,
        allow_requantize=step.allow_requantize,
    )
    if model.folder is not None:
        with open_folder(model.folder, convert_options("auto", options)) as planned:
            return planned.size_bytes
    assert model.gguf_path is not None
    with open_quantization(model.gguf_path, options) as planned:
        return planned.size_bytes


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size
