"""What downsizing will do, before it does it: how many layers stay in each step, and the sums.

In: a `PipelineRequest`. Out: a `PipelinePlan`. Headers and the data are read; no weight is, and no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import UsageError
from ollama_forge.files import require_free_space
from ollama_forge.gguf.mixture import plan_choices
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType, tensor_bytes
from ollama_forge.jobs.conversion import quantize_options
from ollama_forge.jobs.environment import available_memory_bytes
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.training_disk import products_per_second
from ollama_forge.jobs.training_plan import RUNTIME_BYTES, WORKSPACE_BYTES
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.distill_options import DistillOptions
from ollama_forge.train.options import LoopOptions, LoraOptions
from ollama_forge.transform.cut import read_sizes
from ollama_forge.transform.cut_request import MOST_PER_STEP
from ollama_forge.weights.checkpoint import open_checkpoint

LOWER_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q3_K_S", "Q2_K")
"""Plain quantizations that the result is compared with, largest first; none of them needs an importance matrix."""

_TARGET = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|B|M|K|GB|MB|KB|TB)\s*", re.IGNORECASE)
_COUNTS = {"B": 10**9, "M": 10**6, "K": 10**3}
_BYTES = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3}
_BLOCK = re.compile(r"blk\.(\d+)\.")
_FULL_BYTES = 16  # float32: the number, its gradient, Adam's two moments


@dataclass(frozen=True)
class Goal:
    """How small: a number of parameters, of bytes, or a share of the parameters. Exactly one is set."""

    text: str
    n_parameters: float | None = None
    size_bytes: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class PipelineRequest:
    """What should become of a model.

    Attributes:
        data: training data on which the cut model is healed.
        text: a text, or training data, by which parts are ranked and models are judged; None: the package's own.
        quant: of the result; None: as the model is.
        folder: where everything is made.
    """

    ref: str
    name: str
    goal: Goal
    folder: Path
    data: tuple[Path, ...]
    text: Path | None = None
    include: tuple[str, ...] = ()
    quant: str | None = None
    lora: LoraOptions = field(default_factory=LoraOptions)
    loop: LoopOptions = field(default_factory=LoopOptions)
    distill: DistillOptions = field(default_factory=DistillOptions)
    max_length: int = 1024
    learn: str = "all"
    changes: Modelfile = field(default_factory=Modelfile)


@dataclass(frozen=True)
class PruneStep:
    """One cut, and the healing after it. Sizes are predicted from the average layer."""

    number: int
    n_layers: int
    n_parameters: int
    size_bytes: int
    tokens: int
    memory_bytes: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "step": self.number,
            "layers": self.n_layers,
            "parameters": self.n_parameters,
            "bytes": self.size_bytes,
            "tokens": self.tokens,
            "memory_bytes": self.memory_bytes,
            "seconds": round(self.seconds),
        }


@dataclass(frozen=True)
class PipelinePlan:
    """The sums.

    Attributes:
        size_bytes, n_parameters, n_layers: of the model as it is.
        final_bytes: of the result, quantized.
        lower_type, lower_bytes: the quantization of the original that is about as small.
        disk_bytes: for all files together.
    """

    ref: str
    family: str
    size_bytes: int
    n_parameters: int
    n_layers: int
    steps: tuple[PruneStep, ...]
    final_bytes: int
    lower_type: str
    lower_bytes: int
    disk_bytes: int
    available_bytes: int | None

    @property
    def memory_bytes(self) -> int:
        return max(step.memory_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "model": self.ref,
            "family": self.family,
            "bytes": self.size_bytes,
            "parameters": self.n_parameters,
            "layers": self.n_layers,
            "steps": [step.document() for step in self.steps],
            "final_bytes": self.final_bytes,
            "lower_quantization": self.lower_type,
            "lower_quantization_bytes": self.lower_bytes,
            "disk_bytes": self.disk_bytes,
            "memory_bytes": self.memory_bytes,
            "available_bytes": self.available_bytes,
            "seconds": round(self.seconds),
        }


def parse_goal(text: str) -> Goal:
    """`3B` and `500M` are parameters, `2GB` and `800MB` bytes, `40%` a share of the parameters.

    Raises:
        UsageError: something else, or a share that leaves nothing or everything.
    """
    match = _TARGET.fullmatch(text)
    number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "")
    if number <= 0 or (unit == "%" and number >= 100):
        raise UsageError(
            f"--target {text!r} is no size",
            why="It is a number of parameters (3B), of bytes (2GB), or a share above 0% and below 100%.",
            next="Example: --target 40%",
        )
    if unit == "%":
        return Goal(text, share=number / 100)
    if unit in _BYTES:
        return Goal(text, size_bytes=number * _BYTES[unit])
    return Goal(text, n_parameters=number * _COUNTS[unit])


Tensors = Sequence[tuple[str, tuple[int, ...], GGMLType]]


@dataclass(frozen=True)
class _Weights:
    """Sums over tensors: outside of the layers, and in an average layer."""

    outside: float
    layer: float

    def at(self, n_layers: int) -> int:
        return round(self.outside + n_layers * self.layer)


@dataclass(frozen=True)
class _Source:
    """A model's header."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Tensors
    n_layers: int
    period: int
    family: str

    def parameters(self) -> _Weights:
        return self._weigh([(name, math.prod(shape)) for name, shape, _ in self.tensors])

    def sizes(self, file_type: str | None) -> _Weights:
        """Bytes as the tensors are, or in a quantization."""
        if file_type is None:
            return self._weigh([(name, tensor_bytes(type_, shape)) for name, shape, type_ in self.tensors])
        options = quantize_options(file_type, allow_requantize=True)
        choices = plan_choices(self.architecture, self.metadata.get, list(self.tensors), options)
        return self._weigh([(choice.name, tensor_bytes(choice.type, choice.shape)) for choice in choices])

    def _weigh(self, numbers: Sequence[tuple[str, int]]) -> _Weights:
        inside = sum(number for name, number in numbers if _BLOCK.match(name))
        return _Weights(sum(number for _, number in numbers) - inside, inside / self.n_layers)


