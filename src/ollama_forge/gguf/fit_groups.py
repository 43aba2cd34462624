"""The parts of a model that get their types together when it is made to fit a size, and what each type costs them.

In: names, shapes and types of a model's tensors. Out: `Group`s for `budget.find_front`: one role in one block, or in a
band of neighbouring blocks where there are too many to measure each. Pure; measuring is `train.probe`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.budget import Group, Option
from ollama_forge.gguf.mix_rules import Role
from ollama_forge.gguf.mixture import TensorRow, allows_quantization, fitting_type, tensor_role
from ollama_forge.gguf.types import FileType, GGMLType, bits_per_weight, tensor_bytes

CANDIDATES = (
    *(GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.IQ4_XS, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q8_0),
)
"""Types that every group may get, beside the one that it has."""

CANDIDATES_WITH_IMATRIX = (GGMLType.IQ2_S, GGMLType.IQ3_XXS, GGMLType.IQ3_S)
"""Types that make sense where an importance matrix knows the tensor."""

ANCHORS = (GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q6_K)
"""Types that are measured where measuring all of them would take too many passes."""

PLAIN_MIXES = (
    *(FileType.MOSTLY_Q2_K, FileType.MOSTLY_Q3_K_S, FileType.MOSTLY_Q3_K_M, FileType.MOSTLY_Q3_K_L),
    *(FileType.MOSTLY_IQ4_XS, FileType.MOSTLY_Q4_K_S, FileType.MOSTLY_Q4_K_M, FileType.MOSTLY_Q5_K_S),
    *(FileType.MOSTLY_Q5_K_M, FileType.MOSTLY_Q6_K, FileType.MOSTLY_Q8_0),
)
"""What a mix of one's own is compared with."""

SMALLEST_COST = 1e-9
"""Nats: below, a measured divergence is the noise of float32."""

_FILE_TYPES = {
    GGMLType.Q2_K: FileType.MOSTLY_Q2_K,
    GGMLType.Q3_K: FileType.MOSTLY_Q3_K_M,
    GGMLType.Q4_K: FileType.MOSTLY_Q4_K_M,
    GGMLType.Q5_K: FileType.MOSTLY_Q5_K_M,
    GGMLType.Q6_K: FileType.MOSTLY_Q6_K,
    GGMLType.Q8_0: FileType.MOSTLY_Q8_0,
    GGMLType.Q4_0: FileType.MOSTLY_Q4_0,
    GGMLType.Q4_1: FileType.MOSTLY_Q4_1,
    GGMLType.Q5_0: FileType.MOSTLY_Q5_0,
    GGMLType.Q5_1: FileType.MOSTLY_Q5_1,
    GGMLType.IQ4_NL: FileType.MOSTLY_IQ4_NL,
    GGMLType.IQ4_XS: FileType.MOSTLY_IQ4_XS,
    GGMLType.IQ3_S: FileType.MOSTLY_IQ3_S,
    GGMLType.IQ3_XXS: FileType.MOSTLY_IQ3_XXS,
    GGMLType.IQ2_S: FileType.MOSTLY_IQ2_M,
    GGMLType.F16: FileType.MOSTLY_F16,
    GGMLType.BF16: FileType.MOSTLY_BF16,
    GGMLType.F32: FileType.ALL_F32,
}
_PARTS = {
    Role.QUERY: "attn_q+k",
    Role.KEY: "attn_q+k",
    Role.VALUE: "attn_v",
    Role.ATTENTION_OUTPUT: "attn_output",
    Role.FFN_UP: "ffn_gate+up",
    Role.FFN_GATE: "ffn_gate+up",
    Role.FFN_DOWN: "ffn_down",
    Role.TOKEN_EMBEDDING: "token_embd",
    Role.OUTPUT: "output",
    Role.OTHER: "other",
}
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class GroupPlan:
    """What is to be measured.

    Attributes:
        groups: with costs of 0.
        measured: for each group, the numbers of the options that are measured; the others are worked out.
        n_bands: into which the blocks are put together.
    """

    groups: tuple[Group, ...]
    measured: tuple[tuple[int, ...], ...]
    n_bands: int

    @property
    def n_passes(self) -> int:
        """How often the model has to be run."""
        return sum(len(numbers) for numbers in self.measured)


def plan_groups(
    tensors: Sequence[TensorRow],
    *,
    weighted: Collection[str],
    max_passes: int,
    plain: Sequence[Mapping[str, GGMLType]] = (),
    alignment: int = 32,
) -> GroupPlan:
    """Put tensors together so that measuring takes at most `max_passes` runs of the model, where that is possible.

    Args:
        tensors: of the file to be quantized.
        weighted: names that an importance matrix knows.
        plain: mixes of all tensors, of which a group may take its part; such parts are not measured alone.
        alignment: of the file; every tensor is padded to it.

    Raises:
        UnsupportedError: nothing in the file can be quantized.
    """
    rows = [row for row in tensors if allows_quantization(row[0], row[1])]
    if not rows:
        raise UnsupportedError(
            "The file has no tensor that can be quantized", next="Check what it is: ollama-forge show FILE"
        )
    n_blocks = 1 + max((_block_of(name) for name, _, _ in rows), default=-1)
    plan = None
    for n_bands in range(max(1, n_blocks), 0, -1):
        groups = _grouped(rows, _bands(n_blocks, n_bands), weighted, plain, alignment)
        for anchors in (None, ANCHORS):
            plan = GroupPlan(groups, tuple(_measured(group, anchors) for group in groups), n_bands)
            if plan.n_passes <= max_passes:
                return plan
    assert plan is not None
    return plan


