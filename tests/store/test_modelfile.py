"""The Modelfile: what Ollama's state machine accepts, and a round trip for everything that can be said."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ollama_forge.errors import ModelfileError, NotFoundError
from ollama_forge.store.modelfile import (
    Message,
    Modelfile,
    decode_modelfile,
    parse_modelfile,
    read_modelfile,
    render_modelfile,
)

# Each text and what Go's ParseFile and CreateRequest make of it (parser/parser.go:427 of v0.33).
GRAMMAR = {
    "from m": Modelfile(("m",)),
    "  \t\n# a comment\n  # another\nFROM m": Modelfile(("m",)),
    "FROM m # no comment": Modelfile(("m # no comment",)),
    "FROM\t m \t\r\nSYSTEM x": Modelfile(("m",), system="x"),
    "FROM m\rSYSTEM x\r": Modelfile(("m",), system="x"),
    'FROM "m x"': Modelfile(("m x",)),
    "FROM 'm'": Modelfile(("'m'",)),
    "FROM m\nSYSTEM a  b\tc ": Modelfile(("m",), system="a  b\tc"),
    "FROM m\nSYSTEM ": Modelfile(("m",), system=""),
    'FROM m\nSYSTEM ""': Modelfile(("m",), system=""),
    'FROM m\nSYSTEM """"""': Modelfile(("m",), system=""),
    'FROM m\nSYSTEM """\nx\n"""': Modelfile(("m",), system="\nx\n"),
    'FROM m\nSYSTEM """x"""  ': Modelfile(("m",), system="x"),
    'FROM m\nSYSTEM   """ x """': Modelfile(("m",), system=" x "),
    'FROM m\nSYSTEM """a """ b"""': Modelfile(("m",), system='a """ b'),
    'FROM m\nSYSTEM """a "b"""': Modelfile(("m",), system='a "b'),
    'FROM m\nSYSTEM """"a"""': Modelfile(("m",), system='"a'),
    'FROM m\nSYSTEM """a""""': Modelfile(("m",), system='a"'),
    'FROM m\nSYSTEM "a\nb"': Modelfile(("m",), system="a\nb"),
    'FROM m\nSYSTEM "hi" there\nTEMPLATE "x"': Modelfile(("m",), system='hi" there\nTEMPLATE "x'),
    'FROM m\nSYSTEM a "b"': Modelfile(("m",), system='a "b"'),
    'FROM m\nSYSTEM "\n"': Modelfile(("m",), system="\n"),
    "FROM m\nSYSTEM a\nSYSTEM b\nTEMPLATE c\nTEMPLATE d": Modelfile(("m",), system="b", template="d"),
    "FROM m\nLICENSE a\nLICENSE b": Modelfile(("m",), licenses=("a", "b")),
    "FROM m\nPARAMETER stop a\nPARAMETER stop b": Modelfile(("m",), parameters=(("stop", ("a", "b")),)),
    "FROM m\nPARAMETER seed 1\nPARAMETER seed 2": Modelfile(("m",), parameters=(("seed", 2),)),
    "FROM m\nparameter temperature\t0.5": Modelfile(("m",), parameters=(("temperature", 0.5),)),
    'FROM m\nPARAMETER stop """\n"""': Modelfile(("m",), parameters=(("stop", ("\n",)),)),
    "FROM m\nMESSAGE user a: b\nMESSAGE assistant c": Modelfile(
        ("m",), messages=(Message("user", "a: b"), Message("assistant", "c"))
    ),
    'FROM m\nMESSAGE system """a\nb"""': Modelfile(("m",), messages=(Message("system", "a\nb"),)),
    "FROM m\nRENDERER r\nPARSER p\nREQUIRES v0.14.0": Modelfile(("m",), renderer="r", parser="p", requires="0.14.0"),
    "FROM m\nREQUIRES 1.2.3-rc.1+b": Modelfile(("m",), requires="1.2.3-rc.1+b"),
    "FROM a\nFROM b\nDRAFT d": Modelfile(("a", "b"), drafts=("d",)),
    "SYSTEM x\nFROM m": Modelfile(("m",), system="x"),
    "FROM m\u00a0": Modelfile(("m",)),
    "\u00a0FROM m": Modelfile(("m",)),
    "FROM m\nSYSTEM a\0b\x1bc": Modelfile(("m",), system="abc"),
}


