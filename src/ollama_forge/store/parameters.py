"""The parameters that a Modelfile may set: their types and defaults, their text form and the params blob.

Names and types: api/types.go:568 and :1274 of Ollama v0.33; the server decodes the params blob into those types, and
one value of a wrong type makes every request for the model fail.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ollama_forge.errors import FormatError, ModelfileError
from ollama_forge.store.go_json import parse_json_object, render_go_float, render_go_json, round_to_float32

ParameterValue = int | float | bool | str | tuple[str, ...]
PARAMS_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
        kind: `int`, `float`, `bool`, or `tuple` for texts that may be given several times.
        default: what Ollama uses when it is not set; None where that depends on the machine.
        meaning: a line for a person.
        least: smaller numbers are refused.
    """

    name: str
    kind: type
    default: ParameterValue | None
    meaning: str
    least: int | None = None


PARAMETERS: dict[str, Parameter] = {
    row.name: row
    for row in (
        Parameter("num_ctx", int, None, "context window in tokens (4096, 32768 or 262144 by the size of the GPU)", 4),
        Parameter("num_predict", int, -1, "most tokens to generate; -1: no limit"),
        Parameter("num_keep", int, 4, "tokens kept from the start when the context is full"),
        Parameter("seed", int, -1, "seed of the sampler; -1: random"),
        Parameter("temperature", float, 0.8, "higher is more varied, 0 always takes the likeliest token"),
        Parameter("top_k", int, 40, "choose among the k likeliest tokens"),
        Parameter("top_p", float, 0.9, "choose among tokens that make up this probability"),
        Parameter("min_p", float, 0.0, "drop tokens less likely than this share of the likeliest"),
        Parameter("typical_p", float, 1.0, "locally typical sampling; 1: off"),
        Parameter("repeat_last_n", int, 64, "tokens looked back on for repetition"),
        Parameter("repeat_penalty", float, 1.0, "penalty for repetition; 1: none"),
        Parameter("presence_penalty", float, 0.0, "penalty for tokens that occurred"),
        Parameter("frequency_penalty", float, 0.0, "penalty for tokens by how often they occurred"),
        Parameter("stop", tuple, (), "text at which generation stops; may be given several times"),
        Parameter("num_batch", int, 512, "prompt tokens processed at once"),
        Parameter("num_gpu", int, -1, "layers on the GPU; -1: as many as fit"),
        Parameter("main_gpu", int, None, "the GPU for small tensors"),
        Parameter("num_thread", int, 0, "threads; 0: chosen by the machine"),
        Parameter("use_mmap", bool, None, "map the model's file instead of reading it"),
        Parameter("draft_num_predict", int, 4, "tokens that a draft model guesses ahead"),
    )
}
DEPRECATED_PARAMETERS = frozenset(
    {
        "penalize_newline",
        "low_vram",
        "f16_kv",
        "logits_all",
        "vocab_only",
        "use_mlock",
        "mirostat",
        "mirostat_tau",
        "mirostat_eta",
    }
)

_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})


def parse_parameter(name: str, text: str) -> ParameterValue:
    """The typed value of `PARAMETER name text`; a `stop` gives a tuple of one.

    Raises:
        ModelfileError: an unknown or deprecated name, a text of another type, or a number that nothing can run with.
    """
    row = find_parameter(name)
    if row.kind is tuple:
        return (text,)
    if row.kind is int and _INT.fullmatch(text) and len(text) <= 20 and -(1 << 63) <= int(text) < 1 << 63:
        _require_least(row, int(text))
        return int(text)
    if row.kind is float and _FLOAT.fullmatch(text) and abs(float(text)) < 3.4e38:
        return round_to_float32(float(text))
    if row.kind is bool and text in _TRUE | _FALSE:
        return text in _TRUE
    words = {int: "a whole number", float: "a number", bool: "true or false"}[row.kind]
    raise ModelfileError(
        f"PARAMETER {name} {_shown(text)} is not {words}",
        why=f"{name}: {row.meaning}.",
        next=f"Example: {name}={render_parameter(row.default) if row.default is not None else _EXAMPLES[row.kind]}",
    )


def _require_least(row: Parameter, number: int) -> None:
    if row.least is not None and number < row.least:
        raise ModelfileError(
            f"PARAMETER {row.name} {number} is too small",
            why=f"{row.name}: {row.meaning}. Below {row.least} nothing can be run.",
            next=f"Example: {row.name}=4096",
        )


_EXAMPLES = {int: "4096", float: "0.7", bool: "true"}


def find_parameter(name: str) -> Parameter:
    """The row of a parameter.

    Raises:
        ModelfileError: no such parameter, or one that Ollama no longer takes.
    """
    row = PARAMETERS.get(name)
    if row:
        return row
    if name in DEPRECATED_PARAMETERS:
        raise ModelfileError(
            f"PARAMETER {name} does nothing any more", why="Ollama ignores it.", next=f"Leave {name} out."
        )
    near = difflib.get_close_matches(name, PARAMETERS, n=1)
    raise ModelfileError(
        f"There is no parameter {_shown(name)}",
        why="Known: " + ", ".join(sorted(PARAMETERS)),
        next=f"Did you mean {near[0]}?" if near else "Check its spelling.",
    )


def render_parameter(value: ParameterValue) -> str:
    """The text that `parse_parameter` reads back (for a single value, not a list of stops)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return render_go_float(value)
    return str(value)


def merge_parameters(
    *layers: Iterable[tuple[str, ParameterValue]],
) -> tuple[tuple[str, ParameterValue], ...]:
    """Parameters of several layers, sorted by name; a later layer replaces a whole value, stops included."""
    merged: dict[str, ParameterValue] = {}
    for layer in layers:
        merged.update(layer)
    return tuple(sorted(merged.items()))


def parse_params_blob(raw: bytes) -> tuple[tuple[str, ParameterValue], ...]:
    """Read a params blob, sorted by name. Unknown names are kept when they hold a plain value: the server only warns.

    Raises:
        ModelfileError: not a JSON object, or a known name with a value that makes the server refuse the model.
    """
    try:
        document = parse_json_object(raw, limit_bytes=PARAMS_LIMIT_BYTES, what="The params blob")
    except FormatError as exc:
        raise ModelfileError(exc.what, why=exc.why, next="Run `ollama-forge verify`.") from exc
    values = {name: _typed(name, value) for name, value in document.items() if value is not None}
    return tuple(sorted((name, value) for name, value in values.items() if value is not None))


def render_params_blob(parameters: Iterable[tuple[str, ParameterValue]]) -> bytes:
    """The params blob as Ollama writes it: sorted names, `stop` always a list, a newline at the end."""
    document = {name: list(value) if isinstance(value, tuple) else value for name, value in sorted(parameters)}
    return render_go_json(document).encode() + b"\n"


def _typed(name: str, value: object) -> ParameterValue | None:
    row = PARAMETERS.get(name)
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if row is None:
        if texts and isinstance(value, list):
            return tuple(value)
        return value if isinstance(value, (bool, int, float, str)) else None
    if row.kind is tuple and isinstance(value, list) and texts:
        return tuple(value)
    if row.kind is bool and isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if row.kind is int:
            return int(value)
        if row.kind is float:
            return float(value)
    raise ModelfileError(
        f"The params blob has {name} = {_shown(value)}",
        why="Ollama refuses every request for a model with a value of that type.",
        next="Make the model again, or run `ollama-forge verify` to find others.",
    )


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."
