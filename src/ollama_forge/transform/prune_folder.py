"""Cut a Hugging Face folder smaller: the same cuts as `prune` makes in GGUF, in the order and names of transformers.

In: an open checkpoint of safetensors and a `Cut`. Out: a `PrunedFolder` (plan), then the folder, whole or not at all.
Every number that stays keeps its bytes: nothing is rounded. config.json says the new sizes.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ollama_forge.arch.rows import TensorRow, Transform
from ollama_forge.errors import SafetensorsError, UnsupportedError
from ollama_forge.files import Advance, place_copy, write_bytes
from ollama_forge.transform.cut import Cut, ModelSizes, kept_axes, read_sizes, sizes_after, validate_cut
from ollama_forge.transform.folder import atomic_folder
from ollama_forge.transform.gather import Indices, gather, row_numbers
from ollama_forge.weights.checkpoint import Checkpoint
from ollama_forge.weights.header import DTYPE_BITS, SafetensorsTensor
from ollama_forge.weights.safetensors import INDEX_NAME, SafetensorsFolder
from ollama_forge.weights.safetensors_writer import SafetensorsEntry, ShardPlan, plan_shards, write_shards

_LEFT_BEHIND = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".safetensors")
_LAYER = re.compile(r"(?P<before>(?:^|.*?\.)(?:layers|h)\.)(?P<number>\d+)(?P<after>\..*)")
_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<number>\d+)(?P<after>\..*)")


@dataclass(frozen=True, eq=False)
class PrunedFolder:
    """A smaller folder that is decided but not yet written.

    Attributes:
        config: config.json of the smaller model.
        sizes: of the smaller model.
        untouched, sliced: new names of tensors that are whole, and of those that keep some of their numbers.
    """

    config: Mapping[str, Any]
    shards: ShardPlan = field(repr=False)
    sizes: ModelSizes
    untouched: tuple[str, ...]
    sliced: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of the weights' files."""
        return self.shards.size_bytes

    @property
    def n_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(
            entry.nbytes * 8 // DTYPE_BITS[entry.dtype] for shard in self.shards.shards for entry in shard.entries
        )


def plan_folder_cut(checkpoint: Checkpoint, cut: Cut) -> PrunedFolder:
    """Decide everything; only headers are read. `checkpoint` stays open until the folder is written.

    Raises:
        UsageError: the cut makes no model.
        UnsupportedError: numbers with scales cut inside a matrix, or a tensor that nobody knows how to cut.
    """
    source = checkpoint.folder
    assert source is not None
    sizes = read_sizes(checkpoint)
    validate_cut(sizes, cut)
    if not cut.is_depth_only and checkpoint.config.values.get("quantization_config") is not None:
        raise UnsupportedError(
            "The weights are stored with scales, which cannot be cut inside a matrix",
            why="A scale is shared by rows and columns, some of which would go.",
            next="Cut whole layers (--layers N), or convert first: ollama-forge convert FOLDER -o model.gguf",
        )
    planner = _FolderPlanner(checkpoint, source, sizes, cut)
    entries = [entry for tensor in source.tensors.values() if (entry := planner.entry(tensor)) is not None]
    return PrunedFolder(
        config=cut_config(checkpoint.hf_config, sizes, cut),
        shards=plan_shards(entries),
        sizes=sizes_after(sizes, cut),
        untouched=tuple(planner.untouched),
        sliced=tuple(planner.sliced),
    )


def write_pruned_folder(
    checkpoint: Checkpoint,
    pruned: PrunedFolder,
    target: Path,
    *,
    overwrite: bool = False,
    advance: Advance | None = None,
) -> None:
    """Write the folder: weights, config.json, and the source's other files (tokenizer, template, licence) as they are.

    Raises:
        ExistsError: the target is there and `overwrite` is false.
        DiskError: no room, or the system refused.
    """
    with atomic_folder(target, overwrite=overwrite, expected_bytes=pruned.size_bytes) as folder:
        for entry in sorted(checkpoint.path.iterdir()):
            if not entry.is_file() or entry.suffix.lower() in _LEFT_BEHIND:
                continue
            if entry.name in ("config.json", INDEX_NAME) or entry.name.endswith(".index.json"):
                continue
            place_copy(entry.resolve(), folder / entry.name, may_hardlink=False)
        text = json.dumps(dict(pruned.config), indent=2, ensure_ascii=False) + "\n"
        write_bytes(folder / "config.json", text.encode())
        write_shards(pruned.shards, folder, advance)


