"""Names: exactly Ollama's rules, and no name that could lead anywhere but to its own manifest."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.errors import NameInvalidError
from ollama_forge.store.name import ModelName, name_from_parts, parse_name, validate_writable

# What Go's ParseName makes of each text (types/model/name.go), as host/namespace/model/tag.
VALID = {
    "mistral": "registry.ollama.ai/library/mistral/latest",
    "mistral:7b": "registry.ollama.ai/library/mistral/7b",
    "bob/mistral": "registry.ollama.ai/bob/mistral/latest",
    "hf.co/bob/mistral:Q4_K_M": "hf.co/bob/mistral/Q4_K_M",
    "localhost:5000/bob/mistral": "localhost:5000/bob/mistral/latest",
    "http://localhost:5000/bob/mistral:x": "localhost:5000/bob/mistral/x",
    "https://registry.ollama.ai/library/mistral": "registry.ollama.ai/library/mistral/latest",
    "_x/_y:_z": "registry.ollama.ai/_x/_y/_z",
    "Llama3.2-Vision_1:V1.0-q4": "registry.ollama.ai/library/Llama3.2-Vision_1/V1.0-q4",
    "m" * 80: f"registry.ollama.ai/library/{'m' * 80}/latest",
    "n" * 80 + "/m:" + "t" * 80: f"registry.ollama.ai/{'n' * 80}/m/{'t' * 80}",
    "h" * 350 + "/n/m": f"{'h' * 350}/n/m/latest",
    "a..b": "registry.ollama.ai/library/a..b/latest",
    "x:///n/m": "registry.ollama.ai/n/m/latest",
}

HOSTILE_NAMES = [
    "",
    " ",
    "/",
    ":",
    "a/",
    "/a",
    "a:",
    ":a",
    "//a",
    "a//b",
    "a:b:c",
    ".",
    "..",
    "../x",
    "../../x",
    "../../../../etc/passwd",
    "/etc/passwd",
    "a/../b",
    "a/..",
    "a:..",
    "a:../b",
    "..:x",
    "-a",
    ".a",
    "a:-b",
    "a:.b",
    "a.b/c",
    "a b",
    "a\n",
    "a\0b",
    "a\\b",
    "..\\..\\x",
    "C:\\x",
    "~/x",
    "~",
    "$HOME",
    "a@sha256:1",
    "a/b/c/d/e",
    "http://a",
    "m\u00e9",
    "\u0430",
    "a\u200d",
    "\uff41",
    "m" * 81,
    "a:" + "t" * 81,
    "n" * 81 + "/m",
    "h" * 351 + "/n/m",
    "\udc80",
    "%2e%2e/x",
    "!MISSING!",
]


@pytest.mark.parametrize(("text", "expected"), VALID.items(), ids=range(len(VALID)))
def test_names_are_read_as_go_reads_them(text: str, expected: str) -> None:
    assert "/".join(parse_name(text).manifest_parts) == expected


@pytest.mark.parametrize("text", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
def test_hostile_names_are_refused(text: str) -> None:
    with pytest.raises(NameInvalidError) as refused:
        parse_name(text)
    assert refused.value.why and refused.value.next


@pytest.mark.parametrize(
    "parts",
    [
        ("..", "..", "..", "x"),
        ("a", "b", "c", ""),
        ("a", "b", "c", "d/e"),
        ("a", "b", ".", "d"),
        ("a", "b\0", "c", "d"),
    ],
)
def test_a_name_cannot_be_made_around_the_parser(parts: tuple[str, str, str, str]) -> None:
    with pytest.raises(NameInvalidError):
        ModelName(*parts)


@pytest.mark.parametrize("path", ["a/b/c", "a/b/c/d/e", "a/b/c/.DS_Store", "a/b.c/d/e", "a/b/c/.tmp"])
def test_a_path_that_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(NameInvalidError):
        name_from_parts(PurePosixPath(path).parts)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mistral", "mistral:latest"),
        ("Library/mistral", "mistral:latest"),
        ("REGISTRY.ollama.ai/library/mistral:x", "mistral:x"),
        ("bob/mistral", "bob/mistral:latest"),
        ("hf.co/library/mistral", "hf.co/library/mistral:latest"),
    ],
)
def test_default_parts_are_not_shown(text: str, shown: str) -> None:
    assert parse_name(text).display == shown


@pytest.mark.parametrize("text", ["a:cloud", "a:local", "a:Cloud", "a:120b-cloud", "bob/a:LOCAL"])
def test_tags_that_ollama_would_strip_are_not_written(text: str) -> None:
    with pytest.raises(NameInvalidError, match="cannot be used"):
        validate_writable(parse_name(text))


@pytest.mark.parametrize("text", ["con", "NUL:x", "a:aux", "com1/x", "lpt9:latest", "nul.gguf", "a:b.", "a."])
def test_names_that_windows_cannot_hold_are_not_written(text: str) -> None:
    with pytest.raises(NameInvalidError, match="cannot be used"):
        validate_writable(parse_name(text))


@pytest.mark.parametrize("text", ["cloud", "local/cloud:x", "a:clouds", "a:cloud-x", "console", "com10", "a:locally"])
def test_names_that_only_look_like_those_are_fine(text: str) -> None:
    validate_writable(parse_name(text))


PART = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_-]{0,20}\Z")


@given(PART, PART, PART, PART)
def test_a_name_survives_being_shown_and_read(host: str, namespace: str, model: str, tag: str) -> None:
    name = ModelName(host, namespace, model, tag)
    assert parse_name(f"{host}/{namespace}/{model}:{tag}") == name
    assert parse_name(name.display).folded == name.folded


@given(st.text(max_size=60))
def test_whatever_is_accepted_stays_inside_the_manifests(text: str) -> None:
    try:
        name = parse_name(text)
    except NameInvalidError:
        return
    path = PurePosixPath("/manifests").joinpath(*name.manifest_parts)
    assert len(path.parts) == 6
    assert not set(path.parts) & {".", "..", ""}
    assert str(path).isascii() and "\0" not in str(path) and "\\" not in str(path)
