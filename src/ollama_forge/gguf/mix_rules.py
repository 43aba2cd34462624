"""The mixes of `llama-quantize`, as tables: which type a tensor of a role gets, in which file, under which condition.

In: nothing. Out: tables that `mixture.py` reads. A mix that changes in llama.cpp is changed here and nowhere else.
Facts: src/llama-quant.cpp of llama.cpp b11549 (categories, mixes, fallbacks, the tensors that stay as they are).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from ollama_forge.gguf.types import FileType, GGMLType


class Role(Enum):
    """What a tensor does, as far as the mixes care."""

    TOKEN_EMBEDDING = auto()
    QUERY = auto()
    KEY = auto()
    VALUE = auto()
    ATTENTION_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OUTPUT = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Traits:
    """What the mixes want to know about a model. `n_gqa`: query heads that share one key and value head."""

    architecture: str
    n_layers: int
    n_experts: int
    n_gqa: int
    is_70b: bool
    has_imatrix: bool
    is_tied: bool


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the `index`-th of its role, in `layer`, of `total`."""

    traits: Traits
    index: int
    layer: int
    total: int


Condition = Callable[[Place], bool]


def _always(place: Place) -> bool:
    return True


def _shared(place: Place) -> bool:
    return place.traits.n_gqa >= 4


def _shared_or_experts(place: Place) -> bool:
    return place.traits.n_gqa >= 4 or place.traits.n_experts >= 4


def _eight_experts(place: Place) -> bool:
    return place.traits.n_experts == 8


def _falcon(place: Place) -> bool:
    return place.traits.architecture == "falcon"


def _first_two(place: Place) -> bool:
    return place.index < 2


def _first_four(place: Place) -> bool:
    return place.index < 4


def _first_eighth(place: Place) -> bool:
    return place.layer < place.total // 8


def _first_eighth_by_index(place: Place) -> bool:
    return place.index < place.total // 8


def _first_sixteenth(place: Place) -> bool:
    return place.layer < place.total // 16


def _middle(place: Place) -> bool:
    return place.total // 8 <= place.layer < 7 * place.total // 8