@pytest.mark.parametrize(("text", "value"), GRAMMAR.items(), ids=range(len(GRAMMAR)))
def test_what_ollama_accepts_is_understood_as_ollama_does(text: str, value: Modelfile) -> None:
    assert parse_modelfile(text) == value


REFUSED = {
    "": "no FROM",
    "# only a comment": "no FROM",
    "SYSTEM x": "no FROM",
    "FROM": "Line 1",
    "FROM m\nSYSTEM\nx": "Line 2",
    "FROM m\n\nSYTEM x": "Line 3",
    "FROM m\nSYSTEM: x": "Line 2",
    "FROM m\n1SYSTEM x": "Line 2",
    "FROM m\nLICENCE x": "Line 2",
    'FROM m\nSYSTEM """x': "never closed",
    'FROM m\nSYSTEM """a""" b': "never closed",
    'FROM m\nSYSTEM "x': "never closed",
    'FROM m\nSYSTEM """"': "never closed",
    "FROM m\nPARAMETER  temperature 1": "Line 2",
    "FROM m\nPARAMETER temperature": "Line 2",
    "FROM m\nPARAMETER": "Line 2",
    "FROM m\nPARAMETER temp-erature 1": "Line 2",
    "FROM m\nPARAMETER temperatur 1": "temperatur",
    "FROM m\nPARAMETER temperature hot": "Line 2",
    "FROM m\nPARAMETER model x": "model",
    "FROM m\nMESSAGE tool x": "Line 2",
    "FROM m\nMESSAGE User x": "Line 2",
    "FROM m\nMESSAGE  user x": "Line 2",
    "FROM m\nMESSAGE user": "Line 2",
    "FROM m\nREQUIRES soon": "Line 2",
    "FROM m\nREQUIRES 01.2.3": "Line 2",
}


@pytest.mark.parametrize(("text", "told"), REFUSED.items(), ids=range(len(REFUSED)))
def test_what_ollama_refuses_is_refused_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ModelfileError) as refused:
        parse_modelfile(text)
    assert told in refused.value.what
    assert refused.value.next


def test_several_adapters_are_kept_and_told() -> None:
    modelfile = parse_modelfile("FROM m\nADAPTER a\nADAPTER b")
    assert modelfile.adapters == ("a", "b")
    assert any("ADAPTER" in warning for warning in modelfile.warnings)


def test_a_deprecated_parameter_is_left_out_and_told() -> None:
    modelfile = parse_modelfile("FROM m\nPARAMETER mirostat 1")
    assert modelfile.parameters == ()
    assert any("mirostat" in warning for warning in modelfile.warnings)


def test_characters_that_ollama_would_drop_from_texts_stay_and_are_told() -> None:
    text = "\u3053\u3093\u306b\u3061\u306f\u3000\u4e16\u754c \U0001f468\u200d\U0001f469"
    modelfile = parse_modelfile(f"FROM m\nSYSTEM {text}")
    assert modelfile.system == text
    assert any("2 characters" in warning for warning in modelfile.warnings)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks_are_understood(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_bytes("FROM m\nSYSTEM é漢\n".encode(encoding))
    assert read_modelfile(path) == Modelfile(("m",), system="é漢")


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert decode_modelfile(b"FROM m\nSYSTEM \xff\xfe") == "FROM m\nSYSTEM \ufffd\ufffd"


def test_a_missing_modelfile_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="Modelfile"):
        read_modelfile(tmp_path / "Modelfile")


FULL = Modelfile(
    sources=("llama3.2",),
    adapters=("./a b.gguf", "/abs/ü.gguf"),
    drafts=("d.gguf",),
    template='{{ .System }}\n{{ range .Messages }}"{{ .Content }}"{{ end }}\n',
    system=' You are "kind".\n\nAlways.  ',
    licenses=("MIT\nline two", "Apache 2.0"),
    parameters=(
        ("num_ctx", 4096),
        ("stop", ("<|im_end|>", "\n", " ", '"', "")),
        ("temperature", 0.7),
        ("use_mmap", True),
    ),
    messages=(Message("user", "hi"), Message("assistant", '"""quoted""" inside'), Message("system", "")),
    renderer="qwen3",
    parser="qwen3",
    requires="0.14.0",
)


