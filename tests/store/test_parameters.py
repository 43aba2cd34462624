"""Parameters: the types that the server's options have, as text and as a blob."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.errors import ModelfileError
from ollama_forge.store.parameters import (
    DEPRECATED_PARAMETERS,
    PARAMETERS,
    merge_parameters,
    parse_parameter,
    parse_params_blob,
    render_parameter,
    render_params_blob,
)

# The fields of api.Options and api.Runner with their Go types (api/types.go:568).
GO_OPTIONS = {
    int: "num_keep seed num_predict top_k repeat_last_n num_ctx num_batch num_gpu num_thread main_gpu "
    "draft_num_predict",
    float: "top_p min_p typical_p temperature repeat_penalty presence_penalty frequency_penalty",
    bool: "use_mmap",
    tuple: "stop",
}


def test_the_table_holds_exactly_the_servers_options() -> None:
    assert {name: row.kind for name, row in PARAMETERS.items()} == {
        name: kind for kind, names in GO_OPTIONS.items() for name in names.split()
    }
    assert not DEPRECATED_PARAMETERS & set(PARAMETERS)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("num_ctx", "4096", 4096),
        ("num_predict", "-1", -1),
        ("seed", "+7", 7),
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_p", ".5", 0.5),
        ("min_p", "1e-2", 0.01),
        ("temperature", "0.123456789", 0.12345679),
        ("use_mmap", "T", True),
        ("use_mmap", "0", False),
        ("stop", "<|im_end|>", ("<|im_end|>",)),
        ("stop", "", ("",)),
    ],
)
def test_values_get_the_servers_types(name: str, text: str, value: object) -> None:
    parsed = parse_parameter(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("num_ctx", "4096.0"),
        ("num_ctx", "4k"),
        ("num_ctx", "1_000"),
        ("num_ctx", ""),
        ("num_ctx", "\u0664"),
        ("num_ctx", str(1 << 63)),
        ("num_ctx", "9" * 5000),
        ("temperature", "hot"),
        ("temperature", "nan"),
        ("temperature", "inf"),
        ("temperature", "1e39"),
        ("temperature", "0x1p-2"),
        ("temperature", " 1"),
        ("use_mmap", "yes"),
        ("use_mmap", "tRUE"),
        ("Temperature", "1"),
        ("model", "x"),
        ("", "1"),
        ("mirostat", "1"),
    ],
)
def test_what_the_server_would_refuse_is_refused_with_an_example(name: str, text: str) -> None:
    with pytest.raises(ModelfileError) as refused:
        parse_parameter(name, text)
    assert refused.value.next


@pytest.mark.parametrize("row", PARAMETERS.values(), ids=lambda row: row.name)
def test_every_default_survives_its_text(row) -> None:  # type: ignore[no-untyped-def]
    if row.default not in (None, ()):
        assert parse_parameter(row.name, render_parameter(row.default)) == row.default


def test_the_blob_is_sorted_and_stop_is_always_a_list() -> None:
    raw = render_params_blob([("temperature", 1.0), ("stop", ("<x>",)), ("num_ctx", 10), ("use_mmap", False)])
    assert raw == b'{"num_ctx":10,"stop":["\\u003cx\\u003e"],"temperature":1,"use_mmap":false}\n'


def test_a_blob_of_the_server_reads_back_typed_and_unknown_names_stay() -> None:
    raw = b'{"temperature": 1, "num_ctx": 4096.0, "stop": ["a", "b"], "seed": null, "mirostat": 2, "odd": {"x": 1}}\n'
    assert parse_params_blob(raw) == (
        ("mirostat", 2),
        ("num_ctx", 4096),
        ("stop", ("a", "b")),
        ("temperature", 1.0),
    )


@pytest.mark.parametrize(
    "document",
    [
        {"stop": "a"},
        {"stop": [1]},
        {"num_ctx": "4096"},
        {"temperature": "1"},
        {"temperature": True},
        {"use_mmap": 1},
        [],
    ],
)
def test_a_value_that_breaks_every_request_is_refused(document: object) -> None:
    with pytest.raises(ModelfileError):
        parse_params_blob(json.dumps(document).encode())


VALUES = {
    int: st.integers(-(1 << 31), (1 << 31) - 1),
    float: st.floats(width=32, allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    tuple: st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=10), max_size=3).map(tuple),
}
ANY_PARAMETERS = st.fixed_dictionaries({}, optional={name: VALUES[row.kind] for name, row in PARAMETERS.items()})


@given(ANY_PARAMETERS)
def test_parameters_survive_the_blob(values: dict) -> None:  # type: ignore[type-arg]
    pairs = tuple(sorted(values.items()))
    assert parse_params_blob(render_params_blob(pairs)) == pairs


def test_a_later_layer_replaces_a_whole_value() -> None:
    merged = merge_parameters([("stop", ("a", "b")), ("seed", 1)], [("stop", ("c",)), ("top_k", 2)])
    assert merged == (("seed", 1), ("stop", ("c",)), ("top_k", 2))
