"""Does it fit? The memory that a job takes on a model, from tensor shapes, context and method, beside what is free.

In: a GGUF's header. Out: `Fit`s with their numbers and a light. No weight is read and nothing is loaded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.arch.kv_cache import kv_cache_bytes, trained_context
from ollama_forge.errors import GGUFError, UnsupportedError
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.jobs.doctor_machine import find_cards
from ollama_forge.jobs.environment import available_memory_bytes, fit_light
from ollama_forge.jobs.training_plan import forward_memory, training_memory
from ollama_forge.train.options import LoraOptions

DEFAULT_CONTEXT = 4096
"""Tokens that Ollama gives a model which says nothing else, on a machine without a large card."""

RUN_RUNTIME_BYTES = 150_000_000
STREAM_BYTES = 300_000_000
_BATCH = 512  # positions that llama.cpp computes at once (n_ubatch)
_FLOAT_BYTES = 4
_PROMPT_POSITIONS = 512


@dataclass(frozen=True)
class Machine:
    """What is free here: memory (None where the system does not say), and that of the NVIDIA card with most of it."""

    memory_bytes: int | None
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Fit:
    """What one job takes, and the light.

    Attributes:
        job: `run`, `quantize`, `finetune`, `abliterate` or `downsize`.
        parts: bytes by what they are for.
        on_gpu: it is judged by the card's memory, because all of it fits there.
    """

    job: str
    parts: Mapping[str, int]
    available_bytes: int | None
    on_gpu: bool = False

    @property
    def needed_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def light(self) -> str:
        """`green`, `yellow`, `red` or `unknown`."""
        return fit_light(self.needed_bytes, self.available_bytes)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "light": self.light,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "on": "gpu" if self.on_gpu else "cpu",
            "parts": dict(self.parts),
        }


def look_at_machine() -> Machine:
    """What is free now."""
    return Machine(available_memory_bytes(), max((card.free_bytes for card in find_cards()), default=0))


def fit_model(gguf: GGUFFile, machine: Machine, *, context: int = 0, length: int = 1024) -> dict[str, Fit]:
    """Every job that there is for a model; a job that its family cannot have is left out.

    Args:
        context: tokens of a conversation; 0: `DEFAULT_CONTEXT`, or what the model was trained for where that is less.
        length: tokens of a training example.
    """
    fits = {"run": fit_run(gguf, machine, context), "quantize": fit_stream("quantize", gguf, machine)}
    with contextlib.suppress(UnsupportedError):
        find_family_by_gguf(gguf.architecture)
        fits["finetune"] = fit_finetune(gguf, machine, length=length)
        fits["abliterate"] = fit_abliterate(gguf, machine)
        fits["downsize"] = fit_downsize(gguf, machine, length=length)
    return fits


def fit_run(gguf: GGUFFile, machine: Machine, context: int = 0) -> Fit:
    """Ask it: the weights, the keys and values of the context, and what one batch computes.

    llama.cpp reserves logits for a whole batch, which outweighs the rest of its graph when attention is fused:
    src/llama-context.cpp, `graph_reserve`. The weights count once: where it keeps a copy of them in another order for
    the processor, the file's own pages are what the system may drop.
    """
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    vocabulary = len(tokens) if tokens is not None else 0
    inner = gguf.arch_value("feed_forward_length", 0)
    widest = max([vocabulary, *([inner] if isinstance(inner, int) else list(inner))])
    try:
        cache = kv_cache_bytes(gguf, usual_context(gguf, context))
    except GGUFError:
        cache = 0
    parts = {
        "weights": gguf.size_bytes,
        "context": cache,
        "batch": _BATCH * widest * _FLOAT_BYTES,
        "runtime": RUN_RUNTIME_BYTES,
    }
    return _judge("run", parts, machine)


def usual_context(gguf: GGUFFile, context: int = 0) -> int:
    """`context`, else Ollama's default, bounded by what the model was trained for."""
    return context or min(DEFAULT_CONTEXT, trained_context(gguf) or DEFAULT_CONTEXT)


def fit_stream(job: str, gguf: GGUFFile, machine: Machine) -> Fit:
    """Read, change and write it tensor by tensor: twice the largest one in float32, whatever the model's size."""
    largest = max((math.prod(tensor.shape) for tensor in gguf.tensors.values()), default=0)
    parts = {"tensors": 2 * largest * _FLOAT_BYTES, "runtime": STREAM_BYTES}
    return Fit(job, parts, machine.memory_bytes)


def fit_finetune(gguf: GGUFFile, machine: Machine, *, length: int = 1024, lora: LoraOptions | None = None) -> Fit:
    """LoRA on the packed weights, one example of `length` tokens at a time."""
    return _judge("finetune", training_memory(gguf, lora or LoraOptions(), length), machine)


def fit_abliterate(gguf: GGUFFile, machine: Machine) -> Fit:
    """Prompts go through the packed weights; then the edit is streamed. The larger of both counts."""
    forward = Fit("abliterate", forward_memory(gguf, _PROMPT_POSITIONS), machine.memory_bytes)
    edit = fit_stream("abliterate", gguf, machine)
    return _judge("abliterate", max(forward, edit, key=lambda fit: fit.needed_bytes).parts, machine)


def fit_downsize(gguf: GGUFFile, machine: Machine, *, length: int = 1024) -> Fit:
    """Teach a smaller copy with the model itself: a student of at most the same size is trained, the teacher asked."""
    student = training_memory(gguf, LoraOptions(), length)
    parts = {**student, "teacher": gguf.size_bytes + forward_memory(gguf, length)["activations"]}
    return _judge("downsize", parts, machine)


def _judge(job: str, parts: Mapping[str, int], machine: Machine) -> Fit:
    """On the card where all of it fits there; else in memory."""
    needed = sum(parts.values())
    if machine.gpu_bytes and fit_light(needed, machine.gpu_bytes) in ("green", "yellow"):
        return Fit(job, parts, machine.gpu_bytes, on_gpu=True)
    return Fit(job, parts, machine.memory_bytes)
