"""config.json through the rows of a family, and back: a configuration to GGUF fields, GGUF metadata to a configuration.

In: the raw configuration as the Hub spells it (transformers 4 and 5), or GGUF metadata. Out: `ModelConfig`, GGUF
fields, or a dict that transformers' `AutoConfig` takes. Defaults are those of the configuration classes of
transformers, because the reference converter reads config.json through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.arch.rope import RopeParameters, llama3_factors, parse_rope
from ollama_forge.arch.rows import Family, HyperRow
from ollama_forge.errors import FormatError, UnsupportedError
from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field

_MAX_LAYERS = 10_000  # a bound on what a file may claim; the deepest models have a few hundred


@dataclass(frozen=True)
class ModelConfig:
    """A configuration with the text part at the top, the family's defaults filled in and the positions parsed.

    Attributes:
        values: config.json, flat.
        rope: how positions turn into angles.
    """

    values: Mapping[str, Any]
    rope: RopeParameters

    def find(self, *keys: str) -> Any:
        """The value of the first key that is there, or None."""
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def count(self, *keys: str) -> int:
        """A whole number above zero.

        Raises:
            FormatError: it is missing, or it is something else.
        """
        value = self.find(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise FormatError(
                f"config.json gives {keys[0]} {value!r}",
                why="The model needs a whole number above zero here.",
                next="Compare config.json with the one in the model's original repository.",
            )
        return value

    @property
    def n_layers(self) -> int:
        return self.count("num_hidden_layers", "n_layers", "n_layer", "num_layers")

    @property
    def n_heads(self) -> int:
        return self.count("num_attention_heads", "n_head", "n_heads")

    @property
    def n_kv_heads(self) -> int:
        return self.count("num_key_value_heads", "n_kv_heads", "num_attention_heads", "n_head")

    @property
    def hidden_size(self) -> int:
        return self.count("hidden_size", "n_embd", "dim")

    @property
    def head_dim(self) -> int:
        return self.count("head_dim") if self.find("head_dim") is not None else self.hidden_size // self.n_heads

    @property
    def n_experts(self) -> int | None:
        return self.find("num_local_experts", "num_experts", "n_routed_experts")


def parse_config(family: Family, raw: Mapping[str, Any]) -> ModelConfig:
    """Read config.json for a family.

    Raises:
        FormatError: a value that the family needs is missing or is not what it should be.
    """
    text = raw.get("text_config")
    values: dict[str, Any] = {**raw, **text} if isinstance(text, Mapping) else dict(raw)
    for key, default in family.defaults.items():
        if values.get(key) is None:
            values[key] = default(ModelConfig(values, RopeParameters())) if callable(default) else default
    if family.has_rope:
        rope = parse_rope(values, by_layer_type=family.rope_by_layer_type, defaults=family.rope_defaults)
    else:
        rope = RopeParameters(theta=None)
    config = ModelConfig(values, rope)
    if min(config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim) < 1:
        raise FormatError(
            f"config.json gives {config.n_heads} heads to {config.hidden_size} dimensions",
            why="Each head needs at least one.",
        )
    if config.n_layers > _MAX_LAYERS:
        raise FormatError(f"config.json claims {config.n_layers:,} layers", why="No model has as many.")
    return config


def hyper_fields(family: Family, config: ModelConfig) -> list[Field]:
    """The architecture's GGUF fields, in the order of the family's rows.

    Raises:
        FormatError: a required value is missing, or a value does not fit its type.
    """
    fields = []
    for row in family.hypers:
        value = row.compute(config) if row.compute else config.find(*row.config_keys)
        if value is None:
            if row.is_required:
                raise FormatError(
                    f"config.json has no {row.config_keys[0]!r}",
                    why=f"A {family.name} model cannot be described without it.",
                    next="Compare config.json with the one in the model's original repository.",
                )
            continue
        key = f"{family.gguf_architecture}.{row.gguf_key}"
        fields.append(Field(key, row.type, _fitting(row, value)))
    return fields


def warnings_of(family: Family, config: ModelConfig) -> tuple[str, ...]:
    """What the configuration asks for and GGUF cannot say, as sentences for the user."""
    return tuple(
        f"config.json says {expectation.config_key} = {value!r}: {expectation.consequence}"
        for expectation in family.expectations
        if (value := config.values.get(expectation.config_key)) is not None and value not in expectation.values
    )


def config_from_gguf(
    family: Family,
    metadata: Mapping[str, Any],
    *,
    tensor_names: Sequence[str] = (),
    rope_factors: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, Any]:
    """Make the configuration that transformers needs, from GGUF metadata.

    Args:
        family: of the file.
        metadata: GGUF metadata; arrays only need a length.
        tensor_names: GGUF names; without `output.weight` the head is tied to the embedding.
        rope_factors: values of `rope_freqs.weight`, `rope_factors_long.weight` and `rope_factors_short.weight` where
            the file has them.

    Raises:
        FormatError: the metadata lack something that the family needs.
        UnsupportedError: the frequency factors are not those of any scaling that transformers knows.
    """
    prefix = family.gguf_architecture + "."
    result: dict[str, Any] = {
        "architectures": [family.hf_architectures[0]],
        "model_type": family.name,
        "vocab_size": _vocabulary_size(prefix, metadata),
        "tie_word_embeddings": "output.weight" not in tensor_names,
    }
    for row in family.hypers:
        if not row.config_keys or not row.turns_back:
            continue
        value = metadata.get(prefix + row.gguf_key)
        if value is None and row.is_required:
            raise FormatError(f"The GGUF file has no {prefix + row.gguf_key!r}", why="Its family needs it.")
        if value is not None:
            result[row.config_keys[0]] = value
    if family.has_rope:
        result.update(_rope_from_gguf(family, metadata, result, rope_factors or {}))
    for key, gguf_key in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        result[key] = metadata.get(f"tokenizer.ggml.{gguf_key}_token_id")
    if family.turn_back:
        family.turn_back({key.removeprefix(prefix): value for key, value in metadata.items()}, result)
    return result


def _rope_from_gguf(
    family: Family, metadata: Mapping[str, Any], result: Mapping[str, Any], factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    prefix = family.gguf_architecture + "."
    get: Callable[[str], Any] = lambda suffix: metadata.get(f"{prefix}rope.{suffix}")  # noqa: E731
    theta = get("freq_base") or family.rope_defaults.get("rope_theta", 10000.0)
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if get("scaling.type") in ("linear", "yarn"):
        full |= {"rope_type": get("scaling.type"), "factor": get("scaling.factor")}
        if full["rope_type"] == "yarn":
            yarn = {
                "original_max_position_embeddings": get("scaling.original_context_length"),
                "attention_factor": get("scaling.yarn_attn_factor"),
                "beta_fast": get("scaling.yarn_beta_fast"),
                "beta_slow": get("scaling.yarn_beta_slow"),
            }
            full |= {key: value for key, value in yarn.items() if value is not None}
    if frequencies := factors.get("rope_freqs.weight"):
        full |= _llama3_scaling(frequencies, theta)
    if long := factors.get("rope_factors_long.weight"):
        full |= {
            "rope_type": "longrope",
            "long_factor": list(long),
            "short_factor": list(factors.get("rope_factors_short.weight", long)),
            "original_max_position_embeddings": get("scaling.original_context_length"),
        }
    rotated = get("dimension_count")
    head_dim = result.get("head_dim") or result["hidden_size"] // result["num_attention_heads"]
    if rotated is not None and rotated < head_dim:
        full["partial_rotary_factor"] = rotated / head_dim
    if not family.rope_by_layer_type:
        return {"rope_parameters": full}
    local = get("freq_base_swa") or family.rope_defaults.get("rope_local_base_freq", 10000.0)
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _llama3_scaling(frequencies: Sequence[float], theta: float) -> dict[str, Any]:
    """The scaling whose factors these are. Every Llama 3 release uses the same three constants beside `factor`."""
    factor = max(frequencies)
    for context in (8192, 4096, 16384, 32768):
        rope = RopeParameters("llama3", theta, None, factor, context, None, 1.0, 4.0)
        expected = llama3_factors(rope, 2 * len(frequencies))
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(expected, frequencies, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedError(
        f"The {len(frequencies)} frequency factors of this GGUF file are not those of a Llama 3 scaling",
        why="transformers can only compute factors from the constants of a known scaling.",
        next="Use the Hugging Face folder of the same model.",
    )


def _vocabulary_size(prefix: str, metadata: Mapping[str, Any]) -> int:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is not None:
        return len(tokens)
    size = metadata.get(prefix + "vocab_size")
    if not isinstance(size, int):
        raise FormatError("The GGUF file has no vocabulary", why="Neither tokens nor a vocabulary size are in it.")
    return size


def _fitting(row: HyperRow, value: Any) -> Any:
    if row.type is ValueType.UINT32:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise _unfit(row, value, "a whole number below 2^32")
    elif row.type is ValueType.FLOAT32:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 3.4e38:
            raise _unfit(row, value, "a real number")
        return float(value)
    elif row.type is ValueType.STRING and not isinstance(value, str):
        raise _unfit(row, value, "text")
    return value


def _unfit(row: HyperRow, value: Any, wanted: str) -> FormatError:
    name = row.config_keys[0] if row.config_keys else row.gguf_key
    return FormatError(
        f"config.json gives {name} {value!r}",
        why=f"It should be {wanted}.",
        next="Compare config.json with the one in the model's original repository.",
    )
