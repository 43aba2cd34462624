"""What downsizing will do, before it does it: how many layers stay in each step, and the sums.

In: a `PipelineRequest`. Out: a `PipelinePlan`. Headers and the data are read; no weight is, and no torch.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.errors import UsageError
from ollama_forge.files import require_free_space
from ollama_forge.gguf.header import DEFAULT_ALIGNMENT
from ollama_forge.gguf.mixture import plan_choices
from ollama_forge.gguf.quantize import quantization_fields
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType, tensor_bytes
from ollama_forge.gguf.writer import Field, TensorEntry, plan_layout
from ollama_forge.jobs.conversion import quantize_options
from ollama_forge.jobs.environment import available_memory_bytes
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.training_disk import products_per_second
from ollama_forge.jobs.training_plan import RUNTIME_BYTES, WORKSPACE_BYTES
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.train.distill_options import DistillOptions
from ollama_forge.train.options import LoopOptions, LoraOptions
from ollama_forge.transform.cut import Cut, ModelSizes, read_sizes
from ollama_forge.transform.cut_request import MOST_PER_STEP
from ollama_forge.transform.origin import fields_of
from ollama_forge.transform.prune import cut_fields
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
    """One cut, and the healing after it; `size_bytes` is that of the file."""

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
class _Source:
    """A model's header, as GGUF has it."""

    architecture: str
    fields: Sequence[Field]
    alignment: int
    tensors: Tensors
    sizes: ModelSizes
    family: str

    @property
    def n_layers(self) -> int:
        return self.sizes.n_layers

    def parameters(self, n_layers: int) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for _, shape, _ in self._tensors(n_layers))

    def size_bytes(self, n_layers: int, file_type: str | None = None) -> int:
        """The file with so many layers, as its tensors are or quantized, header and vocabulary included.

        Where layers differ in size, which of them stay is measured later: the largest ones count.
        """
        fields, tensors = self.fields, self._tensors(n_layers)
        if n_layers < self.n_layers:
            cut = Cut(layers=np.arange(n_layers, dtype=np.int64))
            fields = cut_fields(fields, self.architecture, self.sizes, cut)
        if file_type is not None:
            options = quantize_options(file_type, allow_requantize=True)
            wanted = quantization_fields(options)
            replaced = {item.key for item in wanted}
            fields = [item for item in fields if item.key not in replaced] + wanted
            known = {item.key: item.value for item in fields}
            choices = plan_choices(self.architecture, known.get, tensors, options)
            tensors = [(choice.name, choice.shape, choice.type) for choice in choices]
        entries = [TensorEntry(name, shape, type_, tuple) for name, shape, type_ in tensors]
        return plan_layout(fields, entries, self.alignment).size_bytes

    def _tensors(self, n_layers: int) -> Tensors:
        layers: dict[int, int] = {}
        for name, shape, type_ in self.tensors:
            if match := _BLOCK.match(name):
                layers[int(match[1])] = layers.get(int(match[1]), 0) + tensor_bytes(type_, shape)
        largest = sorted(sorted(layers, key=lambda layer: -layers[layer])[:n_layers])
        places = {layer: place for place, layer in enumerate(largest)}
        kept = []
        for name, shape, type_ in self.tensors:
            match = _BLOCK.match(name)
            if match is None:
                kept.append((name, shape, type_))
            elif int(match[1]) in places:
                kept.append((f"blk.{places[int(match[1])]}.{name[match.end() :]}", shape, type_))
        return kept


def plan_pipeline(request: PipelineRequest, model: ResolvedModel, n_tokens: int) -> PipelinePlan:
    """Decide the steps.

    Args:
        n_tokens: that one healing reads, all epochs together.

    Raises:
        UsageError: a goal that is not smaller than the model, or that not even one layer meets.
        DiskError: no room for all that is made.
    """
    with _open_source(model) as source:
        return _plan(request, source, model.folder is not None, n_tokens)


def _plan(request: PipelineRequest, source: _Source, is_folder: bool, n_tokens: int) -> PipelinePlan:
    last = _final_layers(request, source)
    rate = products_per_second()
    steps = [
        _step(number, n_layers, request, source, n_tokens, rate)
        for number, n_layers in enumerate(_staircase(source, last), start=1)
    ]
    size_bytes, final_bytes = source.size_bytes(source.n_layers), source.size_bytes(last, request.quant)
    lower_type, lower_bytes = _lower(source, final_bytes)
    disk = sum(2 * step.size_bytes for step in steps) + final_bytes * 2 + lower_bytes
    disk += size_bytes if is_folder else 0
    if request.distill.is_full:
        disk += max(2 * 12 * step.n_parameters for step in steps)  # two checkpoints: weights and optimizer
    require_free_space(request.folder, disk, f"the steps of {request.name!r}")
    return PipelinePlan(
        ref=request.ref,
        family=source.family,
        size_bytes=size_bytes,
        n_parameters=source.parameters(source.n_layers),
        n_layers=source.n_layers,
        steps=tuple(steps),
        final_bytes=final_bytes,
        lower_type=lower_type,
        lower_bytes=lower_bytes,
        disk_bytes=disk,
        available_bytes=available_memory_bytes(),
    )


