"""JSON in Go's spelling: the facts of encoding/json, as a table."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.errors import FormatError
from ollama_forge.store.go_json import parse_json_object, render_go_float, render_go_json, round_to_float32

GO_FLOATS = {
    0.0: "0",
    1.0: "1",
    -2.5: "-2.5",
    0.1: "0.1",
    0.8: "0.8",
    100.0: "100",
    1e20: "100000000000000000000",
    1e21: "1e+21",
    1.5e22: "1.5e+22",
    1e-6: "0.000001",
    1e-7: "1e-7",
    1.25e-10: "1.25e-10",
    123456.789: "123456.789",
    5e-324: "5e-324",
    1.7976931348623157e308: "1.7976931348623157e+308",
}


@pytest.mark.parametrize(("value", "text"), GO_FLOATS.items())
def test_floats_are_printed_as_go_prints_them(value: float, text: str) -> None:
    assert render_go_float(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("<s>&</s>", '"\\u003cs\\u003e\\u0026\\u003c/s\\u003e"'),
        ("a\u2028b\u2029", '"a\\u2028b\\u2029"'),
        ("\x00\x1f\x7f", '"\\u0000\\u001f\x7f"'),
        ("\b\f\n\r\t", '"\\b\\f\\n\\r\\t"'),
        ("é漢😀", '"é漢😀"'),
        ("\ud800x", '"\\ufffdx"'),
        ('"\\/', '"\\"\\\\/"'),
        ([1, True, None, "x"], '[1,true,null,"x"]'),
        ({"b": 1, "a": []}, '{"b":1,"a":[]}'),
        (("x",), '["x"]'),
    ],
)
def test_values_are_spelled_as_go_spells_them(value: object, text: str) -> None:
    assert render_go_json(value) == text


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (0.7, 0.7),
        (0.1, 0.1),
        (0.123456789, 0.12345679),
        (16777217.0, 16777216.0),
        (1e-40, 1e-40),
        (3e38, 3e38),
        (0.0, 0.0),
    ],
)
def test_a_float_is_kept_in_32_bits_and_named_shortly(value: float, kept: float) -> None:
    assert round_to_float32(value) == kept


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounding_twice_changes_nothing(value: float) -> None:
    once = round_to_float32(value)
    assert round_to_float32(once) == once


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_what_is_written_reads_back_the_same(value: object) -> None:
    def read(text: str) -> object:
        return json.loads(text, parse_int=float)  # Go writes whole floats without a point

    assert read(render_go_json(value)) == read(json.dumps(value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(FormatError):
        render_go_json(value)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"{} x",
        b'{"a":NaN}',
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 5000 + b"}",
    ],
    ids=range(10),
)
def test_hostile_json_is_refused(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_json_object(raw, limit_bytes=1 << 20, what="It")


def test_large_json_is_not_read() -> None:
    with pytest.raises(FormatError, match="more than"):
        parse_json_object(b'{"a": 1}', limit_bytes=4, what="It")