def _more_bits(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = place.total // 8
    return place.layer < eighth or place.layer >= 7 * place.total // 8 or (place.layer - eighth) % 3 == 2


def _blind(place: Place) -> bool:
    return not place.traits.has_imatrix


def _both(first: Condition, second: Condition) -> Condition:
    return lambda place: first(place) and second(place)


def _either(first: Condition, second: Condition) -> Condition:
    return lambda place: first(place) or second(place)


def _not(condition: Condition) -> Condition:
    return lambda place: not condition(place)


@dataclass(frozen=True)
class Rule:
    """In a file of one of `file_types`, where `when` holds, the tensor becomes `type`."""

    file_types: frozenset[FileType]
    type: GGMLType
    when: Condition = _always


def _rule(words: str, type: GGMLType, when: Condition = _always) -> Rule:
    return Rule(frozenset(FileType[f"MOSTLY_{word}"] for word in words.split()), type, when)


MAIN_TYPES: dict[FileType, GGMLType] = {
    FileType.ALL_F32: GGMLType.F32,
    FileType.MOSTLY_F16: GGMLType.F16,
    FileType.MOSTLY_BF16: GGMLType.BF16,
    FileType.MOSTLY_Q4_0: GGMLType.Q4_0,
    FileType.MOSTLY_Q4_1: GGMLType.Q4_1,
    FileType.MOSTLY_Q5_0: GGMLType.Q5_0,
    FileType.MOSTLY_Q5_1: GGMLType.Q5_1,
    FileType.MOSTLY_Q8_0: GGMLType.Q8_0,
    FileType.MOSTLY_Q2_K: GGMLType.Q2_K,
    FileType.MOSTLY_Q2_K_S: GGMLType.Q2_K,
    FileType.MOSTLY_Q3_K_S: GGMLType.Q3_K,
    FileType.MOSTLY_Q3_K_M: GGMLType.Q3_K,
    FileType.MOSTLY_Q3_K_L: GGMLType.Q3_K,
    FileType.MOSTLY_Q4_K_S: GGMLType.Q4_K,
    FileType.MOSTLY_Q4_K_M: GGMLType.Q4_K,
    FileType.MOSTLY_Q5_K_S: GGMLType.Q5_K,
    FileType.MOSTLY_Q5_K_M: GGMLType.Q5_K,
    FileType.MOSTLY_Q6_K: GGMLType.Q6_K,
    FileType.MOSTLY_IQ1_S: GGMLType.IQ1_S,
    FileType.MOSTLY_IQ1_M: GGMLType.IQ1_M,
    FileType.MOSTLY_IQ2_XXS: GGMLType.IQ2_XXS,
    FileType.MOSTLY_IQ2_XS: GGMLType.IQ2_XS,
    FileType.MOSTLY_IQ2_S: GGMLType.IQ2_XS,
    FileType.MOSTLY_IQ2_M: GGMLType.IQ2_S,
    FileType.MOSTLY_IQ3_XXS: GGMLType.IQ3_XXS,
    FileType.MOSTLY_IQ3_XS: GGMLType.IQ3_S,
    FileType.MOSTLY_IQ3_S: GGMLType.IQ3_S,
    FileType.MOSTLY_IQ3_M: GGMLType.IQ3_S,
    FileType.MOSTLY_IQ4_NL: GGMLType.IQ4_NL,
    FileType.MOSTLY_IQ4_XS: GGMLType.IQ4_XS,
    FileType.MOSTLY_TQ1_0: GGMLType.TQ1_0,
    FileType.MOSTLY_TQ2_0: GGMLType.TQ2_0,
}
"""The type of a tensor for which the mix has no rule of its own."""

FALLBACKS: dict[GGMLType, GGMLType] = {
    GGMLType.IQ1_S: GGMLType.IQ4_NL,
    GGMLType.IQ1_M: GGMLType.IQ4_NL,
    GGMLType.IQ2_XXS: GGMLType.IQ4_NL,
    GGMLType.IQ2_XS: GGMLType.IQ4_NL,
    GGMLType.IQ2_S: GGMLType.IQ4_NL,
    GGMLType.IQ3_XXS: GGMLType.IQ4_NL,
    GGMLType.IQ3_S: GGMLType.IQ4_NL,
    GGMLType.IQ4_XS: GGMLType.IQ4_NL,
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.TQ1_0: GGMLType.Q4_0,
    GGMLType.TQ2_0: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}
"""Type whose block does not divide a row -> type with a smaller block. What still does not divide becomes F16."""

_LOWEST = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
LOWEST_FILE_TYPES = frozenset(FileType[f"MOSTLY_{word}"] for word in _LOWEST.split())

RULES: dict[Role, tuple[Rule, ...]] = {
    Role.OUTPUT: (
        _rule("Q8_0", GGMLType.Q8_0),
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS", GGMLType.Q5_K),
        Rule(frozenset(MAIN_TYPES), GGMLType.Q6_K),
    ),
    Role.TOKEN_EMBEDDING: (
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", GGMLType.Q2_K),
        _rule("IQ2_S IQ2_M IQ3_XXS", GGMLType.IQ3_S),
        _rule("TQ1_0 TQ2_0", GGMLType.Q4_K),
    ),
    Role.VALUE: (
        _rule(_LOWEST, GGMLType.Q4_K, _shared_or_experts),
        _rule("IQ2_S IQ2_M", GGMLType.IQ3_S),
        _rule(_LOWEST, GGMLType.Q2_K),
        _rule("Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", GGMLType.Q4_K, _shared),
        _rule("Q2_K", GGMLType.Q3_K),
        _rule("IQ3_XXS", GGMLType.IQ3_S, _blind),
        _rule("IQ3_M", GGMLType.Q4_K),
        _rule("Q3_K_M", GGMLType.Q5_K, _first_two),
        _rule("Q3_K_M", GGMLType.Q4_K),
        _rule("Q3_K_L", GGMLType.Q5_K),
        _rule("IQ4_NL IQ4_XS", GGMLType.Q5_K, _shared),
        _rule("Q4_K_M Q5_K_M", GGMLType.Q6_K, _more_bits),
        _rule("Q4_K_S", GGMLType.Q5_K, _first_four),
    ),
    Role.KEY: (
        _rule(_LOWEST, GGMLType.Q4_K, _eight_experts),
        Rule(frozenset(MAIN_TYPES) - LOWEST_FILE_TYPES, GGMLType.Q8_0, _eight_experts),
        _rule("IQ3_XS", GGMLType.IQ3_XXS),
        _rule("IQ3_XXS", GGMLType.IQ2_S),
    ),
    Role.QUERY: (
        _rule("IQ3_XS", GGMLType.IQ3_XXS),
        _rule("IQ3_XXS", GGMLType.IQ2_S),
    ),
    Role.FFN_DOWN: (
        _rule("IQ2_S IQ2_M", GGMLType.IQ3_S, _first_eighth_by_index),
        _rule("IQ1_S IQ1_M IQ2_XXS IQ2_XS", GGMLType.Q2_K, _first_eighth_by_index),
        _rule("Q2_K", GGMLType.Q3_K),
        _rule("Q2_K_S", GGMLType.Q4_K, _first_eighth),
        _rule("IQ3_XXS", GGMLType.Q4_K, _both(_blind, _first_eighth)),
        _rule("IQ3_XXS", GGMLType.Q3_K, _blind),
        _rule("Q3_K_M", GGMLType.Q5_K, _first_sixteenth),
        _rule("Q3_K_M", GGMLType.Q4_K, _either(_not(_falcon), _more_bits)),
        _rule("IQ3_M", GGMLType.Q4_K, _either(_first_eighth, _both(_eight_experts, _more_bits))),
        _rule("Q3_K_L", GGMLType.Q4_K, _falcon),
        _rule("Q3_K_L", GGMLType.Q5_K),
        _rule("Q4_K_M", GGMLType.Q6_K, _both(_falcon, _first_sixteenth)),
        _rule("Q4_K_M", GGMLType.Q5_K, _both(_falcon, _more_bits)),
        _rule("Q4_K_M", GGMLType.Q6_K, _both(_not(_falcon), _more_bits)),
        _rule("IQ4_NL IQ4_XS", GGMLType.Q5_K, _both(_blind, _first_eighth)),
        _rule("Q5_K_M", GGMLType.Q6_K, _more_bits),
        _rule("Q4_K_S", GGMLType.Q5_K, _both(_not(_falcon), _first_eighth)),
        _rule("Q4_0", GGMLType.Q4_1, _both(_not(_blind), _first_eighth)),
        _rule("Q5_0", GGMLType.Q5_1, _both(_not(_blind), _first_eighth)),
    ),
    Role.ATTENTION_OUTPUT: (
        _rule(_LOWEST, GGMLType.Q5_K, _eight_experts),
        _rule("IQ1_S IQ1_M", GGMLType.IQ2_XXS),
        _rule("IQ2_S IQ2_M", GGMLType.IQ3_S),
        _rule("Q3_K_L", GGMLType.Q4_K, _falcon),
        _rule(
            "Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS",
            GGMLType.Q5_K,
            _both(_eight_experts, _not(_falcon)),
        ),
        _rule("Q2_K", GGMLType.Q3_K, _not(_either(_eight_experts, _falcon))),
        _rule("IQ3_XXS", GGMLType.IQ3_S, _not(_either(_eight_experts, _falcon))),
        _rule("Q3_K_M IQ3_M", GGMLType.Q4_K, _not(_either(_eight_experts, _falcon))),
        _rule("Q3_K_L", GGMLType.Q5_K, _not(_either(_eight_experts, _falcon))),
    ),
    Role.FFN_GATE: (_rule("IQ3_XS", GGMLType.IQ3_XXS, _middle),),
    Role.FFN_UP: (_rule("IQ3_XS", GGMLType.IQ3_XXS, _middle),),
    Role.OTHER: (),
}
"""For each role, the first rule that fits; none means the mix's main type."""

EXACT_ROLES = {
    "output.weight": Role.OUTPUT,
    "token_embd.weight": Role.TOKEN_EMBEDDING,
    "per_layer_token_embd.weight": Role.TOKEN_EMBEDDING,
}
PART_ROLES = (
    ("attn_qkv.weight", Role.VALUE),
    ("attn_kv_b.weight", Role.VALUE),
    ("attn_v.weight", Role.VALUE),
    ("attn_k.weight", Role.KEY),
    ("attn_q.weight", Role.QUERY),
    ("attn_output.weight", Role.ATTENTION_OUTPUT),
    ("ffn_up", Role.FFN_UP),
    ("ffn_gate", Role.FFN_GATE),
    ("ffn_down", Role.FFN_DOWN),
)

KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})
KEPT_PARTS = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    ".rel_pos",
    ".patch_embd",
    ".patch_merger",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
"""Small or touchy tensors that keep the type they have."""

IMATRIX_TYPES = frozenset(
    {GGMLType.IQ1_S, GGMLType.IQ1_M, GGMLType.IQ2_XXS, GGMLType.IQ2_XS, GGMLType.IQ2_S, GGMLType.IQ3_XXS}
)
LAYERS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