def cost_of_options(group: Group, measured: Mapping[int, float], errors: Sequence[float]) -> Group:
    """The group with a cost for every option.

    Between measured options the logarithm of the divergence is a straight line over that of the weights' error; beyond
    them it is proportional to the error, as it is for small changes. A larger error never costs less.

    Args:
        measured: option number -> divergence in nats.
        errors: for each option the relative squared error of its weights; 0 for the type that the group has.
    """
    known = sorted((max(errors[number], 1e-300), max(cost, SMALLEST_COST)) for number, cost in measured.items())
    costs = [0.0 if error <= 0 else _interpolated(known, error) for error in errors]
    for number, cost in measured.items():
        costs[number] = max(cost, SMALLEST_COST)
    floor = 0.0
    for number in sorted(range(len(errors)), key=lambda number: (errors[number], -group.options[number].size_bytes)):
        floor = max(floor, costs[number])
        costs[number] = floor
    options = (replace(option, cost=cost) for option, cost in zip(group.options, costs, strict=True))
    return replace(group, options=tuple(options))


def main_file_type(types: Mapping[str, GGMLType], sizes: Mapping[str, int]) -> FileType:
    """What a file of these tensor types calls itself: the mix whose main type has the most bytes."""
    total: dict[GGMLType, int] = {}
    for name, type in types.items():
        total[type] = total.get(type, 0) + sizes[name]
    known = [type for type in total if type in _FILE_TYPES]
    return _FILE_TYPES[max(known, key=lambda type: (total[type], -type))] if known else FileType.MOSTLY_Q4_K_M


def _interpolated(known: Sequence[tuple[float, float]], error: float) -> float:
    """Divergence at an error, from (error, divergence) pairs in the order of their errors."""
    if not known:
        return error
    below = [pair for pair in known if pair[0] <= error]
    above = [pair for pair in known if pair[0] > error]
    if not below or not above:
        nearest = below[-1] if below else above[0]
        return nearest[1] * error / nearest[0]
    (low_error, low), (high_error, high) = below[-1], above[0]
    share = (math.log(error) - math.log(low_error)) / (math.log(high_error) - math.log(low_error))
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _measured(group: Group, anchors: Collection[GGMLType] | None) -> tuple[int, ...]:
    """Numbers of the options to measure: all that change something, or those nearest to the anchors."""
    numbers = [number for number, option in enumerate(group.options[:-1]) if not option.is_from_plain]
    if anchors is None or len(numbers) <= len(anchors):
        return tuple(numbers)
    chosen = {
        min(numbers, key=lambda n: abs(bits_per_weight(group.options[n].type) - bits_per_weight(anchor)))
        for anchor in anchors
    }
    return tuple(sorted(chosen))


def _grouped(
    rows: Sequence[TensorRow],
    bands: Sequence[int],
    weighted: Collection[str],
    plain: Sequence[Mapping[str, GGMLType]],
    alignment: int,
) -> tuple[Group, ...]:
    parts: dict[tuple[int, str], list[TensorRow]] = {}
    for row in rows:
        block = _block_of(row[0])
        part = "attn_qkv" if "attn_qkv" in row[0] else _PARTS[tensor_role(row[0])]
        parts.setdefault((bands[block] if block >= 0 else -1, part), []).append(row)
    return tuple(
        Group(
            _group_name(band, part, bands),
            tuple(row[0] for row in members),
            _options(members, weighted, plain, alignment),
        )
        for (band, part), members in sorted(parts.items())
    )


def _options(
    members: Sequence[TensorRow],
    weighted: Collection[str],
    plain: Sequence[Mapping[str, GGMLType]],
    alignment: int,
) -> tuple[Option, ...]:
    """What these tensors may become, smallest first; the last leaves them as they are."""
    present = tuple(source for _, _, source in members)
    now = _size(members, present, alignment)
    wanted = list(CANDIDATES)
    if all(name in weighted for name, _, _ in members):
        wanted += CANDIDATES_WITH_IMATRIX
    found: dict[tuple[GGMLType, ...], Option] = {}
    for type in wanted:
        types = tuple(fitting_type(type, shape, source) for _, shape, source in members)
        option = Option(type, types, _size(members, types, alignment))
        if option.size_bytes < now:
            found.setdefault(types, option)
    for mix in plain:
        types = tuple(mix[name] for name, _, _ in members)
        size_bytes = _size(members, types, alignment)
        if size_bytes < now:
            found.setdefault(types, Option(_main_type(types), types, size_bytes, is_from_plain=True))
    unchanged = Option(max(present, key=bits_per_weight), present, now)
    return (*sorted(found.values(), key=lambda option: (option.size_bytes, option.type)), unchanged)


def _main_type(types: Sequence[GGMLType]) -> GGMLType:
    return max(types, key=lambda type: (types.count(type), -type))


def _size(members: Sequence[TensorRow], types: Sequence[GGMLType], alignment: int) -> int:
    sizes = (tensor_bytes(type, shape) for (_, shape, _), type in zip(members, types, strict=True))
    return sum(-(-size // alignment) * alignment for size in sizes)


def _block_of(name: str) -> int:
    block = _BLOCK.match(name)
    return int(block[1]) if block else -1


def _bands(n_blocks: int, n_bands: int) -> list[int]:
    """The band of each block; the first and the last block, which matter most, stay alone while they can."""
    if n_bands >= n_blocks or n_bands < 3:
        return [block * n_bands // n_blocks for block in range(n_blocks)]
    inner = [1 + block * (n_bands - 2) // (n_blocks - 2) for block in range(n_blocks - 2)]
    return [0, *inner, n_bands - 1]


def _group_name(band: int, part: str, bands: Sequence[int]) -> str:
    if band < 0:
        return part
    blocks = [block for block, its_band in enumerate(bands) if its_band == band]
    where = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
    return f"blk.{where}.{part}"
