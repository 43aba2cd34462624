"""adapter_config.json of PEFT: what it says about rank, alpha and scale, and what of it cannot be honoured.

In: a folder. Out: `PeftConfig`. Settings that change the arithmetic in a way that is not understood here are refused by
name, so that no adapter is applied as something that it is not. Facts: peft/tuners/lora/config.py of PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.errors import AdapterError, SafetensorsError
from ollama_forge.files import disk_error
from ollama_forge.weights.header import parse_json
from ollama_forge.weights.safetensors import resolve_member

CONFIG_NAME = "adapter_config.json"
MERGE_WITH_PEFT = "Merge it with PEFT (merge_and_unload) into the Hugging Face model, then import the result."
_MAX_CONFIG_BYTES = 8 << 20
_MAX_PATTERN_LENGTH = 300
_MAX_REPEATS = 3

# What a setting does; with it the numbers in the file alone are not the change that was trained.
_REFUSED = {
    "layer_replication": "repeats layers of the base model",
    "use_qalora": "pools the inputs in groups",
    "use_bdlora": "makes the matrices block-diagonal",
    "arrow_config": "chooses among several adapters while it runs",
    "kasa_config": "scales the components by further numbers",
    "velora_config": "trains on compressed inputs",
    "monteclora_config": "draws the matrices at random",
    "ensure_weight_tying": "ties the embedding's adapter to the head's",
}
_PLAIN_INITS = (None, True, False, "true", "false", "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """What adapter_config.json says.

    Attributes:
        rank, alpha: where no pattern says otherwise.
        rank_patterns, alpha_patterns: (expression, value) in the file's order; the first that fits counts.
        base_name: `base_model_name_or_path` as it is.
        base_class: the class that `auto_mapping` names.
    """

    rank: int
    alpha: float
    is_rank_stabilized: bool = False
    has_magnitudes: bool = False
    rank_patterns: tuple[tuple[str, int], ...] = ()
    alpha_patterns: tuple[tuple[str, float], ...] = ()
    base_name: str | None = None
    base_class: str | None = None
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    invocation_tokens: tuple[int, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def rank_of(self, module: str) -> int:
        """The rank that a module was trained with."""
        return next((value for pattern, value in self.rank_patterns if _fits(pattern, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha that a module was trained with."""
        return next((value for pattern, value in self.alpha_patterns if _fits(pattern, module)), self.alpha)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read and check adapter_config.json.

    Raises:
        AdapterError: another kind of adapter, or a setting that is broken or cannot be honoured; it is named.
        UnsafeFileError: a link that leads out of the folder.
        DiskError: it cannot be read.
    """
    path = resolve_member(folder, CONFIG_NAME)
    try:
        with path.open("rb") as stream:
            text = stream.read(_MAX_CONFIG_BYTES + 1)
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    if len(text) > _MAX_CONFIG_BYTES:
        raise _bad(path, "size", f"more than {_MAX_CONFIG_BYTES:,} bytes")
    try:
        values = parse_json(text, path)
    except SafetensorsError as exc:
        raise AdapterError(f"{str(path)!r} is not a JSON object", why=exc.why, next="Get the adapter again.") from exc
    _require_plain_lora(path, values)
    rank = values.get("r", 8)
    if type(rank) is not int or rank < 1:
        raise AdapterError(
            f"{str(path)!r} says that the rank r is {rank!r}",
            why="A LoRA of rank 0 or less changes nothing.",
            next="Train again with a rank of at least 1, or get the adapter again.",
        )
    return PeftConfig(
        rank=rank,
        alpha=_number(path, "lora_alpha", values.get("lora_alpha", 8)),
        is_rank_stabilized=values.get("use_rslora") is True,
        has_magnitudes=values.get("use_dora") is True,
        rank_patterns=tuple((word, _whole(path, "rank_pattern", r)) for word, r in _patterns(path, values, "rank")),
        alpha_patterns=tuple((word, _number(path, "alpha_pattern", a)) for word, a in _patterns(path, values, "alpha")),
        base_name=_text(values.get("base_model_name_or_path")),
        base_class=_base_class(values),
        bias=str(values.get("bias") or "none"),
        modules_to_save=tuple(str(name) for name in values.get("modules_to_save") or ()),
        invocation_tokens=_tokens(path, values.get("alora_invocation_tokens")),
        values=values,
    )


def _require_plain_lora(path: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind is None and not {"r", "lora_alpha"} <= values.keys():
        raise AdapterError(
            f"{str(path)!r} describes no PEFT adapter",
            why="It has no peft_type, r and lora_alpha."
            + (" It looks like an MLX adapter." if "lora_parameters" in values else ""),
            next="Use the PEFT form of the adapter (adapter_config.json with peft_type LORA).",
        )
    if kind not in (None, "LORA"):
        raise AdapterError(
            f"{str(path)!r} describes a {str(kind)[:40]!r} adapter, not a LoRA",
            why="Only LoRA (and DoRA) can be put into Ollama's form or merged here.",
            next=MERGE_WITH_PEFT,
        )
    for key, effect in _REFUSED.items():
        if values.get(key):
            raise AdapterError(
                f"The adapter was trained with {key} = {str(values[key])[:60]!r}",
                why=f"That setting {effect}, so its matrices alone are not the change that was trained.",
                next=MERGE_WITH_PEFT,
            )
    init = values.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise AdapterError(
            f"The adapter was trained with init_lora_weights = {str(init)[:40]!r}",
            why="That method also changes the base model's own weights, which are not in the adapter.",
            next="Save it as a plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=START).",
        )


def _patterns(path: Path, values: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    key = f"{kind}_pattern"
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise _bad(path, key, found)
    for pattern in found:
        _compiled(pattern)
    return list(found.items())


def _fits(pattern: str, module: str) -> bool:
    """PEFT's own rule: the expression fits the module's name or its end after a dot."""
    return _compiled(pattern).match(module) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    """An expression from a file, kept to forms that cannot take exponential time on a module's name."""
    repeats = sum(pattern.count(sign) for sign in "*+{?")
    nested = any(")" + sign in pattern for sign in "*+{?")
    if len(pattern) > _MAX_PATTERN_LENGTH or repeats > _MAX_REPEATS or nested:
        raise AdapterError(
            f"adapter_config.json has the pattern {pattern[:80]!r}",
            why="So involved an expression could keep this program busy for ever.",
            next="Write the modules' names there, one by one.",
        )
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except (re.error, RecursionError) as exc:
        raise AdapterError(
            f"adapter_config.json has the pattern {pattern[:80]!r}", why=f"It is no regular expression: {exc}."
        ) from exc


def _base_class(values: Mapping[str, Any]) -> str | None:
    mapping = values.get("auto_mapping")
    return _text(mapping.get("base_model_class")) if isinstance(mapping, dict) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _tokens(path: Path, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(token) is int and 0 <= token < 1 << 32 for token in value):
        raise _bad(path, "alora_invocation_tokens", value)
    return tuple(value)


def _number(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise _bad(path, key, value)
    return float(value)


def _whole(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _bad(path, key, value)
    return value


def _bad(path: Path, key: str, value: Any) -> AdapterError:
    return AdapterError(
        f"{str(path)!r} gives {key} {str(value)[:80]!r}",
        why="PEFT itself could not use it.",
        next="Get the adapter again from where it was made.",
    )
