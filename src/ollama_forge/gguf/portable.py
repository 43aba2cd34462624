"""Block formats in NumPy, for machines where ggml's functions are out of reach (the Windows wheel exports none).

In: uint8 [n_blocks, block_bytes] or float32 [n_blocks, block_elements]. Out: the other one. Bits equal ggml's (but for
the sign of a zero minimum in Q4_1 and Q5_1 blocks that hold both zeros: the compiler's order of comparing decides it).
Only `native` calls this, with NumPy's warnings off. Formats: ggml-common.h and ggml-quants.c (`_ref`) of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ollama_forge.gguf.types import GGMLType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def encode_f32(x: Floats) -> Bytes:
    return np.ascontiguousarray(x, "<f4").view(np.uint8)


def decode_f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4")


def encode_f16(x: Floats) -> Bytes:
    """Round to nearest even; a NaN keeps its sign only."""
    x = np.ascontiguousarray(x)
    bits = x.astype("<f2").view("<u2")
    return np.where(np.isnan(x), (bits & 0x8000) | 0x7E00, bits).astype("<u2").view(np.uint8)


def decode_f16(blocks: Bytes) -> Floats:
    """Exact; a NaN becomes quiet and keeps its sign and bits."""
    x = blocks.view("<f2").astype(np.float32)
    bits = x.view(np.uint32)
    np.bitwise_or(bits, 0x00400000, out=bits, where=np.isnan(x))
    return x


def encode_bf16(x: Floats) -> Bytes:
    """Round to nearest even; a NaN becomes quiet and keeps its sign and upper bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(is_nan, (bits >> 16) | 64, rounded).astype("<u2").view(np.uint8)


def decode_bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def encode_q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    v = x * _inverse(d)
    whole = np.trunc(v)
    whole += np.copysign(np.abs(v - whole) >= 0.5, v)
    return np.hstack([_half(d), _to_int(whole).astype(np.int8).view(np.uint8)])


def decode_q8_0(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8) * _scale(blocks, 0)


def encode_q4_0(x: Floats) -> Bytes:
    d, levels = _symmetric_levels(x, 4)
    return np.hstack([_half(d), _pack_nibbles(levels)])


def decode_q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)) * _scale(blocks, 0)


def encode_q5_0(x: Floats) -> Bytes:
    d, levels = _symmetric_levels(x, 5)
    return np.hstack([_half(d), _pack_fifth_bits(levels), _pack_nibbles(_low_bits(levels))])


def decode_q5_0(blocks: Bytes) -> Floats:
    levels = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return (levels.astype(np.int8) - np.int8(16)) * _scale(blocks, 0)


def encode_q4_1(x: Floats) -> Bytes:
    d, low, levels = _shifted_levels(x, 4)
    return np.hstack([_half(d), _half(low), _pack_nibbles(levels)])


def decode_q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]) * _scale(blocks, 0) + _scale(blocks, 2)


def encode_q5_1(x: Floats) -> Bytes:
    d, low, levels = _shifted_levels(x, 5)
    return np.hstack([_half(d), _half(low), _pack_fifth_bits(levels), _pack_nibbles(_low_bits(levels))])


def decode_q5_1(blocks: Bytes) -> Floats:
    levels = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return levels * _scale(blocks, 0) + _scale(blocks, 2)


def decode_q4_k(blocks: Bytes) -> Floats:
    levels = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled_with_minimum(blocks, levels)


def decode_q5_k(blocks: Bytes) -> Floats:
    levels = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return _scaled_with_minimum(blocks, np.where(fifth & 1, levels | 16, levels))


def decode_q6_k(blocks: Bytes) -> Floats:
    # Two halves of 128: 64 bytes of low nibbles, 32 bytes of high bit pairs.
    low = blocks[:, :128].reshape(-1, 2, 1, 64) >> np.array([0, 4], np.uint8).reshape(1, 1, 2, 1)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    levels = (low & 15).reshape(-1, 2, 4, 32) | ((high & 3) << 4)
    steps = _scale(blocks, 208) * blocks[:, 192:208].view(np.int8)
    centred = (levels.astype(np.int8) - np.int8(32)).reshape(-1, 16, 16)
    return (steps.reshape(-1, 16, 1) * centred).reshape(-1, 256)


