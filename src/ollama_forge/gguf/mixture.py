"""Which type each tensor gets, as `llama-quantize` chooses it.

In: names, shapes and types of a model's tensors, a few hyper-parameters, and what the user asked for. Out: a type for
each tensor. Pure: no file, no arithmetic on weights; `mix_rules.py` holds the tables, `quantize.py` makes the bytes.
Facts: src/llama-quant.cpp of llama.cpp b11549.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import FormatError, GGUFError, UnsupportedError, UsageError
from ollama_forge.gguf.mix_rules import (
    EXACT_ROLES,
    FALLBACKS,
    IMATRIX_TYPES,
    KEPT_NAMES,
    KEPT_PARTS,
    LAYERS_OF_70B,
    LOWEST_FILE_TYPES,
    MAIN_TYPES,
    PART_ROLES,
    RULES,
    Place,
    Role,
    Traits,
)
from ollama_forge.gguf.types import FileType, GGMLType, block_elements, file_type_name, is_quantized

if TYPE_CHECKING:
    from ollama_forge.gguf.imatrix import Imatrix

TensorRow = tuple[str, tuple[int, ...], GGMLType]
"""Name, row-major shape and present type of one tensor."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What the user asked for.

    `tensor_types` are pairs of a regular expression and a type; the first that is found in a tensor's name wins over
    the mix (not over `output_tensor_type` and `token_embedding_type`), and in F32, F16 and BF16 files too, where
    llama-quantize ignores it without a word. `pure` gives every tensor the mix's main type; `leave_output_tensor` keeps
    `output.weight` as it is.
    """

    file_type: FileType
    imatrix: Imatrix | None = None
    tensor_types: tuple[tuple[str, GGMLType], ...] = ()
    output_tensor_type: GGMLType | None = None
    token_embedding_type: GGMLType | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    n_threads: int | None = None


@dataclass(frozen=True)
class Choice:
    """The type chosen for one tensor; `wanted` is another type when a row did not divide into that type's blocks."""

    name: str
    shape: tuple[int, ...]
    source: GGMLType
    type: GGMLType
    wanted: GGMLType

    @property
    def is_changed(self) -> bool:
        return self.type != self.source

    @property
    def is_fallback(self) -> bool:
        return self.type != self.wanted


_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass
class _Counters:
    """How many tensors of a role have passed through the rules."""

    seen: dict[Role, int] = field(default_factory=dict)

    def take(self, role: Role) -> int:
        index = self.seen.get(role, 0)
        self.seen[role] = index + 1
        return index


def plan_types(
    architecture: str,
    fields_get: Callable[[str], Any],
    tensors: Sequence[TensorRow],
    options: QuantizeOptions,
) -> dict[str, GGMLType]:
    """The type that `llama-quantize` would give each tensor of this model, by name, in the order given.

    Args:
        architecture: `general.architecture`.
        fields_get: metadata by full key (`llama.block_count`); None for a key that is not there.
        tensors: every tensor of the GGUF file to be quantized.

    Raises:
        UsageError: the mix needs an importance matrix, or an option fits no tensor.
        UnsupportedError: a file type without a mix.
        GGUFError: the metadata lacks the number of layers.
    """
    return {choice.name: choice.type for choice in plan_choices(architecture, fields_get, tensors, options)}


def plan_choices(
    architecture: str,
    fields_get: Callable[[str], Any],
    tensors: Sequence[TensorRow],
    options: QuantizeOptions,
) -> list[Choice]:
    """As `plan_types`, with what each tensor is now and what it would have become if its rows divided."""
    main = MAIN_TYPES.get(options.file_type)
    if main is None:
        raise UnsupportedError(
            f"There is no mix for the file type {file_type_name(options.file_type)!r}",
            why="llama.cpp reads such files but does not make them from a list of rules that is known here.",
            next="Choose another type, for example Q4_K_M.",
        )
    patterns = _compile_patterns(options.tensor_types)
    roles = {name: tensor_role(name) for name, _, _ in tensors}
    traits = _read_traits(architecture, fields_get, options, is_tied=Role.OUTPUT not in roles.values())
    n_values = sum(role is Role.VALUE for role in roles.values())
    counters = _Counters()
    choices: dict[str, Choice] = {}
    used: set[str] = set()
    for name, shape, source in sorted(tensors, key=_layer_order):
        wanted = source
        if allows_quantization(name, shape) and not (options.leave_output_tensor and name == "output.weight"):
            override = _find_override(name, roles[name], patterns, options, used)
            if override is not None:
                wanted = override
            elif options.pure or not is_quantized(main):
                wanted = main
            else:
                wanted = _mixed_type(name, shape, roles[name], main, traits, n_values, counters, options)
        choices[name] = Choice(name, shape, source, fitting_type(wanted, shape, source), wanted)
    _refuse_unused_patterns(patterns, used)
    result = [choices[name] for name, _, _ in tensors]
    _require_imatrix(result, options)
    return result


