"""GGUF blocks to numbers with torch operations, on whatever device the blocks lie (CUDA, MPS, CPU).

In: bytes of one tensor type, [n_blocks, block_bytes]. Out: float32, [n_blocks, block_elements], bit-equal to ggml's
`dequantize_row_*`. On the processor itself ggml is faster: `train.packed` uses it there, and uses this elsewhere.
Layouts: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.types import GGMLType, block_bytes, block_elements

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The binary16 number at byte `start` of each block, as float32 [n_blocks, 1]."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., k] bytes -> [..., 2, k]: all low nibbles, then all high ones."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-2)


def _bit_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., k] bytes -> [..., 8 / bits, k]: field i of every byte, lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)


def _fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The 32 bits at byte `start`, as [n_blocks, 32] of 0 or 16."""
    bits = _bit_planes(blocks[:, start : start + 4].unsqueeze(-1), 1)
    return bits.reshape(blocks.shape[0], 32) << 4


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 12 bytes of Q4_K and Q5_K -> eight 6-bit scales and eight 6-bit minima, uint8 [n_blocks, 8] each."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 0x0F) | ((first >> 6) << 4)), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales, minima


def _unpack_f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.float32)


def _unpack_f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.float16).float()


def _unpack_bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _unpack_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 2:]).flatten(1)
    return (codes.to(torch.int8) - 8).float() * _half(blocks, 0)


def _unpack_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).flatten(1).float() * _half(blocks, 0) + _half(blocks, 2)


def _unpack_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks, 2)
    return (codes.to(torch.int8) - 16).float() * _half(blocks, 0)


def _unpack_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks, 4)
    return codes.float() * _half(blocks, 0) + _half(blocks, 2)


def _unpack_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _unpack_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = blocks[:, :16]
    codes = _bit_planes(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    steps = _half(blocks, 80) * (scales & 0x0F).float()
    minima = _half(blocks, 82) * (scales >> 4).float()
    return (codes.float() * steps.unsqueeze(-1) - minima.unsqueeze(-1)).flatten(1)


def _unpack_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _bit_planes(blocks[:, 32:96].reshape(-1, 2, 32), 2)  # [n, half, plane, 32]
    high = _bit_planes(blocks[:, :32], 1).reshape(-1, 2, 4, 32)
    codes = (low | (high << 2)).to(torch.int8) - 4
    packed = blocks[:, 96:108]
    scale_low = torch.cat((packed[:, :8] & 0x0F, packed[:, :8] >> 4), dim=1)
    scale_high = _bit_planes(packed[:, 8:], 2).flatten(1)
    scales = (scale_low | (scale_high << 4)).to(torch.int8) - 32
    steps = _half(blocks, 108) * scales.float()
    return (codes.reshape(-1, 16, 16).float() * steps.unsqueeze(-1)).flatten(1)


def _unpack_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _k_affine(blocks, codes, scales, minima)


def _unpack_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    high = _bit_planes(blocks[:, 16:48], 1)  # [n, 8, 32]
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | (high << 4)
    return _k_affine(blocks, codes, scales, minima)


def _k_affine(blocks: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """code * (d * scale) - (dmin * minimum), codes [n_blocks, 8, 32]."""
    steps = (_half(blocks, 0) * scales.float()).unsqueeze(-1)
    offsets = (_half(blocks, 2) * minima.float()).unsqueeze(-1)
    return (codes.float() * steps - offsets).flatten(1)


def _unpack_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _bit_planes(blocks[:, 128:192].reshape(-1, 2, 32), 2)
    codes = (low | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    steps = _half(blocks, 208) * scales
    return (codes.reshape(-1, 16, 16).float() * steps.unsqueeze(-1)).flatten(1)


def _iq4_levels(codes: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(_IQ4_LEVELS, dtype=torch.float32, device=codes.device)
    return levels[codes.int()]


def _unpack_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _iq4_levels(_nibbles(blocks[:, 2:]).flatten(1)) * _half(blocks, 0)


def _unpack_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    low = _bit_planes(blocks[:, 4:8].unsqueeze(-1), 4).flatten(1)  # eight nibbles, in order
    high = _bit_planes(blocks[:, 2:4].unsqueeze(-1), 2).flatten(1)
    scales = (low | (high << 4)).to(torch.int8) - 32
    steps = _half(blocks, 0) * scales.float()
    values = _iq4_levels(_nibbles(blocks[:, 8:].reshape(-1, 8, 16)).reshape(-1, 8, 32))
    return (values * steps.unsqueeze(-1)).flatten(1)


_UNPACKERS: dict[GGMLType, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLType.F32: _unpack_f32,
    GGMLType.F16: _unpack_f16,
    GGMLType.BF16: _unpack_bf16,
    GGMLType.Q4_0: _unpack_q4_0,
    GGMLType.Q4_1: _unpack_q4_1,
    GGMLType.Q5_0: _unpack_q5_0,
    GGMLType.Q5_1: _unpack_q5_1,
    GGMLType.Q8_0: _unpack_q8_0,
    GGMLType.Q2_K: _unpack_q2_k,
    GGMLType.Q3_K: _unpack_q3_k,
    GGMLType.Q4_K: _unpack_q4_k,
    GGMLType.Q5_K: _unpack_q5_k,
    GGMLType.Q6_K: _unpack_q6_k,
    GGMLType.IQ4_NL: _unpack_iq4_nl,
    GGMLType.IQ4_XS: _unpack_iq4_xs,
}

UNPACKED_TYPES = frozenset(_UNPACKERS)


def unpack_blocks(rows: torch.Tensor, type: GGMLType) -> torch.Tensor:
    """Unpack whole rows where they lie.

    Args:
        rows: uint8 [n_rows, row_bytes], any device.
        type: the type of every row; one of `UNPACKED_TYPES`.

    Returns:
        float32 [n_rows, n_columns] on the same device.

    Raises:
        UnsupportedError: torch operations for this type are not written.
    """
    unpacker = _UNPACKERS.get(type)
    if unpacker is None:
        raise UnsupportedError(
            f"{type.name} blocks cannot be unpacked on {rows.device.type!r}",
            why=f"torch operations exist for {', '.join(sorted(known.name for known in UNPACKED_TYPES))}.",
            next="Train on the processor with --device cpu, or quantize the base to one of these types first.",
        )
    n_blocks = rows.numel() // block_bytes(type)
    values = unpacker(rows.reshape(n_blocks, block_bytes(type)))
    return values.reshape(
        rows.shape[0], -1 if rows.shape[0] else rows.shape[1] // block_bytes(type) * block_elements(type)
    )
