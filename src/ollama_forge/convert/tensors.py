"""Which GGUF tensors come out of a checkpoint, in which type: names matched through the family's rows.

In: a family, its configuration and the headers of the checkpoint. Out: one `PlannedTensor` for each GGUF tensor, in the
order in which llama.cpp's converter writes them. No weight is read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ollama_forge.arch.config import ModelConfig
from ollama_forge.arch.layout import head_count
from ollama_forge.arch.rows import ComputedTensor, Family, Residual, Role, TensorAddress, TensorRow, Transform
from ollama_forge.convert.rows import Piece
from ollama_forge.errors import FormatError, SafetensorsError, UnsupportedError
from ollama_forge.gguf.types import FileType, GGMLType, block_elements
from ollama_forge.weights.decode import FLOATS, Scales
from ollama_forge.weights.safetensors import SafetensorsTensor

# What the words of --outtype mean; `auto` looks at the checkpoint.
OUTTYPES = {
    "f32": (GGMLType.F32, FileType.ALL_F32),
    "f16": (GGMLType.F16, FileType.MOSTLY_F16),
    "bf16": (GGMLType.BF16, FileType.MOSTLY_BF16),
    "q8_0": (GGMLType.Q8_0, FileType.MOSTLY_Q8_0),
}

_ALWAYS_FLOAT32 = (Role.ROUTER, Role.POSITION_EMBEDDING)


@dataclass(frozen=True)
class PlannedTensor:
    """A GGUF tensor: its name, where its numbers come from, and the type that conversion gives it.

    Attributes:
        gguf_name: as GGUF spells it.
        row: its row in the family.
        shape: row-major, as GGUF has it.
        type: before any quantization.
        pieces: where the numbers lie; empty for a computed tensor.
        values: the numbers of a computed tensor.
    """

    gguf_name: str
    row: TensorRow
    shape: tuple[int, ...]
    type: GGMLType
    pieces: tuple[Piece, ...] = ()
    values: tuple[float, ...] = ()


@dataclass
class _Experts:
    """The experts of one layer, until all are there."""

    found: dict[tuple[Role, int], SafetensorsTensor] = field(default_factory=dict)


def auto_outtype(family: Family, tensors: Mapping[str, SafetensorsTensor]) -> str:
    """llama.cpp's rule: the 16-bit type of the first matrix that has one, else f16 (conversion/base.py)."""
    for tensor in tensors.values():
        if len(tensor.shape) >= 2 and tensor.dtype in ("BF16", "F16") and family.clean_hf_name(tensor.name) is not None:
            return tensor.dtype.lower()
    return "f16"


def plan_tensors(
    family: Family,
    config: ModelConfig,
    tensors: Mapping[str, SafetensorsTensor],
    scales: Scales,
    outtype: str,
    n_embedding_rows: int | None = None,
) -> list[PlannedTensor]:
    """Give every tensor of the checkpoint its place in GGUF.

    Args:
        tensors: of the checkpoint, in the order of its shards.
        scales: of FP8 weights.
        outtype: a word of `OUTTYPES`.
        n_embedding_rows: rows of the token embedding to keep; None keeps all.

    Raises:
        UnsupportedError: a tensor that the family does not know.
        SafetensorsError: a tensor is missing, or does not fit the configuration.
    """
    planned = [_plan_computed(computed) for computed in (family.computed(config) if family.computed else ())]
    experts: dict[int, _Experts] = {}
    for tensor in tensors.values():
        if tensor.name in scales.dropped:
            continue
        name = family.clean_hf_name(tensor.name)
        if name is None:
            continue
        addresses = family.rows_by_hf_name(name)
        if not addresses:
            raise _unknown(family, tensor)
        for address in addresses:
            _check_layer(address, config, tensor)
            if address.expert is not None:
                planned += _collect_expert(family, config, address, tensor, experts, scales, outtype)
            else:
                planned.append(_plan_one(config, address, tensor, scales, outtype, n_embedding_rows))
    _require_all(family, config, planned, experts)
    return planned