def _scaled_with_minimum(blocks: Bytes, levels: Bytes) -> Floats:
    """`d * scale * level - dmin * minimum` for 8 groups of 32, scales and minima packed in 6 bits each (bytes 4-15)."""
    packed = blocks[:, 4:16].reshape(-1, 3, 4)
    a, b, c = packed[:, 0], packed[:, 1], packed[:, 2]
    scales = np.hstack([a & 63, (c & 15) | ((a >> 6) << 4)])
    minima = np.hstack([b & 63, (c >> 4) | ((b >> 6) << 4)])
    step = (_scale(blocks, 0) * scales).reshape(-1, 8, 1)
    shift = (_scale(blocks, 2) * minima).reshape(-1, 8, 1)
    return (step * levels - shift).reshape(-1, 256)


def _symmetric_levels(x: Floats, bits: int) -> tuple[Floats, Bytes]:
    """Levels around a centre; the largest weight, with its sign, becomes the lowest level."""
    centre = 1 << (bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = (largest + np.float32(0)) / np.float32(-centre)  # + 0 drops the sign of a zero
    levels = _to_int(x * _inverse(d) + np.float32(centre + 0.5))
    return d, np.minimum(2 * centre - 1, levels).astype(np.uint8)


def _shifted_levels(x: Floats, bits: int) -> tuple[Floats, Floats, Bytes]:
    """Levels from the smallest weight to the largest."""
    top = (1 << bits) - 1
    low = np.take_along_axis(x, x.argmin(axis=1)[:, None], axis=1)
    high = x.max(axis=1, keepdims=True)
    d = (high - low + np.float32(0)) / np.float32(top)
    levels = _to_int((x - low) * _inverse(d) + np.float32(0.5))
    return d, low, np.minimum(top, levels).astype(np.uint8)


def _inverse(d: Floats) -> Floats:
    return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _to_int(values: Floats) -> NDArray[np.int32]:
    # The inverse of a subnormal scale is infinite; what C makes of the cast is 0.
    return np.where(np.isfinite(values), values, np.float32(0)).astype(np.int32)


def _half(column: Floats) -> Bytes:
    return np.ascontiguousarray(column, np.float32).astype("<f2").view(np.uint8)


def _scale(blocks: Bytes, start: int) -> Floats:
    return decode_f16(np.ascontiguousarray(blocks[:, start : start + 2]))


def _low_bits(values: Bytes) -> Bytes:
    return np.bitwise_and(values, 15, dtype=np.uint8)


def _pack_nibbles(levels: Bytes) -> Bytes:
    half = levels.shape[1] // 2
    return levels[:, :half] | np.left_shift(levels[:, half:], 4, dtype=np.uint8)


def _nibbles(packed: Bytes) -> Bytes:
    return np.concatenate([_low_bits(packed), np.right_shift(packed, 4, dtype=np.uint8)], axis=-1)


def _pack_fifth_bits(levels: Bytes) -> Bytes:
    return np.packbits(levels >> 4, axis=1, bitorder="little")


def _fifth_bits(packed: Bytes) -> Bytes:
    bits = np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little")
    return np.left_shift(bits, 4, dtype=np.uint8)


QUANTIZE: dict[GGMLType, Callable[[Floats], Bytes]] = {
    GGMLType.F32: encode_f32,
    GGMLType.F16: encode_f16,
    GGMLType.BF16: encode_bf16,
    GGMLType.Q8_0: encode_q8_0,
    GGMLType.Q4_0: encode_q4_0,
    GGMLType.Q4_1: encode_q4_1,
    GGMLType.Q5_0: encode_q5_0,
    GGMLType.Q5_1: encode_q5_1,
}

IMATRIX_MATTERS = frozenset({GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1})
"""Types whose ggml encoder searches differently when it has an importance matrix; not done here."""

DEQUANTIZE: dict[GGMLType, Callable[[Bytes], Floats]] = {
    GGMLType.F32: decode_f32,
    GGMLType.F16: decode_f16,
    GGMLType.BF16: decode_bf16,
    GGMLType.Q8_0: decode_q8_0,
    GGMLType.Q4_0: decode_q4_0,
    GGMLType.Q4_1: decode_q4_1,
    GGMLType.Q5_0: decode_q5_0,
    GGMLType.Q5_1: decode_q5_1,
    GGMLType.Q4_K: decode_q4_k,
    GGMLType.Q5_K: decode_q5_k,
    GGMLType.Q6_K: decode_q6_k,
}
