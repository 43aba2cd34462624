"""Directional ablation: everything that writes the residual stream is made unable to write along some directions.

In: an open checkpoint (GGUF or folder), `Directions` and `AblationOptions`. Out: an `Ablation`: what happens to each
tensor, found by role from the family's rows, and the edits that do it. W' = W - strength * B^T (B W), with B an
orthonormal basis of the directions, [k, hidden] (Arditi et al. 2024, https://arxiv.org/abs/2406.11717, section 4.1:
embeddings, attention outputs, MLP outputs and their biases, in every layer). Only headers and norms are read here.

Where a norm follows the matrix (Gemma's post-norms), the stream gets w * y / rms(y) of its output y. What d sees of it
is (w * d) . y / rms(y), so the basis there spans w * d, scaled to length one: then nothing along d is left in the
stream, whatever the root mean square. An embedding that is the output head too (tied) is edited all the same, as the
paper's own code does; its logits change with it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ollama_forge.arch.rows import Residual, Role, TensorRow, Transform
from ollama_forge.errors import FormatError, UnsupportedError, UsageError
from ollama_forge.transform.ablation_edits import plan_edits
from ollama_forge.transform.directions import Directions, Floats, orthonormal, read_directions, write_directions
from ollama_forge.transform.edits import OutputEdit, TensorEdit
from ollama_forge.transform.projection import Part, Projection
from ollama_forge.weights.checkpoint import Checkpoint, Layout, StoredTensor, TensorKey

__all__ = [
    "Ablation",
    "AblationOptions",
    "Directions",
    "Part",
    "Projection",
    "kernel_at",
    "plan_ablation",
    "plan_projections",
    "read_directions",
    "write_directions",
]

KERNELS = ("constant", "linear_peak", "gaussian")

_PARTS = {
    Role.TOKEN_EMBEDDING: Part.EMBEDDING,
    Role.POSITION_EMBEDDING: Part.EMBEDDING,
    Role.ATTENTION_OUTPUT: Part.ATTENTION,
    Role.FFN_DOWN: Part.MLP,
    Role.EXPERT_DOWN: Part.MLP,
}
_NORM_AFTER = {Part.ATTENTION: Role.ATTENTION_POST_NORM, Part.MLP: Role.FFN_POST_NORM}
_OTHER_MODALITIES = ("v.", "a.", "mm.")


@dataclass(frozen=True)
class AblationOptions:
    """How strongly, where, and along which of the directions.

    Attributes:
        strength: 1 takes the directions out, 0 leaves them, 2 turns them round.
        attention_strength, mlp_strength: of these parts; None: as `strength`.
        layer: whose direction is used everywhere (3.25 lies between 3 and 4); None: the best layer's.
        per_layer: each layer its own; None: as the file of the directions says.
        n_directions: only the first so many; None: all.
        direction_index: only this one of them.
        kernel: how the strength runs over the layers: `constant`; `linear_peak`, 1 at the centre and 0 at the distance
            `kernel_width`; `gaussian`, with that standard deviation. Centre and width are shares of the depth.
        skip_begin, skip_end: so many layers at each end stay as they are; with `skip_begin` the embedding does, too.
        norm_preserving: the rows of each matrix keep their norm.
        projected: the directions without what lies along the mean state on harmless prompts.
        embedding: edit the embeddings, too.
    """

    strength: float = 1.0
    attention_strength: float | None = None
    mlp_strength: float | None = None
    layer: float | None = None
    per_layer: bool | None = None
    n_directions: int | None = None
    direction_index: int | None = None
    kernel: str = "constant"
    kernel_center: float = 0.5
    kernel_width: float = 0.4
    skip_begin: int = 0
    skip_end: int = 0
    norm_preserving: bool = False
    projected: bool = False
    embedding: bool = True

    def validate(self) -> None:
        """Refuse what means nothing.

        Raises:
            UsageError: with the option.
        """
        strengths = (self.strength, self.attention_strength, self.mlp_strength)
        numbers = (*strengths, self.layer, self.kernel_center, self.kernel_width)
        if not all(math.isfinite(value) for value in numbers if value is not None):
            raise UsageError(
                "Strengths, layer and kernel must be finite numbers", next="Strength 1 takes the direction out."
            )
        if self.kernel not in KERNELS:
            raise UsageError(
                f"There is no kernel {self.kernel!r}",
                why=f"Known: {', '.join(KERNELS)}.",
                next="Example: --strength-kernel gaussian",
            )
        if self.kernel != "constant" and not self.kernel_width > 0:
            raise UsageError(
                f"The kernel's width is {self.kernel_width:g}",
                why="It is a share of the depth, more than 0.",
                next="Example: --kernel-width-frac 0.4",
            )
        if self.skip_begin < 0 or self.skip_end < 0:
            raise UsageError("A number of layers to skip cannot be negative", next="Give 0 or more.")
        if self.layer is not None and self.per_layer:
            raise UsageError(
                f"Layer {self.layer:g} for all layers, and each layer its own direction, do not go together",
                next="Give one of them.",
            )


@dataclass(frozen=True, eq=False)
class Ablation:
    """An ablation that is decided.

    Attributes:
        projections: what happens to each tensor that writes the residual stream.
        edits: the same for `apply.plan_gguf_edit` or `folder.write_edited_folder`.
        counts: how many matrices and vectors of each role are edited.
        notes: what a person should know of it.
    """

    projections: tuple[Projection, ...]
    edits: tuple[TensorEdit | OutputEdit, ...] = field(repr=False)
    counts: Mapping[str, int]
    notes: tuple[str, ...] = ()


def plan_ablation(checkpoint: Checkpoint, directions: Directions, options: AblationOptions) -> Ablation:
    """Decide what happens to every tensor. `checkpoint` stays open until the edits are written.

    Raises:
        UsageError: options that mean nothing, that do not go with the directions, or that edit nothing; directions of
            another model.
        UnsupportedError: the file holds tensors that the family's rows do not know, or an encoding that is not edited.
        FormatError: a tensor that should write the residual stream is missing, or has another shape.
    """
    projections = plan_projections(checkpoint, directions, options)
    counts = Counter(_role_name(item.tensor.row) for item in projections)
    return Ablation(
        tuple(projections),
        tuple(plan_edits(checkpoint, projections, norm_preserving=options.norm_preserving)),
        dict(counts),
        tuple(_notes(checkpoint, options, projections)),
    )


def plan_projections(
    checkpoint: Checkpoint, directions: Directions, options: AblationOptions
) -> tuple[Projection, ...]:
    """What `plan_ablation` decides, without the edits: for those who project what modules give instead of weights.

    Raises:
        As `plan_ablation`.
    """
    options.validate()
    n_layers = checkpoint.config.n_layers
    _require_same_model(checkpoint, directions)
    _require_known(checkpoint)
    bases = _Bases(checkpoint, directions, options)
    projections = []
    for tensor in _writers(checkpoint):
        part = _PARTS[tensor.row.role]
        strength = _strength(part, tensor.key.layer, n_layers, options)
        if strength:
            projections.append(Projection(tensor, part, bases.find(part, tensor.key.layer), strength))
    if not projections:
        raise UsageError(
            "Nothing would be edited: every strength is 0",
            why=f"The model has {n_layers} layers; {options.skip_begin} at the beginning and {options.skip_end} at the "
            f"end are skipped, and the kernel is {options.kernel}.",
            next="Skip fewer layers, or use a larger strength.",
        )
    return tuple(projections)


def kernel_at(layer: int, n_layers: int, options: AblationOptions) -> float:
    """The factor of a layer's strength, from the kernel alone."""
    if options.kernel == "constant":
        return 1.0
    place = layer / (n_layers - 1) if n_layers > 1 else 0.5
    distance = abs(place - options.kernel_center) / options.kernel_width
    return max(0.0, 1 - distance) if options.kernel == "linear_peak" else math.exp(-0.5 * distance * distance)