def test_every_instruction_survives_the_round_trip() -> None:
    assert parse_modelfile(render_modelfile(FULL)) == FULL


def test_the_text_is_the_same_every_time() -> None:
    assert render_modelfile(FULL) == render_modelfile(FULL)
    assert render_modelfile(Modelfile(("m",), system="s", parameters=(("top_k", 1), ("seed", 2)))) == (
        'FROM m\nSYSTEM """s"""\nPARAMETER seed 2\nPARAMETER top_k 1\n'
    )


@pytest.mark.parametrize(
    "modelfile",
    [
        Modelfile(),
        Modelfile(("m\nSYSTEM injected",)),
        Modelfile(("m\rSYSTEM injected",)),
        Modelfile((" m",)),
        Modelfile(('"m',)),
        Modelfile(("",)),
        Modelfile(("m\u200b",)),
        Modelfile(("m",), adapters=("a\nFROM evil",)),
        Modelfile(("m",), renderer="r\nSYSTEM x"),
        Modelfile(("m",), requires="1\nSYSTEM x"),
        Modelfile(("m",), system='x"""\ny'),
        Modelfile(("m",), system='x"""  \ny'),
        Modelfile(("m",), system='"""\n'),
        Modelfile(("m",), template="a\0b"),
        Modelfile(("m",), licenses=("\x1b[31m",)),
        Modelfile(("m",), messages=(Message("tool", "x"),)),
        Modelfile(("m",), messages=(Message("user\nFROM x", "x"),)),
        Modelfile(("m",), parameters=(("bogus", 1),)),
        Modelfile(("m",), parameters=(("seed\nSYSTEM x", 1),)),
        Modelfile(("m",), parameters=(("num_ctx", 1.5),)),
    ],
    ids=range(20),
)
def test_what_cannot_be_said_is_refused_and_nothing_is_injected(modelfile: Modelfile) -> None:
    with pytest.raises(ModelfileError):
        render_modelfile(modelfile)


ANY_TEXT = st.text(st.sampled_from('ab" \t\n\r#\u00a0\u200d\u3000\0é') | st.characters(), max_size=24)
LINE = st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=12)
MODELFILES = st.builds(
    Modelfile,
    sources=st.lists(LINE, min_size=1, max_size=2).map(tuple),
    adapters=st.lists(LINE, max_size=2).map(tuple),
    template=st.none() | ANY_TEXT,
    system=st.none() | ANY_TEXT,
    licenses=st.lists(ANY_TEXT, max_size=2).map(tuple),
    messages=st.lists(st.builds(Message, st.sampled_from(["user", "system", "assistant"]), ANY_TEXT), max_size=3).map(
        tuple
    ),
    parameters=st.fixed_dictionaries(
        {}, optional={"seed": st.integers(-5, 5), "stop": st.lists(ANY_TEXT, min_size=1, max_size=3).map(tuple)}
    ).map(lambda values: tuple(sorted(values.items()))),
    renderer=st.none() | LINE,
)


@given(MODELFILES)
@example(Modelfile(("m",), system='"'))
@example(Modelfile(("m",), system='""'))
@example(Modelfile(("m",), system='"\n"'))
@example(Modelfile(("m",), system="\r"))
def test_a_modelfile_survives_the_round_trip_or_is_refused(modelfile: Modelfile) -> None:
    try:
        text = render_modelfile(modelfile)
    except ModelfileError:
        return
    assert parse_modelfile(text) == modelfile


@given(st.text(st.sampled_from('FROMSYTEMPA mx01"\n\r\t# ') | st.characters(), max_size=60))
def test_any_text_is_understood_or_refused_and_what_is_understood_can_be_said_again(text: str) -> None:
    try:
        modelfile = parse_modelfile("FROM m\n" + text)
        again = render_modelfile(modelfile)
    except ModelfileError:
        return
    assert parse_modelfile(again) == modelfile


def test_a_long_text_is_read_in_one_walk() -> None:
    system = "\n".join(f'line {number} says "hello" to you' for number in range(20_000)) + "."
    modelfile = Modelfile(("m",), system=system)
    assert parse_modelfile(render_modelfile(modelfile)) == modelfile