class _FolderPlanner:
    """Decides one tensor after the other."""

    def __init__(self, checkpoint: Checkpoint, source: SafetensorsFolder, sizes: ModelSizes, cut: Cut) -> None:
        self.family = checkpoint.family
        self.source = source
        self.sizes = sizes
        self.cut = cut
        layers = range(sizes.n_layers) if cut.layers is None else cut.layers.tolist()
        self._place = {layer: place for place, layer in enumerate(layers)}
        self.untouched: list[str] = []
        self.sliced: list[str] = []

    def entry(self, tensor: SafetensorsTensor) -> SafetensorsEntry | None:
        """The tensor as the smaller folder has it; None when its layer or its expert goes."""
        name = tensor.name
        if self.family.is_other_modality(name):
            if self.cut.hidden is not None:
                raise UnsupportedError(
                    f"The hidden channels cannot be cut: {name!r} feeds pictures or sound into them",
                    why="It would need channels that are gone.",
                    next="Cut something else: --layers N, or --width ffn=70%,heads=70%",
                )
            return self._whole(tensor, name)
        layer, new_name = self._renumbered(name)
        if new_name is None:
            return None
        cleaned = self.family.clean_hf_name(name)
        if self.cut.is_depth_only or cleaned is None:
            return self._whole(tensor, new_name)
        addresses = self.family.rows_by_hf_name(cleaned)
        if not addresses:
            raise UnsupportedError(
                f"Nobody knows how {name!r} is cut",
                why=f"It is no tensor of the {self.family.name} family.",
                next="Cut whole layers instead: --layers N or --keep 70%",
            )
        axes: dict[int, Indices] = {}
        for address in addresses:
            row = next(
                row for row in self.family.rows_with_role(address.row.role) if row.is_bias == address.row.is_bias
            )
            axes |= _hf_axes(row, kept_axes(row, layer, self.sizes, self.cut))
        if addresses[0].expert is not None:
            axes.pop(-3, None)
            expert = self._expert_place(layer, addresses[0].expert)
            if expert is None:
                return None
            new_name = _replaced(_EXPERT, new_name, expert)
        return self._cut(tensor, new_name, axes) if axes else self._whole(tensor, new_name)

    def _renumbered(self, name: str) -> tuple[int | None, str | None]:
        """(the source's layer, the new name); the name is None when the layer goes."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return None, name
        layer = int(match["number"])
        place = self._place.get(layer)
        return layer, None if place is None else _replaced(_LAYER, name, place)

    def _expert_place(self, layer: int | None, expert: int) -> int | None:
        if self.cut.experts is None or layer is None:
            return expert
        found = np.flatnonzero(self.cut.experts[layer] == expert)
        return int(found[0]) if found.size else None

    def _whole(self, tensor: SafetensorsTensor, new_name: str) -> SafetensorsEntry:
        self.untouched.append(new_name)
        return SafetensorsEntry(new_name, tensor.shape, tensor.dtype, lambda: self.source.iter_chunks(tensor.name))

    def _cut(self, tensor: SafetensorsTensor, new_name: str, axes: dict[int, Indices]) -> SafetensorsEntry:
        shape = list(tensor.shape)
        for axis, kept in axes.items():
            if -axis > len(shape) or int(kept[-1]) >= shape[axis]:
                raise SafetensorsError(
                    f"{tensor.name!r} has the shape {tensor.shape}, which does not fit the sizes in config.json",
                    why=f"Index {int(kept[-1])} of axis {axis} should be kept.",
                )
            shape[axis] = len(kept)
        self.sliced.append(new_name)

        def chunks() -> Iterator[Any]:
            rows = row_numbers(tensor.shape, axes)
            cell_bytes = DTYPE_BITS[tensor.dtype] // 8
            yield from gather(self.source.read(tensor.name), cell_bytes, tensor.shape[-1], rows, axes.get(-1))
            self.source.release(tensor.name)

        return SafetensorsEntry(new_name, tuple(shape), tensor.dtype, chunks)


def _hf_axes(row: TensorRow, axes: Mapping[int, Indices]) -> dict[int, Indices]:
    """Axes of the GGUF shape -> axes of the Hugging Face tensor."""
    if row.transform is Transform.TRANSPOSE and not row.is_bias:
        return {{-1: -2, -2: -1}.get(axis, axis): kept for axis, kept in axes.items()}
    return dict(axes)


def _replaced(pattern: re.Pattern[str], name: str, number: int) -> str:
    match = pattern.fullmatch(name)
    assert match is not None
    return f"{match['before']}{number}{match['after']}"


def cut_config(raw: Mapping[str, Any], sizes: ModelSizes, cut: Cut) -> dict[str, Any]:
    """config.json with the sizes of the smaller model; every spelling that is there is changed."""
    config: dict[str, Any] = copy.deepcopy(dict(raw))
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    after = sizes_after(sizes, cut)
    layers = list(range(sizes.n_layers)) if cut.layers is None else cut.layers.tolist()
    if after.n_layers != sizes.n_layers:
        _set(text, after.n_layers, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
        _cut_layer_lists(text, sizes.n_layers, layers)
    if after.hidden != sizes.hidden:
        _set(text, after.hidden, "hidden_size", "n_embd", "dim")
    if after.ffn != sizes.ffn:
        keys = ("moe_intermediate_size",) if sizes.n_experts else ("intermediate_size", "n_inner", "hidden_dim")
        _set(text, after.ffn, *keys)
    if after.n_heads != sizes.n_heads:
        _set(text, after.n_heads, "num_attention_heads", "n_head", "n_heads")
        if "n_head" not in text:
            _set(text, after.n_kv_heads, "num_key_value_heads", "n_kv_heads")
    if (after.n_heads, after.hidden) != (sizes.n_heads, sizes.hidden) and not sizes.fills_stream:
        text["head_dim"] = sizes.head_dim
    if after.n_experts != sizes.n_experts:
        _set(text, after.n_experts, "num_experts", "num_local_experts", "n_routed_experts")
    return config


def _set(text: dict[str, Any], value: int, *keys: str) -> None:
    present = [key for key in keys if key in text]
    # GPT-2 says null where the inner size follows from the outer one
    for key in present or keys[:1]:
        text[key] = value


def _cut_layer_lists(text: dict[str, Any], n_layers: int, layers: Sequence[int]) -> None:
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == n_layers:
        text["layer_types"] = [kinds[layer] for layer in layers]
    windows = text.get("max_window_layers")
    if isinstance(windows, int):
        text["max_window_layers"] = sum(layer < windows for layer in layers)
    dense = text.get("mlp_only_layers")
    if isinstance(dense, list):
        text["mlp_only_layers"] = [place for place, layer in enumerate(layers) if layer in dense]