def tensor_role(name: str) -> Role:
    """The role that the mixes see in a GGUF tensor name."""
    exact = EXACT_ROLES.get(name)
    if exact is not None:
        return exact
    return next((role for part, role in PART_ROLES if part in name), Role.OTHER)


def allows_quantization(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor may change its type at all: a matrix of weights, or a stack of them, that no rule keeps."""
    n_dimensions = len(shape) - next((i for i, length in enumerate(shape) if length > 1), len(shape))
    if n_dimensions < 2 or not name.endswith("weight") or name in KEPT_NAMES:
        return False
    return not any(part in name for part in KEPT_PARTS)


def requires_imatrix(name: str, type: GGMLType, file_type: FileType) -> bool:
    """Whether this type makes garbage of this tensor without an importance matrix."""
    if tensor_role(name) is Role.OUTPUT or name == "token_embd.weight" or name == "per_layer_token_embd.weight":
        return False
    return type in IMATRIX_TYPES or (type == GGMLType.Q2_K and file_type == FileType.MOSTLY_Q2_K_S)


def fitting_type(wanted: GGMLType, shape: Sequence[int], source: GGMLType) -> GGMLType:
    """`wanted`, or what takes its place when a row does not divide into its blocks."""
    if wanted == source or shape[-1] % block_elements(wanted) == 0:
        return wanted
    smaller = FALLBACKS.get(wanted, GGMLType.F16)
    return smaller if shape[-1] % block_elements(smaller) == 0 else GGMLType.F16


def _layer_order(tensor: TensorRow) -> tuple[int, bytes]:
    """llama.cpp counts tensors by layer, then by the bytes of their names; tensors outside the layers come first."""
    block = _BLOCK.match(tensor[0])
    return (int(block[1]) if block else -1, tensor[0].encode("utf-8", "surrogateescape"))


def _read_traits(
    architecture: str, fields_get: Callable[[str], Any], options: QuantizeOptions, *, is_tied: bool
) -> Traits:
    def number(suffix: str, default: int) -> int:
        return _read_count(f"{architecture}.{suffix}", fields_get, default)

    n_layers = number("block_count", 0)
    if n_layers < 1 and is_quantized(MAIN_TYPES[options.file_type]):
        raise GGUFError(
            f"The metadata has no number of layers under {architecture + '.block_count'!r}",
            why="The mix of types depends on how deep a tensor lies.",
            next="Check that the file is a language model: ollama-forge show FILE.",
        )
    n_heads = number("attention.head_count", 0)
    n_kv_heads = number("attention.head_count_kv", n_heads)
    is_deep = n_layers == LAYERS_OF_70B.get(architecture)
    return Traits(
        architecture=architecture,
        n_layers=n_layers,
        n_experts=number("expert_count", 0),
        n_gqa=n_heads // n_kv_heads if n_kv_heads else 0,
        is_70b=is_deep and not (architecture.startswith("llama") and n_heads == n_kv_heads),
        has_imatrix=options.imatrix is not None,
        is_tied=is_tied,
    )


def _read_count(key: str, fields_get: Callable[[str], Any], default: int) -> int:
    """A whole number, or the first layer's where the key holds one per layer."""
    value = fields_get(key)
    if value is None:
        return default
    if not isinstance(value, (int, str)) and hasattr(value, "__getitem__") and len(value):
        value = value[0]
    if not isinstance(value, int):
        raise GGUFError(
            f"The metadata key {key!r} is {value!r}, not a whole number",
            why="The mix of types depends on it.",
            next="Get the file again, or convert the model again.",
        )
    return value


def _mixed_type(
    name: str,
    shape: Sequence[int],
    role: Role,
    main: GGMLType,
    traits: Traits,
    n_values: int,
    counters: _Counters,
    options: QuantizeOptions,
) -> GGMLType:
    if role is Role.OUTPUT or (role is Role.TOKEN_EMBEDDING and traits.is_tied):
        return _output_type(shape, main, traits, options)
    index = counters.take(role)
    layer = index
    total = n_values if role is Role.VALUE else traits.n_layers
    if traits.n_experts > 1 and role in (Role.FFN_DOWN, Role.FFN_GATE, Role.FFN_UP):
        layer = _layer_of(name, total)
    place = Place(traits, index, layer, total)
    type = _first_fit(role, place, options.file_type) or main
    if role is Role.VALUE and options.file_type not in LOWEST_FILE_TYPES:
        if traits.is_70b and type in (GGMLType.Q3_K, GGMLType.Q4_K):
            type = GGMLType.Q5_K
        if traits.n_experts == 8:
            type = GGMLType.Q8_0
    return type


def _output_type(shape: Sequence[int], main: GGMLType, traits: Traits, options: QuantizeOptions) -> GGMLType:
    """The output matrix, and the token embedding that stands in for it in a tied model."""
    if options.output_tensor_type is not None:
        return options.output_tensor_type
    if traits.architecture == "falcon" or shape[-1] % block_elements(main):
        return GGMLType.Q8_0
    return _first_fit(Role.OUTPUT, Place(traits, 0, 0, traits.n_layers), options.file_type) or main


def _first_fit(role: Role, place: Place, file_type: FileType) -> GGMLType | None:
    return next((rule.type for rule in RULES[role] if file_type in rule.file_types and rule.when(place)), None)


def _layer_of(name: str, n_layers: int) -> int:
    block = _BLOCK.match(name)
    if block is None or int(block[1]) >= n_layers:
        raise GGUFError(
            f"The tensor {name!r} names no layer below {n_layers}",
            why="In a mixture of experts the mix is chosen by the layer in the tensor's name.",
            next="Check the file with ollama-forge show FILE; its block_count and its tensors disagree.",
        )
    return int(block[1])


def _compile_patterns(pairs: Sequence[tuple[str, GGMLType]]) -> list[tuple[str, re.Pattern[str], GGMLType]]:
    patterns = []
    for text, type in pairs:
        try:
            patterns.append((text, re.compile(text, re.IGNORECASE), type))
        except re.error as exc:
            raise UsageError(
                f"{text!r} is not a regular expression",
                why=f"{exc}.",
                next="Write for example --tensor-type 'ffn_down=q6_k' or 'blk\\.[0-3]\\.attn_v=q8_0'.",
            ) from exc
    return patterns


def _find_override(
    name: str,
    role: Role,
    patterns: list[tuple[str, re.Pattern[str], GGMLType]],
    options: QuantizeOptions,
    used: set[str],
) -> GGMLType | None:
    """What the user said about this tensor, if anything."""
    found = next(((text, type) for text, pattern, type in patterns if pattern.search(name)), None)
    if found is not None:
        used.add(found[0])
    if role is Role.TOKEN_EMBEDDING and options.token_embedding_type is not None:
        return options.token_embedding_type
    if role is Role.OUTPUT and options.output_tensor_type is not None:
        return options.output_tensor_type
    return found[1] if found is not None else None


def _refuse_unused_patterns(patterns: list[tuple[str, re.Pattern[str], GGMLType]], used: set[str]) -> None:
    unused = [text for text, _, _ in patterns if text not in used]
    if unused:
        raise UsageError(
            f"No tensor that can be quantized is matched by {unused[0]!r}",
            why="It is searched in names such as 'blk.0.ffn_down.weight'; an earlier one may take what it matches.",
            next="Mend the expression, or leave it out.",
        )


def _require_imatrix(choices: Sequence[Choice], options: QuantizeOptions) -> None:
    """Refuse, before any work, what would be garbage: a very small type for a tensor without an importance matrix."""
    for choice in choices:
        if not allows_quantization(choice.name, choice.shape):
            continue
        if not requires_imatrix(choice.name, choice.type, options.file_type):
            continue
        if options.imatrix is None:
            raise UsageError(
                f"{file_type_name(options.file_type)} needs an importance matrix: {choice.name!r} would become "
                f"{choice.type.name}",
                why="So few bits make garbage unless the quantizer knows which columns matter.",
                next="Make one (ollama-forge imatrix REF -o imatrix.gguf) and add --imatrix imatrix.gguf; or take a "
                "larger type, for example Q3_K_M",
            )
        if choice.is_changed and choice.name not in options.imatrix.entries:
            raise FormatError(
                f"The importance matrix has nothing for {choice.name!r}, which would become {choice.type.name}",
                why="So few bits make garbage unless the quantizer knows which columns matter.",
                next="Make one from this model (ollama-forge imatrix REF -o imatrix.gguf), or take a larger type, "
                "for example Q3_K_M.",
            )