def plan_pipeline(request: PipelineRequest, model: ResolvedModel, n_tokens: int) -> PipelinePlan:
    """Decide the steps.

    Args:
        n_tokens: that one healing reads, all epochs together.

    Raises:
        UsageError: a goal that is not smaller than the model, or that not even one layer meets.
        DiskError: no room for all that is made.
    """
    source = _open_source(model)
    parameters, sizes = source.parameters(), source.sizes(None)
    finals = source.sizes(request.quant)
    last = _final_layers(request, source, parameters, finals)
    rate = products_per_second()
    steps = [
        _step(number, n_layers, request, parameters, sizes, source.n_layers, n_tokens, rate)
        for number, n_layers in enumerate(_staircase(source.n_layers, last, source.period, parameters), start=1)
    ]
    final_bytes = finals.at(last)
    lower_type, lower_bytes = _lower(source, final_bytes)
    disk = sum(2 * step.size_bytes for step in steps) + final_bytes * 2 + lower_bytes
    disk += sizes.at(source.n_layers) if model.folder is not None else 0
    if request.distill.is_full:
        disk += max(2 * 12 * step.n_parameters for step in steps)  # two checkpoints: weights and optimizer
    require_free_space(request.folder, disk, f"the steps of {request.name!r}")
    return PipelinePlan(
        ref=request.ref,
        family=source.family,
        size_bytes=sizes.at(source.n_layers),
        n_parameters=parameters.at(source.n_layers),
        n_layers=source.n_layers,
        steps=tuple(steps),
        final_bytes=final_bytes,
        lower_type=lower_type,
        lower_bytes=lower_bytes,
        disk_bytes=disk,
        available_bytes=available_memory_bytes(),
    )


