"""Numbers out of safetensors bytes, and the scales that turn FP8 back into float32.

In: raw bytes and a dtype. Out: numpy arrays. The arithmetic is that of llama.cpp's converter, which works with torch:
float16 and float32 stay, everything else becomes float32, a scale is multiplied in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ollama_forge.errors import SafetensorsError, UnsupportedError
from ollama_forge.gguf import native
from ollama_forge.gguf.types import GGMLType
from ollama_forge.weights.safetensors import SafetensorsFolder, SafetensorsTensor

Array = NDArray[Any]

# The GGML type with the same bytes.
SAME_BYTES = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

_PLAIN = {
    "F64": "<f8",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "I64": "<i8",
    "U64": "<u8",
}


def decode(raw: memoryview, dtype: str, n_threads: int | None = None) -> Array:
    """The numbers of a stretch of bytes, flat: float16 for F16, float32 for everything else.

    Raises:
        UnsupportedError: a dtype that holds no plain numbers.
    """
    if dtype == "F16":
        return np.frombuffer(raw, "<f2")
    if dtype == "F32":
        return np.frombuffer(raw, "<f4")
    if dtype == "BF16":
        return native.dequantize(raw, GGMLType.BF16, (raw.nbytes // 2,), n_threads=n_threads)
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return _fp8_table(dtype)[np.frombuffer(raw, np.uint8)]
    if dtype in _PLAIN:
        with np.errstate(over="ignore"):
            return np.frombuffer(raw, _PLAIN[dtype]).astype(np.float32)
    raise UnsupportedError(
        f"Numbers of the dtype {dtype!r} cannot be read",
        why="Only packed formats use it.",
        next="Use a checkpoint of the model in BF16, F16 or F32.",
    )


@functools.cache
def _fp8_table(dtype: str) -> NDArray[np.float32]:
    """The value of each of the 256 codes: https://arxiv.org/abs/2209.05433, table 1."""
    exponent_bits, mantissa_bits = (4, 3) if dtype == "F8_E4M3" else (5, 2)
    bias = (1 << (exponent_bits - 1)) - 1
    table = np.empty(256, np.float32)
    for code in range(256):
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        if dtype == "F8_E4M3" and code & 0x7F == 0x7F:
            value = math.nan
        elif dtype == "F8_E5M2" and exponent == 31:
            value = math.nan if mantissa else math.inf
        elif exponent == 0:
            value = math.ldexp(mantissa, 1 - bias - mantissa_bits)
        else:
            value = math.ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits)
        table[code] = -value if code & 0x80 else value
    return table


@dataclass(frozen=True)
class Scale:
    """What an FP8 matrix is multiplied with.

    Attributes:
        name: of the scale's tensor.
        block: rows and columns that share one scale; None when the scale is one number, or one for each row.
    """

    name: str
    block: tuple[int, int] | None


@dataclass(frozen=True)
class Scales:
    """All scales of a checkpoint, by the name of what they scale; `dropped` names tensors that are not weights."""

    by_weight: Mapping[str, Scale]
    dropped: frozenset[str]


def find_scales(quantization: Any, names: Mapping[str, SafetensorsTensor]) -> Scales:
    """Read `quantization_config` and find the scales that belong to the weights.

    Raises:
        UnsupportedError: the weights are packed in a way that is not FP8 with scales.
        SafetensorsError: a scale without its weight.
    """
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") is None:
        return Scales({}, frozenset())
    method = quantization["quant_method"]
    block = None
    unused: tuple[str, ...]
    if method == "fp8":
        ending, unused = "_scale_inv", (".activation_scale", "_activation_scale")
        block = _block_of(quantization.get("weight_block_size"))
    elif method == "compressed-tensors" and quantization.get("format") in ("float-quantized", "naive-quantized"):
        ending, unused = "_scale", (".input_scale",)
        block = _compressed_block(quantization)
    elif method == "modelopt" and "NVFP4" not in str(quantization.get("quant_algo")):
        ending, unused = "_scale", (".input_scale", ".k_scale", ".v_scale")
    else:
        raise UnsupportedError(
            f"The weights of this model are packed with {str(method)[:40]!r}",
            why="Of the packed formats only FP8 with scales can be read.",
            next="Use the model in BF16 or F16, which most repositories of packed models name as their base model.",
        )
    scales = {name.removesuffix(ending): Scale(name, block) for name in names if name.endswith("weight" + ending)}
    homeless = next((weight for weight in scales if weight not in names), None)
    if homeless is not None:
        raise SafetensorsError(
            f"The scale {scales[homeless].name!r} belongs to {homeless!r}, which is not there",
            why="A part of the model is missing.",
            next="Download the model again.",
        )
    dropped = {scale.name for scale in scales.values()} | {name for name in names if name.endswith(unused)}
    return Scales(scales, frozenset(dropped))


def _block_of(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise UnsupportedError(
        f"config.json gives weight_block_size {str(value)[:60]}", why="Two whole numbers are expected."
    )


def _compressed_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    groups = quantization.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    if len(weights) != 1 or not isinstance(weights[0], Mapping) or weights[0].get("type") != "float":
        raise UnsupportedError(
            "This model mixes several packed formats",
            why="Of the packed formats only FP8 with scales can be read.",
            next="Use the model in BF16 or F16.",
        )
    return _block_of(weights[0].get("block_structure")) if weights[0].get("strategy") == "block" else None


def scale_rows(folder: SafetensorsFolder, scale: Scale, shape: tuple[int, ...], start: int, stop: int) -> Array:
    """What rows `start` to `stop` of a matrix are multiplied with: float32 that broadcasts to [stop - start, columns].

    Raises:
        SafetensorsError: the scale does not fit the matrix.
    """
    tensor = folder.find_tensor(scale.name)
    values = decode(folder.read(scale.name), tensor.dtype).astype(np.float32, copy=False).reshape(tensor.shape)
    n_rows, n_columns = shape
    if scale.block is None:
        if values.size == 1:
            return values.reshape(1, 1)
        if values.size == n_rows and values.shape[0] == n_rows:
            return values.reshape(n_rows, 1)[start:stop]
    else:
        rows, columns = scale.block
        if values.shape == (-(-n_rows // rows), -(-n_columns // columns)):
            mine = values[np.arange(start, stop) // rows]
            return np.repeat(mine, columns, axis=1)[:, :n_columns]
    raise SafetensorsError(
        f"The scale {scale.name!r} of shape {tensor.shape} does not fit a matrix of shape {shape}",
        why=f"Blocks of {scale.block} were announced." if scale.block else "",
        next="Compare config.json with the one in the model's original repository.",
    )