def _strength(part: Part, layer: int | None, n_layers: int, options: AblationOptions) -> float:
    if part is Part.EMBEDDING:
        if not options.embedding or options.skip_begin:
            return 0.0
        return options.strength * kernel_at(0, n_layers, options)
    number = layer or 0
    if number < options.skip_begin or number >= n_layers - options.skip_end:
        return 0.0
    own = options.attention_strength if part is Part.ATTENTION else options.mlp_strength
    return (options.strength if own is None else own) * kernel_at(number, n_layers, options)


class _Bases:
    """The basis of each layer and part, computed once."""

    def __init__(self, checkpoint: Checkpoint, directions: Directions, options: AblationOptions) -> None:
        self._checkpoint = checkpoint
        self._directions = directions
        self._options = options
        self._found: dict[tuple[Part, int | None], Floats] = {}

    def find(self, part: Part, layer: int | None) -> Floats:
        """Orthonormal [k, hidden] in the coordinates of what the part's matrix gives."""
        key = (part, layer)
        if key not in self._found:
            basis = self._stream_basis(layer)
            norm = self._norm_after(part, layer)
            self._found[key] = basis if norm is None else orthonormal(norm.astype(np.float64) * basis)
        return self._found[key]

    def _stream_basis(self, layer: int | None) -> Floats:
        options, directions = self._options, self._directions
        per_layer = directions.per_layer if options.per_layer is None else options.per_layer
        if options.layer is not None:
            source = options.layer
        else:
            source = float((layer or 0) if per_layer else directions.best_layer)
        if options.direction_index is not None:
            if not 0 <= options.direction_index < directions.n_directions:
                raise UsageError(
                    f"There is no direction {options.direction_index}",
                    why=f"The file holds {directions.n_directions} for each layer, counted from 0.",
                    next="Choose another --direction-index, or compute more: compute-dir --num-directions N",
                )
            vectors = directions.vectors[:, options.direction_index : options.direction_index + 1]
            directions = Directions(vectors, directions.best_layer, harmless_means=directions.harmless_means)
        return directions.at(source, projected=options.projected, first=options.n_directions)

    def _norm_after(self, part: Part, layer: int | None) -> Floats | None:
        role = _NORM_AFTER.get(part)
        found = self._checkpoint.tensors.get(TensorKey(role, layer)) if role is not None else None
        return None if found is None else self._checkpoint.read_float32(found, Layout.GGUF).reshape(-1)


