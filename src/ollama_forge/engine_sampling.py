"""How the engine chooses tokens, and what a Modelfile's PARAMETERs mean for it.

In: typed parameters. Out: a `Sampling`, and the arguments with which the model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ollama_forge.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The defaults are Ollama's (api/types.go:1096): a check answers as `ollama run` would.

    Attributes:
        max_tokens: most tokens to generate; None: until the model stops or the context is full.
        temperature: 0 always takes the likeliest token, and gives the same text every time.
        seed: of the sampler; None: another one each time.
        stop: texts that end the generation; they are not part of the text.
    """

    max_tokens: int | None = None
    temperature: float = 0.8
    seed: int | None = None
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()


GREEDY = Sampling(temperature=0.0, seed=0)
"""The likeliest token each time, until the model stops."""


_SAMPLING_NAMES = {field.name for field in fields(Sampling)} - {"max_tokens", "stop", "seed"}
_LOADING_NAMES = {
    "num_ctx": "context_length",
    "num_thread": "n_threads",
    "num_gpu": "n_gpu_layers",
    "num_batch": "n_batch",
}
_NO_MEANING_HERE = frozenset({"num_keep", "main_gpu", "use_mmap", "draft_num_predict"})


def sampling_from_parameters(parameters: Mapping[str, Any]) -> Sampling:
    """The sampling that a Modelfile's PARAMETERs (typed values) ask for; `loading_from_parameters` has the others.

    Raises:
        UsageError: an unknown name, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for name, value in parameters.items():
        if name == "num_predict":
            # Negative: no limit (-1), or until the context is full (-2).
            limit = int(_number(name, value))
            values["max_tokens"] = limit if limit >= 0 else None
        elif name == "seed":
            seed = int(_number(name, value))
            values["seed"] = seed % (1 << 32) if seed >= 0 else None
        elif name == "stop":
            values["stop"] = (value,) if isinstance(value, str) else tuple(str(text) for text in value)
        elif name in _SAMPLING_NAMES:
            number = _number(name, value)
            values[name] = int(number) if name in ("top_k", "repeat_last_n") else float(number)
        elif name not in _LOADING_NAMES and name not in _NO_MEANING_HERE:
            known = sorted({*_SAMPLING_NAMES, *_LOADING_NAMES, *_NO_MEANING_HERE, "num_predict", "seed", "stop"})
            raise UsageError(
                f"There is no parameter {name!r}", why="Known: " + ", ".join(known), next="Check its spelling."
            )
    return Sampling(**values)


_LEAST_CONTEXT = 2


def loading_from_parameters(parameters: Mapping[str, Any]) -> dict[str, int]:
    """The keyword arguments of `open_engine` that a Modelfile's PARAMETERs ask for (num_ctx, num_thread, num_gpu, ...).

    Raises:
        UsageError: a value of the wrong type, or a context in which llama.cpp cannot run.
    """
    wanted = {ours: int(_number(name, parameters[name])) for name, ours in _LOADING_NAMES.items() if name in parameters}
    if 0 < wanted.get("context_length", 0) < _LEAST_CONTEXT:
        raise UsageError(
            f"num_ctx={wanted['context_length']} is too small a context",
            why="llama.cpp needs room for a token and the one after it.",
            next="Example: --param num_ctx=4096",
        )
    # Ollama's "choose for me": 0 threads, -1 layers.
    return {name: value for name, value in wanted.items() if value > 0 or (name == "n_gpu_layers" and value == 0)}


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise UsageError(f"{name}={value!r} is not a number", next=f"Example: --param {name}=1")
    return number if isinstance(value, float) else int(number)
