"""The choice of types as pure values: it needs names and shapes, no file."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import quantize_sources as sources
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.errors import FormatError, GGUFError, UnsupportedError, UsageError
from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry
from ollama_forge.gguf.mix_rules import FALLBACKS, MAIN_TYPES, RULES
from ollama_forge.gguf.mixture import QuantizeOptions, allows_quantization, plan_choices, plan_types
from ollama_forge.gguf.types import FileType, GGMLType, block_elements, row_bytes

Row = tuple[str, tuple[int, ...], GGMLType]


def model(name: str) -> tuple[str, Callable[[str], Any], list[Row]]:
    """Architecture, metadata and tensors of a source, as `plan_types` takes them."""
    source = sources.SOURCES[name]
    keys = {
        "block_count": source.n_layers,
        "attention.head_count": source.n_heads,
        "attention.head_count_kv": source.n_kv_heads,
        "expert_count": source.n_experts or None,
    }
    metadata = {f"{source.architecture}.{key}": value for key, value in keys.items()}
    rows = [
        (tensor, shape, source.encoding if len(shape) > 1 else GGMLType.F32)
        for tensor, shape in source.shapes().items()
    ]
    return source.architecture, metadata.get, rows


def full_imatrix(rows: list[Row]) -> Imatrix:
    entries = {}
    for name, shape, _ in rows:
        if len(shape) > 1:
            n_matrices = shape[0] if len(shape) == 3 else 1
            entries[name] = ImatrixEntry(
                np.ones((n_matrices, shape[-1]), np.float32), np.ones(n_matrices, dtype=np.int64)
            )
    return Imatrix(entries=entries)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_every_file_type_gives_every_tensor_a_type_that_its_rows_divide_into(name: str) -> None:
    architecture, get, rows = model(name)
    imatrix = full_imatrix(rows)
    for file_type in MAIN_TYPES:
        options = QuantizeOptions(file_type, imatrix=imatrix)
        types = plan_types(architecture, get, rows, options)
        assert list(types) == [row[0] for row in rows]
        for tensor, shape, source in rows:
            assert row_bytes(types[tensor], shape[-1]) > 0
            assert types[tensor] == source or allows_quantization(tensor, shape)


@given(order=st.randoms(use_true_random=False), name=st.sampled_from(sorted(sources.SOURCES)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_tensors_in_the_file_does_not_change_the_choice(order: Any, name: str) -> None:
    architecture, get, rows = model(name)
    options = QuantizeOptions(FileType.MOSTLY_Q4_K_M)
    before = plan_types(architecture, get, rows, options)
    order.shuffle(rows)
    assert plan_types(architecture, get, rows, options) == before


@given(width=st.integers(min_value=2, max_value=1024), file_type=st.sampled_from(sorted(MAIN_TYPES)))
@settings(max_examples=200, deadline=None)
def test_any_row_length_ends_in_a_type_that_can_hold_it(width: int, file_type: FileType) -> None:
    rows: list[Row] = [(f"blk.0.{role}.weight", (4, width), GGMLType.F32) for role in ("attn_q", "attn_v", "ffn_down")]
    rows += [("token_embd.weight", (4, width), GGMLType.F32), ("output.weight", (4, width), GGMLType.F32)]
    get = {"llama.block_count": 1, "llama.attention.head_count": 4}.get
    for choice in plan_choices("llama", get, rows, QuantizeOptions(file_type, imatrix=full_imatrix(rows))):
        assert row_bytes(choice.type, width) > 0
        if choice.is_fallback:
            assert width % block_elements(choice.wanted)
            assert choice.type in (FALLBACKS.get(choice.wanted), GGMLType.F16)


def test_a_70b_llama_with_shared_heads_gets_more_bits_for_its_values() -> None:
    architecture, get, rows = model("llama-80-layers")
    types = plan_types(architecture, get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_S))
    assert types["blk.40.attn_v.weight"] == GGMLType.Q5_K
    assert types["blk.40.ffn_down.weight"] == GGMLType.Q4_K
    architecture, get, rows = model("llama-80-layers-own-heads")
    types = plan_types(architecture, get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_S))
    assert types["blk.40.attn_v.weight"] == GGMLType.Q4_K


def test_shared_experts_are_judged_by_the_layer_in_their_name() -> None:
    rows: list[Row] = []
    for layer in range(8):
        rows.append((f"blk.{layer}.ffn_down_exps.weight", (4, 2, 256), GGMLType.F16))
        rows.append((f"blk.{layer}.ffn_down_shexp.weight", (2, 256), GGMLType.F16))
    get = {"qwen2moe.block_count": 8, "qwen2moe.expert_count": 4, "qwen2moe.attention.head_count": 4}.get
    types = plan_types("qwen2moe", get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_M))
    more = [layer for layer in range(8) if types[f"blk.{layer}.ffn_down_exps.weight"] == GGMLType.Q6_K]
    assert more == [0, 3, 6, 7]
    assert [types[f"blk.{layer}.ffn_down_shexp.weight"] == GGMLType.Q6_K for layer in range(8)].count(True) == 4


def test_norms_biases_routers_and_positions_keep_their_type() -> None:
    kept = {
        "blk.0.attn_norm.weight": (4, 256),
        "blk.0.ffn_gate_inp.weight": (8, 256),
        "blk.0.attn_q.bias": (4, 256),
        "position_embd.weight": (8, 256),
        "output_norm.weight": (256,),
        "blk.0.attn_q.weight": (1, 256),
    }
    assert not any(allows_quantization(name, shape) for name, shape in kept.items())
    assert allows_quantization("blk.0.attn_q.weight", (2, 256))
    assert allows_quantization("blk.0.ffn_up_exps.weight", (8, 1, 256))


def test_an_override_wins_over_the_mix_and_the_first_match_wins() -> None:
    architecture, get, rows = model("qwen3")
    overrides = ((r"blk\.1\.attn_v", GGMLType.Q8_0), ("ATTN_V", GGMLType.Q5_0))
    types = plan_types(architecture, get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_M, tensor_types=overrides))
    assert types["blk.1.attn_v.weight"] == GGMLType.Q8_0
    assert types["blk.2.attn_v.weight"] == GGMLType.Q5_0
    assert types["blk.2.attn_k.weight"] == GGMLType.Q4_K


def test_an_override_also_works_in_a_16_bit_file() -> None:
    architecture, get, rows = model("qwen3")
    options = QuantizeOptions(FileType.MOSTLY_F16, tensor_types=(("ffn_down", GGMLType.Q8_0),))
    types = plan_types(architecture, get, rows, options)
    assert types["blk.3.ffn_down.weight"] == GGMLType.Q8_0
    assert types["blk.3.ffn_up.weight"] == GGMLType.F16


def test_an_override_that_matches_nothing_is_refused() -> None:
    architecture, get, rows = model("qwen3")
    options = QuantizeOptions(FileType.MOSTLY_Q4_K_M, tensor_types=(("ffn_dwon", GGMLType.Q8_0),))
    with pytest.raises(UsageError, match="ffn_dwon"):
        plan_types(architecture, get, rows, options)


def test_an_override_that_is_no_expression_is_refused() -> None:
    architecture, get, rows = model("qwen3")
    options = QuantizeOptions(FileType.MOSTLY_Q4_K_M, tensor_types=(("ffn_(down", GGMLType.Q8_0),))
    with pytest.raises(UsageError, match="not a regular expression"):
        plan_types(architecture, get, rows, options)


@pytest.mark.parametrize(
    "word", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"]
)
def test_a_type_that_would_be_garbage_without_an_imatrix_is_refused(word: str) -> None:
    architecture, get, rows = model("llama-shared-heads")
    with pytest.raises(UsageError, match="needs an importance matrix") as caught:
        plan_types(architecture, get, rows, QuantizeOptions(sources.file_type(word)))
    assert "--imatrix" in caught.value.next


def test_an_imatrix_that_lacks_a_tensor_of_the_lowest_types_is_refused() -> None:
    architecture, get, rows = model("llama-shared-heads")
    imatrix = full_imatrix([row for row in rows if row[0] != "blk.3.ffn_up.weight"])
    with pytest.raises(FormatError, match=r"blk\.3\.ffn_up\.weight"):
        plan_types(architecture, get, rows, QuantizeOptions(FileType.MOSTLY_IQ2_XS, imatrix=imatrix))


def test_metadata_without_layers_is_refused() -> None:
    _, _, rows = model("llama-shared-heads")
    with pytest.raises(GGUFError, match=r"llama\.block_count"):
        plan_types("llama", {}.get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_M))
    with pytest.raises(GGUFError, match=r"llama\.block_count"):
        plan_types("llama", {"llama.block_count": "eight"}.get, rows, QuantizeOptions(FileType.MOSTLY_Q4_K_M))


def test_a_file_type_without_a_mix_is_refused() -> None:
    _, _, rows = model("llama-shared-heads")
    with pytest.raises(UnsupportedError, match="NVFP4"):
        plan_types("llama", {}.get, rows, QuantizeOptions(FileType.MOSTLY_NVFP4))


def test_every_rule_speaks_of_a_file_type_that_has_a_mix() -> None:
    for rules in RULES.values():
        assert all(rule.file_types <= set(MAIN_TYPES) for rule in rules)