def _writers(checkpoint: Checkpoint) -> Iterator[StoredTensor]:
    """Every tensor that writes the residual stream, with all that are expected there.

    Raises:
        FormatError: one is missing, or has another shape.
        UnsupportedError: one is FP8 with scales.
    """
    config = checkpoint.config
    rows = [row for row in checkpoint.family.tensors if row.residual is Residual.WRITES]
    for row in rows:
        layers: Sequence[int | None] = range(config.n_layers) if row.is_per_layer else (None,)
        for layer in layers:
            experts: Sequence[int | None] = range(config.n_experts or 1) if row.is_per_expert else (None,)
            for expert in experts:
                found = checkpoint.tensors.get(TensorKey(row.role, layer, expert, row.is_bias))
                if found is not None:
                    yield _checked(found, config.hidden_size)
                elif not row.is_optional:
                    raise FormatError(
                        f"{str(checkpoint.path)!r} has no {_role_name(row)}"
                        + ("" if layer is None else f" in layer {layer}")
                        + ("" if expert is None else f", expert {expert}"),
                        why="It writes the residual stream; left as it is, it would go on writing the direction.",
                        next=f"List the tensors: ollama-forge show {checkpoint.path} --json",
                    )


def _checked(tensor: StoredTensor, hidden_size: int) -> StoredTensor:
    projection = Projection(tensor, _PARTS[tensor.row.role], np.zeros((0, hidden_size), np.float32), 0.0)
    if tensor.scale is not None:
        raise UnsupportedError(
            f"{tensor.spec.name!r} is stored as FP8 with scales, which cannot be edited",
            why="The scales would have to be computed anew.",
            next="Convert the folder to GGUF first: ollama-forge convert FOLDER -o model.gguf",
        )
    shape = tensor.spec.shape
    if not shape or shape[projection.axis] != hidden_size:
        raise FormatError(
            f"{tensor.spec.name!r} has the shape {shape}",
            why=f"Along the residual stream it should have {hidden_size} numbers.",
            next="Get the model again from where it came from.",
        )
    return tensor


def _require_same_model(checkpoint: Checkpoint, directions: Directions) -> None:
    config = checkpoint.config
    if (directions.n_layers, directions.hidden_size) != (config.n_layers, config.hidden_size):
        raise UsageError(
            f"The directions are those of a model of {directions.n_layers} layers and width {directions.hidden_size}; "
            f"{str(checkpoint.path)!r} has {config.n_layers} and {config.hidden_size}",
            why="Directions are found in one model and mean nothing in another.",
            next="Compute them for this one: ollama-forge abliterate compute-dir --model REF ...",
        )


def _require_known(checkpoint: Checkpoint) -> None:
    """A tensor that the rows do not know might write the residual stream, too.

    Raises:
        UnsupportedError: with its name.
    """
    family = checkpoint.family
    known = {tensor.spec.name for tensor in checkpoint.tensors.values()}
    if checkpoint.gguf is not None:
        unknown = [
            name
            for name in checkpoint.gguf.tensors
            if not name.startswith(_OTHER_MODALITIES) and family.address_by_gguf_name(name) is None
        ]
    else:
        assert checkpoint.folder is not None
        unknown = [
            name
            for name in checkpoint.folder.tensors
            if name not in known and family.clean_hf_name(name) is not None and not name.endswith(("_scale", "_inv"))
        ]
    if unknown:
        raise UnsupportedError(
            f"{len(unknown)} tensors are not known in a {family.name} model, among them {unknown[0]!r}",
            why="They might write the residual stream, and would go on writing the direction.",
            next="Use the model in its usual form.",
        )


def _role_name(row: TensorRow) -> str:
    return row.role.value + ("_bias" if row.is_bias else "")


def _notes(checkpoint: Checkpoint, options: AblationOptions, projections: Sequence[Projection]) -> Iterator[str]:
    is_tied = TensorKey(Role.OUTPUT) not in checkpoint.tensors
    edits_embedding = any(item.tensor.row.role is Role.TOKEN_EMBEDDING for item in projections)
    if edits_embedding and is_tied:
        yield (
            "The embedding is the output head too (tied), so the head changes with it; --skip-embedding leaves both "
            "as they are."
        )
    if not edits_embedding and options.skip_begin and options.embedding:
        yield "The embedding stays as it is, because layers at the beginning are skipped."
    if any(item.part in _NORM_AFTER and _has_norm(checkpoint, item) for item in projections):
        yield "A norm follows each part of this family; its scale is taken into account."
    if options.norm_preserving and any(item.tensor.row.transform is Transform.TRANSPOSE for item in projections):
        yield "The rows that keep their norm are those of the matrices as [outputs, inputs]."


def _has_norm(checkpoint: Checkpoint, item: Projection) -> bool:
    return TensorKey(_NORM_AFTER[item.part], item.tensor.key.layer) in checkpoint.tensors