@contextlib.contextmanager
def _open_source(model: ResolvedModel) -> Iterator[_Source]:
    """Its fields are read from the file, which stays open inside the block."""
    path = model.gguf_path or model.folder
    assert path is not None
    with open_checkpoint(path) as checkpoint:
        sizes, name, architecture = read_sizes(checkpoint), checkpoint.family.name, checkpoint.family.gguf_architecture
    if model.folder is not None:
        with plan_conversion(model.folder, ConvertOptions()) as conversion:
            rows = [(entry.name, tuple(entry.shape), entry.type) for entry in conversion.entries]
            yield _Source(architecture, conversion.fields, DEFAULT_ALIGNMENT, rows, sizes, name)
    else:
        with open_gguf(path) as gguf:
            rows = [(tensor.name, tensor.shape, tensor.type) for tensor in gguf.tensors.values()]
            yield _Source(architecture, fields_of(gguf), gguf.alignment, rows, sizes, name)


def _final_layers(request: PipelineRequest, source: _Source) -> int:
    """The most layers that meet the goal."""
    goal, period = request.goal, source.sizes.period

    def measured(n_layers: int) -> int:
        return source.size_bytes(n_layers, request.quant) if goal.size_bytes else source.parameters(n_layers)

    whole = measured(source.n_layers)
    limit = goal.size_bytes or goal.n_parameters or (goal.share or 0.0) * whole
    unit = "bytes" if goal.size_bytes is not None else "parameters"
    if limit >= whole:
        raise UsageError(
            f"--target {goal.text} is not smaller than {request.ref!r}, which has {whole:,} {unit}"
            + (f" in {request.quant}" if goal.size_bytes is not None and request.quant else ""),
            next="Give a smaller target, for example --target 60%",
        )
    counts = range(source.n_layers % period or period, source.n_layers, period)
    n_fitting = bisect.bisect_right(counts, limit, key=measured)
    if not n_fitting:
        least = measured(counts[0]) if counts else whole
        raise UsageError(
            f"--target {goal.text} cannot be met by cutting layers: the smallest that can be made has {least:,} {unit}",
            why="The embedding and the head stay, and at least "
            + ("one layer." if period == 1 else f"{period} layers, after which their kinds repeat."),
            next=f"Give --target {math.ceil(least / 1000)}KB or more, or a smaller --quant."
            if goal.size_bytes is not None
            else f"Give --target {math.ceil(100 * least / whole)}% or more.",
        )
    return counts[n_fitting - 1]


def _staircase(source: _Source, last: int) -> list[int]:
    """Layers after each step, each taking away at most a third of what is there, if a layer is not more than that."""
    stairs = []
    n_layers, period = source.n_layers, source.sizes.period
    while n_layers > last:
        least = (1 - MOST_PER_STEP) * source.parameters(n_layers)
        counts = range(n_layers - period, last - 1, -period)
        n_layers = min((count for count in counts if source.parameters(count) >= least), default=n_layers - period)
        stairs.append(n_layers)
    return stairs


def _step(
    number: int, n_layers: int, request: PipelineRequest, source: _Source, n_tokens: int, rate: float
) -> PruneStep:
    student, teacher = source.parameters(n_layers), source.parameters(source.n_layers)
    size_bytes = source.size_bytes(n_layers)
    memory = RUNTIME_BYTES + WORKSPACE_BYTES + size_bytes
    if not request.distill.cached_words:
        memory += source.size_bytes(source.n_layers)
    if request.distill.is_full:
        memory += student * _FULL_BYTES
    # products of weights and numbers: 1 forward and 2 backward for the student (1 with LoRA), 1 more to compute
    # activations again, 1 for the teacher; two operations each
    passes = (3 if request.distill.is_full else 2) + (1 if request.loop.checkpointing else 0)
    operations = 2 * n_tokens * (passes * student + teacher)
    return PruneStep(number, n_layers, student, size_bytes, n_tokens, memory, operations / rate)


def _lower(source: _Source, final_bytes: int) -> tuple[str, int]:
    """The largest quantization of the whole model that is not larger than the result, else the smallest."""
    found = [(name, source.size_bytes(source.n_layers, name)) for name in LOWER_TYPES]
    return next(((name, size) for name, size in found if size <= final_bytes), min(found, key=lambda item: item[1]))
