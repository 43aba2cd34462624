"""From a GGUF file to a transformers model that can be trained with peft, without dequantizing it.

In: an open GGUF file. Out: the family's own model class, built without memory for its weights, its linear and embedding
layers replaced by those of `train.packed` over the mapped file, its small tensors (norms, biases, routers) as float32.
Names and hyper-parameters come from the rows in `arch`; the adapter and the training loop are peft's and TRL's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ollama_forge.arch.config import config_from_gguf
from ollama_forge.arch.families import find_family_by_gguf
from ollama_forge.arch.rows import Family, Role, TensorAddress, TensorRow, Transform
from ollama_forge.errors import GGUFError, UnsupportedError
from ollama_forge.gguf.native import dequantize
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.train.blocks import WORKSPACE_BYTES, PackedMatrix, Workspace
from ollama_forge.train.loss import install_chunked_loss
from ollama_forge.train.packed import PackedEmbedding, PackedExpert, PackedExperts, PackedLinear

_OTHER_MODALITIES = ("v.", "a.", "mm.")  # pictures and sound in the files that Ollama itself converts
_EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


@dataclass(frozen=True, eq=False)
class PackedModel:
    """A model over GGUF blocks.

    Attributes:
        model: the transformers model; no parameter asks for a gradient. Its loss is computed in chunks.
        family: its rows.
        file: stays open as long as the model is used.
        workspace: where layers are dequantized, a piece at a time.
        skipped: GGUF tensors that the text model does not use (pictures, sound).
    """

    model: PreTrainedModel
    family: Family
    file: GGUFFile
    workspace: Workspace
    skipped: tuple[str, ...]


def load_packed(source: Path | GGUFFile, *, workspace_bytes: int = WORKSPACE_BYTES) -> PackedModel:
    """Open a GGUF file for training.

    Args:
        source: the file, its first shard, or an open file; the result keeps it open.
        workspace_bytes: room for dequantized pieces. More of it saves dequantizing a layer twice in a training step.

    Raises:
        UnsupportedError: no family of ours.
        GGUFError: tensors are missing, left over, or do not fit the configuration.
    """
    file = source if isinstance(source, GGUFFile) else open_gguf(source)
    family = find_family_by_gguf(file.architecture)
    model = _empty_model(family, file)
    filler = _Filler(model, family, file, Workspace(workspace_bytes))
    skipped = filler.fill()
    _set_frequencies(model, file)
    model.requires_grad_(False).eval()
    install_chunked_loss(model)
    return PackedModel(model, family, file, filler.workspace, skipped)


def read_config(family: Family, file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face configuration of a GGUF file.

    The divisors of Llama 3's frequencies are not among it: `load_packed` takes them from the file as they are.
    """
    factors = {name: _numbers(file, name).tolist() for name in file.tensors if name.startswith("rope_factors_")}
    result = config_from_gguf(family, file.metadata, tensor_names=tuple(file.tensors), rope_factors=factors)
    embedding = file.find_tensor("token_embd.weight")
    return {**result, "vocab_size": embedding.shape[0]}


def _empty_model(family: Family, file: GGUFFile) -> PreTrainedModel:
    values = read_config(family, file)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    # buffers (rotary frequencies, embedding scales) are computed for real, parameters take no memory
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def _set_frequencies(model: PreTrainedModel, file: GGUFFile) -> None:
    """Llama 3 divides each rotary frequency by a factor of its own, which the file holds."""
    if "rope_freqs.weight" not in file.tensors:
        return
    factors = _numbers(file, "rope_freqs.weight")
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor):
                if frequencies.shape != factors.shape:
                    raise GGUFError(
                        f"'rope_freqs.weight' has {factors.numel()} factors for {frequencies.numel()} frequencies",
                        why="Each pair of a head's dimensions needs one.",
                    )
                frequencies.div_(factors)