def _plan_computed(computed: ComputedTensor) -> PlannedTensor:
    return PlannedTensor(
        computed.row.gguf_name, computed.row, (len(computed.values),), GGMLType.F32, values=computed.values
    )


def _plan_one(
    config: ModelConfig,
    address: TensorAddress,
    tensor: SafetensorsTensor,
    scales: Scales,
    outtype: str,
    n_embedding_rows: int | None,
) -> PlannedTensor:
    row = address.row
    shape = tensor.shape
    if row.part is not None:
        pieces, shape = _split(row.part, tensor, scales)
    else:
        if row.role is Role.TOKEN_EMBEDDING and n_embedding_rows is not None and len(shape) == 2:
            shape = (min(shape[0], n_embedding_rows), shape[1])
        pieces = (_piece(row, tensor, shape, scales),)
    if row.transform is Transform.TRANSPOSE:
        if len(shape) != 2:
            raise SafetensorsError(f"{tensor.name!r} has the shape {shape}", why="A matrix is expected here.")
        shape = (shape[1], shape[0])
    _check_shape(row, shape, config, tensor)
    return PlannedTensor(address.gguf_name, row, shape, _type_of(row, shape, outtype), pieces)


def _split(
    part: tuple[int, int], tensor: SafetensorsTensor, scales: Scales
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    number, count = part
    if len(tensor.shape) != 3 or tensor.shape[1] % count or tensor.name in scales.by_weight:
        raise SafetensorsError(
            f"{tensor.name!r} has the shape {tensor.shape}",
            why=f"The stacked experts are expected here, with {count} matrices in each.",
            next="Compare config.json with the one in the model's original repository.",
        )
    n_experts, n_rows, n_columns = tensor.shape
    mine = n_rows // count
    pieces = tuple(Piece(tensor, expert * n_rows + number * mine, mine, n_columns) for expert in range(n_experts))
    return pieces, (n_experts, mine, n_columns)


def _piece(row: TensorRow, tensor: SafetensorsTensor, shape: tuple[int, ...], scales: Scales) -> Piece:
    scale = scales.by_weight.get(tensor.name)
    if tensor.dtype not in FLOATS or (scale is None) != (not tensor.dtype.startswith("F8_")):
        raise UnsupportedError(
            f"{tensor.name!r} holds {tensor.dtype} numbers" + ("" if scale else " without a scale"),
            why="Weights are read as F32, F16, BF16, or FP8 with scales.",
            next="Use a checkpoint of the model in BF16 or F16.",
        )
    if scale is not None and len(shape) != 2:
        raise SafetensorsError(f"{tensor.name!r} has the shape {shape} and a scale", why="Only matrices have scales.")
    if len(shape) < 2 and row.is_permuted:
        return Piece(tensor, 0, math.prod(shape), 1)
    n_columns = shape[-1] if shape else 1
    return Piece(tensor, 0, math.prod(shape[:-1]), n_columns, scale)


def _collect_expert(
    family: Family,
    config: ModelConfig,
    address: TensorAddress,
    tensor: SafetensorsTensor,
    experts: dict[int, _Experts],
    scales: Scales,
    outtype: str,
) -> list[PlannedTensor]:
    """Hold back the experts of a layer until the last one is there; then they come as stacked tensors."""
    n_experts = config.n_experts or 0
    if address.layer is None or address.expert is None or address.expert >= n_experts:
        raise SafetensorsError(
            f"{tensor.name!r} is expert {address.expert}, and config.json says there are {n_experts}",
            why="config.json and the weights do not belong together.",
        )
    layer = experts.setdefault(address.layer, _Experts())
    layer.found[address.row.role, address.expert] = tensor
    rows = [row for row in family.tensors if row.is_per_expert]
    if len(layer.found) < n_experts * len(rows):
        return []
    del experts[address.layer]
    planned = []
    for row in rows:
        members = [layer.found[row.role, expert] for expert in range(n_experts)]
        shapes = {member.shape for member in members}
        if len(shapes) != 1 or len(members[0].shape) != 2:
            raise SafetensorsError(
                f"The experts of layer {address.layer} do not have one shape: {sorted(shapes)}",
                why="They are stacked in one tensor.",
            )
        shape = (n_experts, *members[0].shape)
        _check_shape(row, shape, config, members[0])
        pieces = tuple(_piece(row, member, member.shape, scales) for member in members)
        name = TensorAddress(row, address.layer).gguf_name
        planned.append(PlannedTensor(name, row, shape, _type_of(row, shape, outtype), pieces))
    return planned


def _type_of(row: TensorRow, shape: tuple[int, ...], outtype: str) -> GGMLType:
    """The rule of llama.cpp's converter (conversion/base.py, `prepare_tensors`)."""
    wanted = OUTTYPES[outtype][0]
    if len(shape) <= 1 or row.gguf_name.endswith("_norm.weight") or row.role in _ALWAYS_FLOAT32 or row.is_bias:
        return GGMLType.F32
    return GGMLType.F16 if shape[-1] % block_elements(wanted) else wanted


def _check_shape(row: TensorRow, shape: tuple[int, ...], config: ModelConfig, tensor: SafetensorsTensor) -> None:
    """The side along the residual stream has the model's width, and permuted rows can be shared out among the heads."""
    n_sides = 1 if row.is_bias else 2
    runs_along = row.residual is not Residual.NONE
    if runs_along and (len(shape) < n_sides or shape[row.residual_axis] != config.hidden_size):
        raise SafetensorsError(
            f"{tensor.name!r} has the shape {tensor.shape}, and the model is {config.hidden_size} wide",
            why="config.json and the weights do not belong together.",
            next="Compare config.json with the one in the model's original repository.",
        )
    if row.is_permuted and shape:
        head_count(shape[0], row.transform, config)


def _check_layer(address: TensorAddress, config: ModelConfig, tensor: SafetensorsTensor) -> None:
    if address.layer is not None and address.layer >= config.n_layers:
        raise SafetensorsError(
            f"{tensor.name!r} belongs to layer {address.layer}, and config.json says there are {config.n_layers}",
            why="config.json and the weights do not belong together.",
            next="Compare config.json with the one in the model's original repository.",
        )


def _require_all(
    family: Family, config: ModelConfig, planned: list[PlannedTensor], experts: Mapping[int, _Experts]
) -> None:
    present = [tensor.gguf_name for tensor in planned]
    names = set(present)
    if len(names) != len(present):
        twice = next(name for name in names if present.count(name) > 1)
        raise SafetensorsError(f"Two tensors of the checkpoint become {twice!r}", why="One of them has to go.")
    missing = []
    for row in family.tensors:
        if row.is_optional:
            continue
        for layer in range(config.n_layers) if row.is_per_layer else (None,):
            address = TensorAddress(row, layer, 0)
            if address.gguf_name not in names:
                missing.append(address.hf_name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        incomplete = f" Layer {min(experts)} has only some of its experts." if experts else ""
        raise SafetensorsError(
            f"The checkpoint lacks {missing[0]!r}{more}",
            why=f"A model of the {family.name} family with {config.n_layers} layers needs it.{incomplete}",
            next="Download the model again, or compare config.json with the one in its original repository.",
        )


def _unknown(family: Family, tensor: SafetensorsTensor) -> FormatError | UnsupportedError:
    return UnsupportedError(
        f"The {family.name} family has no tensor {tensor.name!r}",
        why="Leaving it out would give a model that answers differently.",
        next="llama.cpp's own converter may know it: pip install 'ollama-forge[llama-cpp-converter]' "
        "and add --converter llama.cpp",
    )
