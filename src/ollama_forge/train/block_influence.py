"""What each part of a model does to a text: one pass over packed weights, without the head, in bounded memory.

In: a packed model and rows of tokens. Out: an `Importance`, by which `transform.ranking` chooses what stays. Layers:
the cosines between the residual stream before each layer and before every other; ShortGPT's block influence and
Gromov's angular distance come from this table. Channels and heads: mean squared activations times the squared weights
that read them; hidden channels too, each reading matrix counting alike. Experts: gate times size of the output (REAP).

The first token of a row is left out where there are others: its stream is many times longer than the rest and turns
little, whatever a layer does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ollama_forge.arch.rows import Role
from ollama_forge.errors import TrainingError
from ollama_forge.train.load import PackedModel
from ollama_forge.train.packed import PackedExpert, PackedExperts, PackedLinear
from ollama_forge.transform.ranking import Importance

STREAM_BYTES = 64 << 20
"""Of the residual streams that are kept while a row is read; of a longer row, evenly spaced positions are."""
PARTS = ("ffn", "kv_heads", "hidden", "experts")
# The cosine table of so many positions is made at once, and so many weights are squared while in the processor's cache.
_POSITIONS = 64
_SQUARED_ELEMENTS = 1 << 18


@torch.inference_mode()
def measure_importance(
    packed: PackedModel,
    rows: Iterable[Sequence[int]],
    parts: Iterable[str] = (),
    advance: Callable[[int], None] | None = None,
) -> Importance:
    """Read the rows once.

    Args:
        rows: token ids; each is read by itself.
        parts: what is measured beside the layers, of `PARTS`.
        advance: told of tokens that are done.

    Raises:
        TrainingError: no token to read, or numbers that are not finite.
    """
    wanted = set(parts)
    layers = _find_layers(packed)
    probes = [_Streams(layers)]
    extra: dict[str, Any] = {}
    for name, make in _PROBES.items():
        if name in wanted:
            extra[name] = make(packed, len(layers))
    every = [*probes, *extra.values()]
    n_tokens = 0
    packed.model.eval()
    try:
        for probe in every:
            probe.attach()
        for row in rows:
            ids = torch.tensor([list(row)], device=next(packed.model.parameters()).device)
            packed.model.base_model(input_ids=ids, use_cache=False)
            probes[0].fold()
            n_tokens += ids.shape[1]
            if advance:
                advance(ids.shape[1])
    finally:
        for probe in every:
            probe.detach()
    distance, influence = probes[0].result()
    return Importance(n_tokens, distance, influence, **{name: probe.result() for name, probe in extra.items()})


def _find_layers(packed: PackedModel) -> list[nn.Module]:
    """The blocks of the model, in order; their place is where the family's rows put the first norm of a layer."""
    row = packed.family.rows_with_role(Role.ATTENTION_NORM)[0]
    path = row.hf_name.partition(".{layer}.")[0]
    container = packed.model.get_submodule(path)
    return list(container.children())


@dataclass(eq=False)
class _Probe:
    """Hooks that are there while the rows are read."""

    _handles: list[Any] = field(default_factory=list, init=False)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(eq=False)
