"""How far a model moves when some of its tensors are stored in other types, measured without writing anything.

In: a packed model, a few windows of text, and types by tensor name. Out: the mean Kullback-Leibler divergence from the
model as it is. A tensor is quantized when its layer is reached and forgotten when the layer is done, so memory grows by
one tensor. Blocks before the first changed one are not run again: what they gave is kept from the first run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ollama_forge.dataset.windows import Window
from ollama_forge.errors import UsageError
from ollama_forge.gguf.imatrix import Imatrix
from ollama_forge.gguf.native import dequantize, quantize
from ollama_forge.gguf.quantize import find_importance
from ollama_forge.gguf.types import GGMLType, row_bytes
from ollama_forge.train.blocks import PackedMatrix
from ollama_forge.train.importance import expert_layers, layers_by_gguf_name
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedEmbedding, PackedLinear
from ollama_forge.train.scoring import BATCH_TOKENS, Reference, capture_reference, compare

PIECE_ELEMENTS = 1 << 20
KEPT_BYTES = 1 << 30
"""Of what the blocks gave in the first run; a model for which they are more is run from its start every time."""

_LAYER = "{layer}"


class Probe:
    """A model and some windows, ready to be asked what other types would do.

    Args:
        packed: the model; its layers are changed while `divergence` runs, and are as before afterwards.
        reference: the same file opened once more: its head stays as it is.
        windows: together at most `scoring.BATCH_TOKENS` tokens, so that every layer runs once.
        imatrix: what the quantizer may know.

    Raises:
        UsageError: the windows are too many.
        TrainingError: as `scoring.score`.
    """

    def __init__(
        self, packed: PackedModel, reference: PackedModel, windows: Sequence[Window], imatrix: Imatrix | None = None
    ) -> None:
        longest = max(len(window.input_ids) for window in windows)
        if longest * len(windows) > BATCH_TOKENS:
            raise UsageError(
                f"{len(windows)} windows of {longest} tokens are too many to measure with",
                why=f"All of them run at once, at most {BATCH_TOKENS:,} tokens.",
                next="Take fewer or shorter windows.",
            )
        self._windows = tuple(windows)
        self._places = _Places(packed, imatrix)
        self._packed = packed
        self._blocks = _Blocks(packed)
        with self._blocks.kept():
            hidden = capture_reference(packed, windows)
        self._reference = Reference(reference, hidden.hidden, hidden.windows)

    def divergence(self, types: Mapping[str, GGMLType]) -> float:
        """Mean KL(as it is || with these types) over the scored tokens, in nats. What keeps its type costs nothing.

        Raises:
            FormatError: the importance matrix belongs to another model.
            GGUFError: a weight that a type cannot hold.
        """
        changed = {name: type for name, type in types.items() if type != self._packed.file.tensors[name].type}
        if not changed:
            return 0.0
        first = min(self._blocks.number_of(name) for name in changed)
        with self._places.stored_as(changed), self._blocks.begun_at(first):
            return compare(self._packed, self._reference, self._windows, n_worst=0).kl.mean


def recode(matrix: PackedMatrix, type: GGMLType, importance: np.ndarray | None = None) -> PackedMatrix:
    """A matrix in another type, made of its present numbers as `quantize` would make it.

    Args:
        importance: float32 [columns], or None.
    """
    stride = row_bytes(type, matrix.columns)
    out = np.empty((matrix.rows, stride), np.uint8)
    step = max(1, PIECE_ELEMENTS // matrix.columns)
    n_threads = torch.get_num_threads()
    for start in range(0, matrix.rows, step):
        end = min(start + step, matrix.rows)
        blocks = matrix.blocks[start:end].contiguous().cpu().numpy()
        numbers = dequantize(blocks, matrix.type, (end - start, matrix.columns), n_threads=n_threads)
        out[start:end] = quantize(numbers, type, importance, n_threads=n_threads)
    cpu = replace(matrix, blocks=torch.from_numpy(out), type=type, device=torch.device("cpu"))
    return cpu.moved(lambda values: values.to(matrix.device))


class _Places:
    """Where each tensor of the file works, and how to make it work in another type for a while."""

    def __init__(self, packed: PackedModel, imatrix: Imatrix | None) -> None:
        self._packed = packed
        self._imatrix = imatrix
        self._linear: dict[str, list[nn.Module]] = {
            name: [layer] for name, layer in layers_by_gguf_name(packed).items()
        }
        self._linear.update(expert_layers(packed))
        embedding, head = packed.model.get_input_embeddings(), packed.model.get_output_embeddings()
        self._embedding = embedding if isinstance(embedding, PackedEmbedding) else None
        self._head = head
        if isinstance(head, PackedLinear) and self._embedding is not None and head not in _flat(self._linear):
            self._linear["token_embd.weight"] = [head]

    @contextlib.contextmanager
    def stored_as(self, types: Mapping[str, GGMLType]) -> Iterator[None]:
        """Inside the block these tensors are what they would be after having been stored in these types."""
        with contextlib.ExitStack() as stack:
            for name, type in types.items():
                importance = find_importance(self._imatrix, name, self._packed.file.tensors[name].shape)
                layers = self._linear.get(name, [])
                for number, layer in enumerate(layers):
                    assert isinstance(layer, PackedLinear)
                    part = None if importance is None else np.split(importance, len(layers))[number]
                    stack.enter_context(_linear_stored_as(layer, type, part, is_head=layer is self._head))
                if name == "token_embd.weight" and self._embedding is not None:
                    hook = self._embedding.register_forward_hook(_looked_up_as(type, importance))
                    stack.callback(hook.remove)
            yield


@contextlib.contextmanager
def _linear_stored_as(
    layer: PackedLinear, type: GGMLType, importance: np.ndarray | None, *, is_head: bool
) -> Iterator[None]:
    original = layer.matrix
    recoded: PackedMatrix | None = None

    def before(_module: nn.Module, _inputs: Any) -> None:
        nonlocal recoded
        made = recoded or recode(original, type, importance)
        # only the head is asked several times, once for each piece of the logits
        recoded = made if is_head else None
        layer.matrix = made

    def after(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        layer.matrix = original

    hooks = (layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        layer.matrix = original


def _looked_up_as(type: GGMLType, importance: np.ndarray | None) -> Callable[[nn.Module, Any, Any], torch.Tensor]:
    """A hook that gives the rows that were asked for as they would be in another type; only they are quantized."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, PackedEmbedding)
        wanted, places = torch.unique(inputs[0].reshape(-1), return_inverse=True)
        matrix = module.matrix
        looked_up = replace(matrix, blocks=matrix.blocks[wanted.to(matrix.blocks.device)])
        rows = recode(looked_up, type, importance).dequantized().to(output.device)
        scale = getattr(module, "embed_scale", None)
        if scale is not None:
            rows *= scale.to(rows.dtype)
        return rows[places].reshape(output.shape)

    return hook