def _numbers(file: GGUFFile, name: str) -> torch.Tensor:
    """A small tensor as float32, in its own memory."""
    tensor = file.find_tensor(name)
    return torch.from_numpy(dequantize(file.read(name), tensor.type, tensor.shape))


def _blocks(file: GGUFFile, name: str) -> torch.Tensor:
    """The packed rows of a tensor [..., rows, columns] as uint8 [..., rows, row_bytes], a view of the mapped file."""
    tensor = file.find_tensor(name)
    with warnings.catch_warnings():
        # the mapping is read-only on purpose, and nothing writes through this view
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(file.read(name), dtype=torch.uint8)
    return flat.view(*tensor.shape[:-1], -1)


class _Filler:
    """Walks over the tensors of a file and puts each where the family's rows say."""

    def __init__(self, model: PreTrainedModel, family: Family, file: GGUFFile, workspace: Workspace) -> None:
        self.model = model
        self.family = family
        self.file = file
        self.workspace = workspace
        self._experts: dict[int, dict[Role, str]] = {}
        self._heads = self._head_counts()

    def fill(self) -> tuple[str, ...]:
        """Place every tensor; gives the names of those that belong to other modalities."""
        skipped, homeless = [], []
        for name in self.file.tensors:
            address = self.family.address_by_gguf_name(name)
            if name.startswith(_OTHER_MODALITIES):
                skipped.append(name)
            elif address is None:
                homeless.append(name)
            elif address.row.hf_name:
                self._place(name, address)
        if homeless:
            raise GGUFError(
                f"{len(homeless)} tensors of {str(self.file.path)!r} have no place in a {self.family.name} model, "
                f"among them {homeless[0]!r}",
                why="Training without them would train another model.",
            )
        for layer, names in self._experts.items():
            self._place_experts(layer, names)
        self._tie_head()
        self._require_whole()
        return tuple(skipped)

    def _head_counts(self) -> Mapping[Transform, int]:
        heads = self.file.arch_value("attention.head_count", 0)
        key_heads = self.file.arch_value("attention.head_count_kv", heads)
        counts = {Transform.PERMUTE_QUERY: heads, Transform.PERMUTE_KEY: key_heads}
        if any(row.transform in counts for row in self.family.tensors) and not all(
            isinstance(count, int) and count > 0 for count in counts.values()
        ):
            raise UnsupportedError(
                f"{str(self.file.path)!r} gives head counts {heads!r} and {key_heads!r}",
                why="Packed training needs one number of heads for all layers.",
            )
        return counts

    def _matrix(self, name: str, row: TensorRow, blocks: torch.Tensor | None = None) -> PackedMatrix:
        tensor = self.file.find_tensor(name)
        blocks = _blocks(self.file, name) if blocks is None else blocks
        return PackedMatrix(blocks, tensor.type, tensor.shape[-1], self._heads.get(row.transform, 0))

    def _place(self, name: str, address: TensorAddress) -> None:
        row = address.row
        if row.role in _EXPERTS:
            self._experts.setdefault(address.layer or 0, {})[row.role] = name
            return
        path, _, leaf = address.hf_name.rpartition(".")
        module = self._submodule(name, path)
        if leaf == "weight" and isinstance(module, (nn.Linear, Conv1D)):
            self._place_linear(name, row, path, module)
        elif leaf == "weight" and isinstance(module, nn.Embedding):
            self._require_shape(name, (module.num_embeddings, module.embedding_dim))
            scale = getattr(module, "embed_scale", None)
            table = PackedEmbedding(self._matrix(name, row), module.padding_idx, scale)
            self.model.set_submodule(path, table)
        elif not isinstance(module, PackedLinear):
            self._place_small(name, row, module, leaf)

    def _submodule(self, name: str, path: str) -> nn.Module:
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise GGUFError(
                f"{name!r} belongs to {path!r}, which this model does not have",
                why=f"Its metadata describe {self.model.config.num_hidden_layers} layers.",
            ) from error

    def _place_linear(self, name: str, row: TensorRow, path: str, module: nn.Linear | Conv1D) -> None:
        shape: tuple[int, ...] = tuple(module.weight.shape)
        self._require_shape(name, shape[::-1] if isinstance(module, Conv1D) else shape)
        matrix = self._matrix(name, row)
        bias_name = name.removesuffix("weight") + "bias"
        bias = None
        if bias_name in self.file.tensors:
            self._require_shape(bias_name, (matrix.rows,), name=name)
            bias = matrix.from_rope_order(_numbers(self.file, bias_name), 0)
        elif getattr(module, "bias", None) is not None:
            raise GGUFError(f"{bias_name!r} is missing in {str(self.file.path)!r}", why=f"{path!r} adds a bias.")
        self.model.set_submodule(path, PackedLinear(matrix, bias, self.workspace))

    def _place_small(self, name: str, row: TensorRow, module: nn.Module, leaf: str) -> None:
        parameter = getattr(module, leaf, None)
        if not isinstance(parameter, nn.Parameter):
            if isinstance(module, (nn.Linear, Conv1D)) and row.is_bias:
                return  # comes with its matrix
            raise GGUFError(f"{name!r} has no place in {type(module).__name__!r}", why=f"It has no {leaf!r}.")
        self._require_shape(name, tuple(parameter.shape))
        numbers = _numbers(self.file, name)
        if row.transform is Transform.ADD_ONE:
            numbers -= 1
        setattr(module, leaf, nn.Parameter(numbers, requires_grad=False))

    def _require_shape(self, gguf_name: str, wanted: tuple[int, ...], name: str | None = None) -> None:
        shape = self.file.find_tensor(gguf_name).shape
        if shape != wanted:
            raise GGUFError(
                f"{gguf_name!r} has shape {shape!r}",
                why=f"{'Beside ' + repr(name) if name else 'By the metadata'} it should be {wanted!r}.",
            )

    def _place_experts(self, layer: int, names: Mapping[Role, str]) -> None:
        rows = {row.role: row for row in self.family.tensors if row.role in _EXPERTS}
        path = rows[Role.EXPERT_UP].hf_name.format(layer=layer, expert=0).rpartition(".0.")[0]
        activation: Any = self._submodule(names[Role.EXPERT_UP], path).act_fn
        stacks = {}
        for role, row in rows.items():
            if role not in names:
                raise GGUFError(f"{row.gguf_name.format(layer=layer)!r} is missing in {str(self.file.path)!r}")
            stacks[role] = _blocks(self.file, names[role])
        width, inner = self.model.config.hidden_size, self.model.config.moe_intermediate_size
        n_experts = self.model.config.num_experts
        for role, shape in zip(_EXPERTS, ((inner, width), (inner, width), (width, inner)), strict=True):
            self._require_shape(names[role], (n_experts, *shape))
        experts = []
        for number in range(n_experts):
            gate, up, down = (
                PackedLinear(self._matrix(names[role], rows[role], stacks[role][number]), None, self.workspace)
                for role in _EXPERTS
            )
            experts.append(PackedExpert(gate, up, down, activation))
        self.model.set_submodule(path, PackedExperts(experts))
        # peft redirects the targets of known mixtures to transformers' stacked parameters, which are not there
        setattr(self.model.config, "model_type", f"{self.family.name}_packed")  # noqa: B010 - a class attribute

    def _tie_head(self) -> None:
        """Without a head of its own the model reads the embedding's rows as its head."""
        head = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        if isinstance(head, PackedLinear) or not isinstance(embedding, PackedEmbedding):
            return
        self.model.set_output_embeddings(PackedLinear(embedding.matrix, None, self.workspace))

    def _require_whole(self) -> None:
        missing = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        if missing:
            raise GGUFError(
                f"{str(self.file.path)!r} lacks {len(missing)} tensors, among them {missing[0]!r}",
                why=f"A {self.family.name} model of this configuration needs them.",
                next=f"Look at what is there: ollama-forge show {self.file.path}",
            )
