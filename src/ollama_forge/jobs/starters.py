"""The models that `start` offers, and which of them suits this machine. One table; add a row to offer another.

In: this machine's memory, a profile and a task. Out: a `Start`: a repo of the Hub, a quantization, and parameters.
Sizes are those of the publishers' files (huggingface.co, 2026), in bytes, rounded; only whether a model fits is
decided by them, and what is downloaded is verified by the Hub's own numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ollama_forge.errors import UsageError
from ollama_forge.source.gguf_names import needed_bytes

_MB = 1_000_000


@dataclass(frozen=True)
class Starter:
    """A small instruct model whose repo has Q4_0, Q4_K_M and Q8_0.

    Attributes:
        megabytes: of its files, by quantization.
        tasks: what it is for; the first row that fits is taken, so the largest come first.
    """

    repo: str
    megabytes: Mapping[str, int]
    tasks: tuple[str, ...]


STARTERS = (
    Starter("unsloth/Qwen3-8B-GGUF", {"Q4_0": 4780, "Q4_K_M": 5030, "Q8_0": 8710}, ("chat", "creative")),
    Starter("unsloth/Qwen3-4B-Instruct-2507-GGUF", {"Q4_0": 2380, "Q4_K_M": 2500, "Q8_0": 4280}, ("chat", "creative")),
    Starter("bartowski/Llama-3.2-3B-Instruct-GGUF", {"Q4_0": 1920, "Q4_K_M": 2020, "Q8_0": 3420}, ("chat", "creative")),
    Starter("bartowski/Llama-3.2-1B-Instruct-GGUF", {"Q4_0": 773, "Q4_K_M": 808, "Q8_0": 1320}, ("chat", "creative")),
    Starter("unsloth/Qwen3-0.6B-GGUF", {"Q4_0": 382, "Q4_K_M": 397, "Q8_0": 640}, ("chat", "creative")),
    Starter("bartowski/Qwen2.5-Coder-7B-Instruct-GGUF", {"Q4_0": 4440, "Q4_K_M": 4680, "Q8_0": 8100}, ("coding",)),
    Starter("bartowski/Qwen2.5-Coder-1.5B-Instruct-GGUF", {"Q4_0": 938, "Q4_K_M": 986, "Q8_0": 1650}, ("coding",)),
    Starter("bartowski/Qwen2.5-Coder-0.5B-Instruct-GGUF", {"Q4_0": 352, "Q4_K_M": 398, "Q8_0": 531}, ("coding",)),
)


@dataclass(frozen=True)
class Profile:
    """A balance between speed, quality and memory.

    Attributes:
        memory_share: of this machine's memory, that the model may take; a small part, because what fills a memory is
            slow to run without a card.
        parameters: temperature, num_ctx, top_p and repeat_penalty.
    """

    quant: str
    memory_share: float
    parameters: Mapping[str, float]


PROFILES = {
    "fast": Profile("Q4_0", 0.12, {"temperature": 0.8, "num_ctx": 2048, "top_p": 0.9, "repeat_penalty": 1.05}),
    "balanced": Profile("Q4_K_M", 0.2, {"temperature": 0.7, "num_ctx": 4096, "top_p": 0.9, "repeat_penalty": 1.1}),
    "quality": Profile("Q8_0", 0.4, {"temperature": 0.6, "num_ctx": 8192, "top_p": 0.95, "repeat_penalty": 1.1}),
    "low-vram": Profile("Q4_0", 0.08, {"temperature": 0.7, "num_ctx": 2048, "top_p": 0.9, "repeat_penalty": 1.1}),
}

TASKS: dict[str, Mapping[str, float]] = {
    "chat": {},
    "coding": {"temperature": 0.2, "repeat_penalty": 1.0},
    "creative": {"temperature": 1.0, "top_p": 0.95},
}
"""What a task changes of a profile's parameters."""

_UNKNOWN_MEMORY = 8_000 * _MB


@dataclass(frozen=True)
class Start:
    """What to get, and why."""

    repo: str
    quant: str
    parameters: dict[str, float] = field(default_factory=dict)
    why: str = ""


def choose_start(
    profile: str = "balanced",
    task: str | None = None,
    *,
    memory_bytes: int | None = None,
    repo: str | None = None,
    quant: str | None = None,
) -> Start:
    """The largest model of the table that fits a profile's share of the memory, else the smallest.

    Args:
        memory_bytes: this machine's; None where it does not say.
        repo, quant: what the person chose; neither is second-guessed.

    Raises:
        UsageError: no such profile or task.
    """
    if profile not in PROFILES:
        raise UsageError(f"There is no profile {profile!r}", next=f"One of: {', '.join(PROFILES)}")
    if task is not None and task not in TASKS:
        raise UsageError(f"There is no task {task!r}", next=f"One of: {', '.join(TASKS)}")
    chosen = PROFILES[profile]
    parameters = {**chosen.parameters, **(TASKS[task] if task else {})}
    wanted = quant or chosen.quant
    if repo:
        return Start(repo, wanted, parameters, "named by you")
    rows = [row for row in STARTERS if (task or "chat") in row.tasks]
    memory = memory_bytes or _UNKNOWN_MEMORY
    budget = int(memory * chosen.memory_share)
    said = f"{chosen.memory_share:.0%} of {memory / 1e9:.1f} GB of memory is {budget / 1e9:.1f} GB"
    for row in rows:
        needed = needed_bytes(_size_of(row, wanted))
        if needed <= budget:
            why = f"the largest of {len(rows)} that fits the profile {profile!r}: it runs in about "
            return Start(row.repo, wanted, parameters, f"{why}{needed / 1e9:.1f} GB, and {said}")
    smallest = rows[-1]
    needed = needed_bytes(_size_of(smallest, wanted))
    why = f"the smallest of {len(rows)}: it runs in about {needed / 1e9:.1f} GB, while {said}"
    return Start(smallest.repo, wanted, parameters, why)


def _size_of(row: Starter, quant: str) -> int:
    """A quantization that the table does not know is taken for the largest that it knows."""
    return row.megabytes.get(quant.upper(), max(row.megabytes.values())) * _MB
