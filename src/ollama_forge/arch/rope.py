"""Rotary positions as config.json spells them, in the manner of transformers 4 and of 5, read into one value.

In: the raw configuration. Out: `RopeParameters`, and the vectors that GGUF stores beside the tensors.
Facts: src/transformers/modeling_rope_utils.py (`convert_rope_params_to_dict`); llama.cpp conversion/llama.py, phi.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import FormatError

DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class RopeParameters:
    """How positions turn into angles.

    Attributes:
        rope_type: `default`, `linear`, `dynamic`, `yarn`, `longrope` (or `su`), `llama3`.
        theta: the base of the frequencies; of the layers with full attention where there are two kinds.
        theta_local: the base in layers with sliding attention, where a family has its own.
        original_context_length: tokens, before the context was stretched.
        partial_rotary_factor: the part of each head that is turned.
        long_factor, short_factor: one factor for each frequency (longrope).
    """

    rope_type: str = "default"
    theta: float | None = DEFAULT_THETA
    theta_local: float | None = None
    factor: float | None = None
    original_context_length: int | None = None
    partial_rotary_factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    extrapolation_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    long_factor: tuple[float, ...] | None = None
    short_factor: tuple[float, ...] | None = None


def parse_rope(values: Mapping[str, Any], *, by_layer_type: bool, defaults: Mapping[str, Any]) -> RopeParameters:
    """Read what a configuration says about positions, with `rope_theta` inside or beside `rope_parameters`.

    Args:
        values: config.json, flat, with the family's defaults filled in.
        by_layer_type: `rope_parameters` has an entry for each kind of layer (`full_attention`, `sliding_attention`).
        defaults: what the family assumes (`rope_theta`, `rope_local_base_freq`, `partial_rotary_factor`).

    Raises:
        FormatError: `rope_scaling` or `rope_parameters` is not what it should be.
    """
    scaling = _mapping(values, "rope_scaling")
    parameters = _mapping(values, "rope_parameters")
    local: Mapping[str, Any] = {}
    if by_layer_type:
        full = {**_nested(parameters, "full_attention"), **scaling}
        local = _nested(parameters, "sliding_attention")
    else:
        full = dict(scaling or parameters)
    theta = _first(full.get("rope_theta"), values.get("rope_theta"), defaults.get("rope_theta", DEFAULT_THETA))
    theta_local = None
    if by_layer_type:
        theta_local = _first(
            local.get("rope_theta"), values.get("rope_local_base_freq"), defaults.get("rope_local_base_freq")
        )
    rope_type = full.get("rope_type") or full.get("type") or "default"
    if not isinstance(rope_type, str):
        raise FormatError(f"config.json gives rope_type {rope_type!r}", why="It should be a word such as 'llama3'.")
    return RopeParameters(
        rope_type=rope_type.lower(),
        theta=_number("rope_theta", theta),
        theta_local=_number("rope_local_base_freq", theta_local),
        factor=_number("factor", full.get("factor")),
        original_context_length=_original_context(values, full, rope_type.lower()),
        partial_rotary_factor=_number(
            "partial_rotary_factor",
            _first(
                full.get("partial_rotary_factor"),
                values.get("partial_rotary_factor"),
                defaults.get("partial_rotary_factor"),
            ),
        ),
        low_freq_factor=_number("low_freq_factor", full.get("low_freq_factor")),
        high_freq_factor=_number("high_freq_factor", full.get("high_freq_factor")),
        attention_factor=_number("attention_factor", full.get("attention_factor", full.get("attn_factor"))),
        extrapolation_factor=_number("extrapolation_factor", full.get("extrapolation_factor")),
        beta_fast=_number("beta_fast", full.get("beta_fast")),
        beta_slow=_number("beta_slow", full.get("beta_slow")),
        long_factor=_numbers("long_factor", full.get("long_factor")),
        short_factor=_numbers("short_factor", full.get("short_factor")),
    )


def llama3_factors(rope: RopeParameters, head_dim: int) -> tuple[float, ...]:
    """The divisor of each frequency in Llama 3's stretched context, as float32 numbers (one for each pair).

    The order of the float32 roundings is the reference's: torch divides a number by a tensor by multiplying it with
    the reciprocal. The powers are rounded from float64, which is what torch's kernel gives for real heads (64, 128).
    """
    factor = 8.0 if rope.factor is None else rope.factor
    low = 1.0 if rope.low_freq_factor is None else rope.low_freq_factor
    high = 4.0 if rope.high_freq_factor is None else rope.high_freq_factor
    context = 8192 if rope.original_context_length is None else rope.original_context_length
    theta = DEFAULT_THETA if rope.theta is None else rope.theta
    factors = []
    for pair in range(0, head_dim, 2):
        frequency = _f32(1.0 / _f32(theta ** _f32(pair / head_dim)))
        wavelength = _f32(_f32(1.0 / frequency) * _f32(2 * math.pi))
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(_f32(factor))
        else:
            turns = _f32(_f32(1.0 / wavelength) * _f32(context))
            smooth = _f32(_f32(turns - _f32(low)) / _f32(high - low))
            mixed = _f32(_f32(_f32(1.0 - smooth) / _f32(factor)) + smooth)
            factors.append(_f32(1.0 / mixed))
    return tuple(factors)


def longrope_attention_factor(rope: RopeParameters, context_length: int) -> float | None:
    """What attention is multiplied with in a stretched Phi-3, or None where the context is not stretched."""
    if not rope.long_factor or rope.original_context_length is None:
        return None
    scale = context_length / rope.original_context_length
    return math.sqrt(1 + math.log(scale) / math.log(rope.original_context_length)) if scale > 1.0 else 1.0


def _f32(value: float) -> float:
    """Round to float32. Rounding a float64 sum, product or quotient of float32 numbers equals computing in float32."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _original_context(values: Mapping[str, Any], full: Mapping[str, Any], rope_type: str) -> int | None:
    own = full.get("original_max_position_embeddings")
    outer = values.get("original_max_position_embeddings")
    if values.get("model_type") == "phi3":
        own = _first(outer, own)
    elif rope_type in ("llama3", "yarn", "longrope"):
        own = _first(own, values.get("max_position_embeddings"))
    if own is None:
        return None
    if not isinstance(own, (int, float)) or isinstance(own, bool) or own <= 0:
        raise FormatError(f"config.json gives original_max_position_embeddings {own!r}", why="It counts tokens.")
    return int(own)


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise FormatError(f"config.json gives {key} {found!r}", why="It should be an object.")
    return found


def _nested(parameters: Mapping[str, Any], layer_type: str) -> Mapping[str, Any]:
    return _mapping(parameters, layer_type)


def _first(*candidates: Any) -> Any:
    return next((value for value in candidates if value is not None), None)


def _number(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"config.json gives {key} {value!r} for the positions", why="It should be a number.")
    return value


def _numbers(key: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise FormatError(f"config.json gives {key} {value!r}", why="It should be a list of numbers.")
    return tuple(number for item in value if (number := _number(key, item)) is not None)