class _Streams(_Probe):
    """The residual stream before each layer and after the last one."""

    layers: list[nn.Module]
    n_positions: int = 0
    _kept: list[torch.Tensor] = field(default_factory=list)
    _cosines: torch.Tensor | None = None
    _angles: torch.Tensor | None = None

    def attach(self) -> None:
        for layer in self.layers:
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
        self._handles.append(self.layers[-1].register_forward_hook(self._after))

    def _before(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else kwargs["hidden_states"])

    def _after(self, _layer: nn.Module, _inputs: Any, output: Any) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, stream: torch.Tensor) -> None:
        """stream [1, length, width] -> some of its positions [positions, width], as directions."""
        length, width = stream.shape[1:]
        first = 1 if length > 1 else 0
        most = max(1, STREAM_BYTES // (4 * width * (len(self.layers) + 1)))
        count = min(length - first, most)
        places = torch.linspace(first, length - 1, count, device=stream.device).round().long()
        self._kept.append(nn.functional.normalize(stream[0, places].float(), dim=-1))

    def fold(self) -> None:
        """Take the row that was just read into account."""
        streams = torch.stack(self._kept, dim=1)  # [positions, layers + 1, width]
        self._kept.clear()
        for start in range(0, len(streams), _POSITIONS):
            part = streams[start : start + _POSITIONS]
            cosines = (part @ part.transpose(1, 2)).double().clamp(-1, 1)
            total, angles = cosines.sum(0), cosines.acos().div(torch.pi).sum(0)
            self._cosines = total if self._cosines is None else self._cosines + total
            self._angles = angles if self._angles is None else self._angles + angles
        self.n_positions += len(streams)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(angular distances, block influences)."""
        if self._cosines is None or self._angles is None:
            raise TrainingError(
                "There is no token to measure with",
                why="Importance is what happens to a text on its way through the model.",
                next="Give a text of a few hundred words: --text FILE",
            )
        cosines = (self._cosines / self.n_positions).cpu().numpy()
        distance = (self._angles / self.n_positions).cpu().numpy()
        if not np.isfinite(cosines).all():
            raise TrainingError(
                "The model's residual stream holds numbers that are not finite", why="Its weights are damaged."
            )
        np.fill_diagonal(distance, 0.0)
        influence = 1.0 - np.diagonal(cosines, offset=1)
        return distance, influence.copy()


class _ColumnSquares:
    """The sum of the squares of each column of each matrix, taken while its numbers are at hand: after first use."""

    def __init__(self) -> None:
        self._found: dict[PackedLinear, torch.Tensor] = {}

    def of(self, layer: PackedLinear) -> torch.Tensor:
        """float32 [columns]."""
        if layer not in self._found:
            self._found[layer] = _column_squares(layer)
        return self._found[layer]

    def watch(self, layer: PackedLinear) -> Any:
        """A hook that takes them; gives its handle."""
        return layer.register_forward_hook(self._note)

    def _note(self, layer: PackedLinear, _inputs: Any, _output: Any) -> None:
        self.of(layer)


@dataclass(eq=False)
class _Inputs(_Probe):
    """Mean squared inputs of one matrix in each layer, weighted by what the matrix makes of them."""

    packed: PackedModel
    n_layers: int
    role: Role
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)
    _squares: _ColumnSquares = field(default_factory=_ColumnSquares)

    def attach(self) -> None:
        for number, layer in enumerate(self._matrices()):
            self._handles += [layer.register_forward_pre_hook(self._adding(number)), self._squares.watch(layer)]

    def _matrices(self) -> list[PackedLinear]:
        return [_modules(self.packed, self.role, layer)[0] for layer in range(self.n_layers)]

    def _adding(self, number: int) -> Callable[[nn.Module, Any], None]:
        def add(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].float().reshape(-1, inputs[0].shape[-1])
            total = flat.square().sum(0).double()
            self._sums[number] = self._sums[number] + total if number in self._sums else total
            self._counts[number] = self._counts.get(number, 0) + len(flat)

        return add

    def shares(self) -> np.ndarray:
        """[layers, columns]: mean square of what each column of the matrix adds to the residual stream."""
        found = []
        for number, layer in enumerate(self._matrices()):
            mean = self._sums[number] / self._counts[number]
            found.append((mean * self._squares.of(layer).double()).cpu().numpy())
        return np.stack(found)


class _Channels(_Inputs):
    """Feed-forward channels."""

    def result(self) -> np.ndarray:
        return np.sqrt(self.shares())


class _Heads(_Inputs):
    """Key-value heads, each with the query heads that share it."""

    def result(self) -> np.ndarray:
        config = self.packed.model.config
        n_kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shares = self.shares()
        return np.sqrt(shares.reshape(len(shares), n_kv_heads, -1).sum(-1))


@dataclass(eq=False)
class _Hidden(_Probe):
    """What the matrices that read the residual stream make of each of its channels, every matrix counting alike."""

    packed: PackedModel
    n_layers: int
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _squares: _ColumnSquares = field(default_factory=_ColumnSquares)

    def attach(self) -> None:
        for path, groups in self._readers().items():
            norm = self.packed.model.get_submodule(path)
            self._handles.append(norm.register_forward_hook(self._adding(path)))
            self._handles += [self._squares.watch(layer) for group in groups for layer in group]

    def _readers(self) -> dict[str, list[list[PackedLinear]]]:
        """Path of a norm -> the matrices that read what it gives; the experts of a layer are one matrix."""
        found: dict[str, list[list[PackedLinear]]] = {}
        for norm_role, roles in _READERS.items():
            row = next(row for row in self.packed.family.rows_with_role(norm_role) if not row.is_bias)
            for layer in range(self.n_layers) if row.is_per_layer else (0,):
                path = row.hf_name.format(layer=layer).rpartition(".")[0]
                matrices = [_modules(self.packed, role, layer) for role in roles]
                found[path] = [group for group in matrices if group]
        return found

    def _adding(self, path: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def add(_norm: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            flat = output.float().reshape(-1, output.shape[-1])
            total = flat.square().sum(0).double()
            self._sums[path] = self._sums[path] + total if path in self._sums else total
            self._counts[path] = self._counts.get(path, 0) + len(flat)

        return add

    def result(self) -> np.ndarray:
        total = torch.zeros(0)
        for path, groups in self._readers().items():
            mean = self._sums[path] / self._counts[path]
            for group in groups:
                shares = mean * torch.stack([self._squares.of(layer) for layer in group]).sum(0).double()
                shares = shares / shares.sum().clamp(min=1e-300)
                total = total + shares if total.numel() else shares
        return total.cpu().numpy()


@dataclass(eq=False)
class _Experts(_Probe):
    """Gate times length of the output, for each expert, over the tokens it gets."""

    packed: PackedModel
    n_layers: int
    _weights: dict[int, torch.Tensor] = field(default_factory=dict)
    _sums: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    _counts: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def attach(self) -> None:
        stacks = [module for module in self.packed.model.modules() if isinstance(module, PackedExperts)]
        if len(stacks) != self.n_layers:
            raise TrainingError(f"{len(stacks)} of {self.n_layers} layers have experts", why="Each should.")
        self._sums = np.zeros((self.n_layers, len(stacks[0])))
        self._counts = np.zeros_like(self._sums)
        for layer, stack in enumerate(stacks):
            self._handles.append(stack.register_forward_pre_hook(self._routing(layer)))
            for number, expert in enumerate(stack):
                assert isinstance(expert, PackedExpert)
                self._handles.append(expert.register_forward_hook(self._adding(layer, number)))

    def _routing(self, layer: int) -> Callable[[nn.Module, Any], None]:
        def note(_stack: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            _, chosen, weights = inputs
            order = torch.argsort(chosen.reshape(-1), stable=True)
            counts = torch.bincount(chosen.reshape(-1), minlength=self._sums.shape[1]).tolist()
            sorted_weights = weights.reshape(-1)[order].float()
            self._weights = dict(enumerate(torch.split(sorted_weights, counts)))

        return note

    def _adding(self, layer: int, number: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def add(_expert: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            lengths = output.float().norm(dim=-1)
            self._sums[layer, number] += float((lengths * self._weights[number]).sum())
            self._counts[layer, number] += len(lengths)

        return add

    def result(self) -> np.ndarray:
        return self._sums / np.maximum(self._counts, 1)


_PROBES: dict[str, Callable[[PackedModel, int], Any]] = {
    "ffn": lambda packed, n_layers: _Channels(packed, n_layers, Role.FFN_DOWN),
    "kv_heads": lambda packed, n_layers: _Heads(packed, n_layers, Role.ATTENTION_OUTPUT),
    "hidden": _Hidden,
    "experts": _Experts,
}


_READERS: dict[Role, tuple[Role, ...]] = {
    Role.ATTENTION_NORM: (Role.ATTENTION_QUERY, Role.ATTENTION_KEY, Role.ATTENTION_VALUE, Role.ATTENTION_QKV),
    Role.FFN_NORM: (Role.FFN_GATE, Role.FFN_UP, Role.FFN_GATE_UP, Role.EXPERT_GATE, Role.EXPERT_UP),
    Role.OUTPUT_NORM: (Role.OUTPUT,),
}
"""Norm -> the matrices that read the residual stream through it."""


def _modules(packed: PackedModel, role: Role, layer: int) -> list[PackedLinear]:
    """The matrices of a role in a layer: none, one, or one for each expert; the tied head is the embedding's."""
    if role is Role.OUTPUT:
        head = packed.model.get_output_embeddings()
        return [head] if isinstance(head, PackedLinear) else []
    row = next((row for row in packed.family.rows_with_role(role) if not row.is_bias), None)
    if row is None:
        return []
    path = row.hf_name.rpartition(".")[0]
    n_experts = int(packed.model.config.num_experts) if row.is_per_expert else 1
    found = [packed.model.get_submodule(path.format(layer=layer, expert=expert)) for expert in range(n_experts)]
    return [module for module in found if isinstance(module, PackedLinear)]


def _column_squares(layer: PackedLinear) -> torch.Tensor:
    """Sum of the squares of each column of a matrix, float32 [columns]."""
    like = torch.empty(0, device=layer.matrix.device)
    total = torch.zeros(layer.in_features, device=layer.matrix.device)
    with layer.workspace.pieces(layer.matrix, like) as pieces:
        for _, _, values in pieces:
            step = max(1, _SQUARED_ELEMENTS // values.shape[1])
            for part in values.split(step):
                total += (part * part).sum(0)
    return total