class _Blocks:
    """The blocks of a model, and what each gave in the first run."""

    def __init__(self, packed: PackedModel) -> None:
        row = next(row for row in packed.family.tensors if row.is_per_layer and row.hf_name)
        path = row.hf_name.split(f".{_LAYER}.")[0]
        self._family = packed.family
        self._layers = list(packed.model.get_submodule(path).children())
        self._outputs: list[Any] = []

    def number_of(self, name: str) -> int:
        """The block that has a tensor; 0 for what comes before them, their number for what comes after."""
        address = self._family.address_by_gguf_name(name)
        if address is not None and address.layer is not None:
            return address.layer
        return len(self._layers) if name == "output.weight" else 0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside the block, what the blocks give is kept, as long as there is room for it."""
        size_bytes = 0

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal size_bytes
            tensors = output if isinstance(output, tuple) else (output,)
            size_bytes += sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))
            self._outputs.append(output)

        hooks = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if size_bytes > KEPT_BYTES or len(self._outputs) != len(self._layers):
                self._outputs = []

    @contextlib.contextmanager
    def begun_at(self, first: int) -> Iterator[None]:
        """Inside the block, the blocks before `first` give what they gave before."""
        skipped = list(zip(self._layers, self._outputs, strict=False))[:first]
        for layer, output in skipped:
            layer.forward = _giving(output)
        try:
            yield
        finally:
            for layer, _ in skipped:
                del layer.forward


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _flat(layers: Mapping[str, Sequence[nn.Module]]) -> list[nn.Module]:
    return [layer for group in layers.values() for layer in group]
