"""How a model is divided into parts that are measured, and what unmeasured types are said to cost."""

from __future__ import annotations

import pytest

from ollama_forge.errors import UnsupportedError
from ollama_forge.gguf.budget import Group, Option
from ollama_forge.gguf.fit_groups import cost_of_options, main_file_type, plan_groups
from ollama_forge.gguf.mixture import TensorRow
from ollama_forge.gguf.types import FileType, GGMLType, tensor_bytes

PARTS = {
    "attn_norm": (256,),
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}


def llama_rows(n_blocks: int, *, source: GGMLType = GGMLType.BF16) -> list[TensorRow]:
    rows: list[TensorRow] = [("token_embd.weight", (640, 256), source), ("output_norm.weight", (256,), GGMLType.F32)]
    for block in range(n_blocks):
        for part, shape in PARTS.items():
            rows.append((f"blk.{block}.{part}.weight", shape, GGMLType.F32 if len(shape) == 1 else source))
    return rows


def test_every_tensor_that_can_be_quantized_is_in_one_group() -> None:
    rows = llama_rows(4)
    plan = plan_groups(rows, weighted=(), max_passes=10_000)
    named = [name for group in plan.groups for name in group.tensors]
    assert sorted(named) == sorted(name for name, shape, _ in rows if len(shape) > 1)
    assert [group.name for group in plan.groups[:6]] == [
        "token_embd",
        "blk.0.attn_output",
        "blk.0.attn_q+k",
        "blk.0.attn_v",
        "blk.0.ffn_down",
        "blk.0.ffn_gate+up",
    ]


def test_options_go_from_the_smallest_to_what_the_tensors_are() -> None:
    group = plan_groups(llama_rows(1), weighted=(), max_passes=10_000).groups[0]
    assert [option.type.name for option in group.options] == [
        *("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16")
    ]
    assert [option.size_bytes for option in group.options] == [
        tensor_bytes(option.type, (640, 256)) for option in group.options
    ]


def test_an_importance_matrix_opens_the_smaller_types() -> None:
    weighted = ["blk.0.ffn_down.weight"]
    groups = {group.name: group for group in plan_groups(llama_rows(1), weighted=weighted, max_passes=99).groups}
    assert GGMLType.IQ2_S in [option.type for option in groups["blk.0.ffn_down"].options]
    assert GGMLType.IQ2_S not in [option.type for option in groups["blk.0.attn_v"].options]


def test_a_group_may_take_its_part_of_a_plain_mix_which_is_not_measured_alone() -> None:
    rows = llama_rows(4)
    mix = {name: GGMLType.Q4_K for name, _, _ in rows} | {"blk.0.attn_v.weight": GGMLType.Q6_K}
    apart = plan_groups(rows, weighted=(), max_passes=10_000, plain=[mix])
    together = plan_groups(rows, weighted=(), max_passes=18, plain=[mix])
    assert apart.n_passes == plan_groups(rows, weighted=(), max_passes=10_000).n_passes
    assert not any(option.is_from_plain for group in apart.groups for option in group.options)
    group = next(group for group in together.groups if group.name == "blk.0-3.attn_v")
    (part,) = (option for option in group.options if option.is_from_plain)
    assert [type.name for type in part.types] == ["Q6_K", "Q4_K", "Q4_K", "Q4_K"]
    assert group.options[-1].types == (GGMLType.BF16,) * 4
    assert together.n_passes == 18


def test_types_that_are_no_smaller_than_the_source_are_no_options() -> None:
    group = plan_groups(llama_rows(1, source=GGMLType.Q4_0), weighted=(), max_passes=99).groups[0]
    assert [option.type.name for option in group.options] == ["Q2_K", "Q3_K", "IQ4_XS", "Q4_0"]


def test_rows_that_do_not_divide_get_the_types_that_take_their_place() -> None:
    rows: list[TensorRow] = [("blk.0.ffn_down.weight", (64, 96), GGMLType.F16)]
    options = plan_groups(rows, weighted=(), max_passes=99).groups[0].options
    assert [option.types[0].name for option in options] == ["Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0", "F16"]


@pytest.mark.parametrize("max_passes", [1, 60, 200, 500, 2000])
def test_blocks_are_put_together_until_the_runs_suffice(max_passes: int) -> None:
    plan = plan_groups(llama_rows(32), weighted=(), max_passes=max_passes)
    assert plan.n_passes <= max(max_passes, 6 * 3)
    assert len(plan.groups) == 1 + 5 * plan.n_bands
    assert plan.n_bands == {1: 1, 60: 3, 200: 13, 500: 32, 2000: 32}[max_passes]


def test_the_first_and_the_last_block_stay_alone() -> None:
    names = [group.name for group in plan_groups(llama_rows(32), weighted=(), max_passes=200).groups]
    assert {"blk.0.ffn_down", "blk.31.ffn_down"} <= set(names)
    assert "blk.1-3.ffn_down" in names


def test_a_file_without_matrices_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no tensor that can be quantized"):
        plan_groups([("output_norm.weight", (256,), GGMLType.F32)], weighted=(), max_passes=9)


def three_options() -> Group:
    types = (GGMLType.Q2_K, GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.BF16)
    return Group("g", ("t",), tuple(Option(type, (type,), 10 * n) for n, type in enumerate(types, 1)))


def test_a_cost_between_two_measured_ones_lies_on_the_line_between_their_logarithms() -> None:
    priced = cost_of_options(three_options(), {0: 1e-1, 2: 1e-5}, [1e-1, 1e-3, 1e-5, 0.0])
    assert [option.cost for option in priced.options] == pytest.approx([1e-1, 1e-3, 1e-5, 0.0])


def test_a_cost_beyond_the_measured_ones_is_proportional_to_the_error() -> None:
    priced = cost_of_options(three_options(), {1: 1e-3}, [4e-2, 1e-2, 1e-4, 0.0])
    assert [option.cost for option in priced.options] == pytest.approx([4e-3, 1e-3, 1e-5, 0.0])


def test_a_larger_error_never_costs_less_whatever_was_measured() -> None:
    priced = cost_of_options(three_options(), {0: 2e-4, 1: 5e-4, 2: 0.0}, [1e-1, 1e-2, 1e-3, 0.0])
    costs = [option.cost for option in priced.options]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0
    assert costs[2] > 0


def test_a_file_is_called_after_the_type_with_the_most_bytes() -> None:
    types = {"a": GGMLType.Q4_K, "b": GGMLType.Q6_K, "c": GGMLType.Q6_K}
    assert main_file_type(types, {"a": 30, "b": 10, "c": 10}) is FileType.MOSTLY_Q4_K_M
    assert main_file_type(types, {"a": 10, "b": 10, "c": 10}) is FileType.MOSTLY_Q6_K