def _open_source(model: ResolvedModel) -> _Source:
    path = model.gguf_path or model.folder
    assert path is not None
    with open_checkpoint(path) as checkpoint:
        sizes, family = read_sizes(checkpoint), checkpoint.family
    if model.folder is not None:
        with plan_conversion(model.folder, ConvertOptions()) as conversion:
            metadata = {item.key: item.value for item in conversion.fields}
            rows = [(entry.name, tuple(entry.shape), entry.type) for entry in conversion.entries]
    else:
        with open_gguf(path) as gguf:
            metadata = dict(gguf.metadata)
            rows = [(tensor.name, tensor.shape, tensor.type) for tensor in gguf.tensors.values()]
    return _Source(family.gguf_architecture, metadata, rows, sizes.n_layers, sizes.period, family.name)


def _final_layers(request: PipelineRequest, source: _Source, parameters: _Weights, sizes: _Weights) -> int:
    """The most layers that meet the goal."""
    goal = request.goal
    weights = sizes if goal.size_bytes is not None else parameters
    whole = weights.at(source.n_layers)
    limit = goal.size_bytes or goal.n_parameters or (goal.share or 0.0) * whole
    unit = "bytes" if goal.size_bytes is not None else "parameters"
    if limit >= whole:
        raise UsageError(
            f"--target {goal.text} is not smaller than {request.ref!r}, which has {whole:,} {unit}"
            + (f" in {request.quant}" if goal.size_bytes is not None and request.quant else ""),
            next="Give a smaller target, for example --target 60%",
        )
    counts = range(source.n_layers - source.period, 0, -source.period)
    fitting = next((count for count in counts if weights.at(count) <= limit), None)
    if fitting is None:
        least = weights.at(source.period)
        raise UsageError(
            f"--target {goal.text} cannot be met by cutting layers: the smallest that can be made has {least:,} {unit}",
            why="The embedding and the head stay, and at least "
            + ("one layer." if source.period == 1 else f"{source.period} layers, after which their kinds repeat."),
            next=f"Give --target {math.ceil(100 * least / whole)}% or more"
            + (", or a smaller --quant." if goal.size_bytes is not None else "."),
        )
    return fitting


def _staircase(n_layers: int, last: int, period: int, parameters: _Weights) -> list[int]:
    """Layers after each step, each taking away at most a third of what is there, if a layer is not more than that."""
    stairs = []
    while n_layers > last:
        least = (1 - MOST_PER_STEP) * parameters.at(n_layers)
        counts = range(n_layers - period, last - 1, -period)
        n_layers = min((count for count in counts if parameters.at(count) >= least), default=n_layers - period)
        stairs.append(n_layers)
    return stairs


def _step(
    number: int,
    n_layers: int,
    request: PipelineRequest,
    parameters: _Weights,
    sizes: _Weights,
    all_layers: int,
    n_tokens: int,
    rate: float,
) -> PruneStep:
    student, teacher = parameters.at(n_layers), parameters.at(all_layers)
    memory = RUNTIME_BYTES + WORKSPACE_BYTES + sizes.at(n_layers)
    if not request.distill.cached_words:
        memory += sizes.at(all_layers)
    if request.distill.is_full:
        memory += student * _FULL_BYTES
    # products of weights and numbers: 1 forward and 2 backward for the student (1 with LoRA), 1 more to compute
    # activations again, 1 for the teacher; two operations each
    passes = (3 if request.distill.is_full else 2) + (1 if request.loop.checkpointing else 0)
    operations = 2 * n_tokens * (passes * student + teacher)
    return PruneStep(number, n_layers, student, sizes.at(n_layers), n_tokens, memory, operations / rate)


def _lower(source: _Source, final_bytes: int) -> tuple[str, int]:
    """The largest quantization of the whole model that is not larger than the result, else the smallest."""
    found = [(name, source.sizes(name).at(source.n_layers)) for name in LOWER_TYPES]
    return next(((name, size) for name, size in found if size <= final_bytes), min(found, key=lambda item: item[1]))
