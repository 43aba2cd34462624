"""Strategy A: names of entries."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.gguf.types import FileType, file_type_name
from ollama_forge.registry.naming import (
    STRATEGY_A_QUANTIZATION,
    agrees,
    derive_variant,
    free_name,
    parse_quantization,
    split_tag,
)
from ollama_forge.store.name import parse_name

SEED_REGEX = r"^(q\d(?:_k(?:_m)?)?|int4|int8|fp16|f16)$"


def test_the_expression_is_the_strategys_own() -> None:
    assert STRATEGY_A_QUANTIZATION.pattern == SEED_REGEX
    assert STRATEGY_A_QUANTIZATION.flags & re.IGNORECASE


@pytest.mark.parametrize("token", ["q4", "q4_k", "q4_k_m", "Q8_K_M", "int4", "INT8", "fp16", "f16"])
def test_every_token_of_the_strategy_is_known(token: str) -> None:
    assert STRATEGY_A_QUANTIZATION.match(token)
    assert derive_variant(f"llama3:{token}").family == "llama3"
    assert derive_variant(f"llama3:{token}").name == f"llama3-ollama-gguf-{token.lower()}"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.from_regex(SEED_REGEX, fullmatch=True))
def test_the_list_is_a_superset_of_the_strategys(token: str) -> None:
    if token.isascii():
        assert parse_quantization(token.strip()) == token.strip().lower()


@pytest.mark.parametrize("type", sorted(FileType, key=int))
def test_every_file_type_of_llama_cpp_is_known(type: FileType) -> None:
    word = file_type_name(type)
    if word != "unknown":
        assert parse_quantization(word) == word.lower()
        assert derive_variant(f"m:{word}").quantization == word.lower()


@pytest.mark.parametrize(
    "tag", ["7b", "latest", "8b-instruct", "q4_k_m_x", "aq4", "q4-x", "instruct-q4x", "iq4", "v1.5"]
)
def test_a_tag_that_is_no_quantization_belongs_to_the_family(tag: str) -> None:
    variant = derive_variant(f"llama3:{tag}")
    assert variant.quantization is None
    assert variant.family == f"llama3-{tag}"
    assert variant.name == f"llama3-{tag}-ollama-gguf"


@pytest.mark.parametrize(
    ("identifier", "family", "quantization"),
    [
        ("llama3", "llama3", None),
        ("llama3:8b-instruct-q4_K_M", "llama3-8b-instruct", "q4_k_m"),
        ("llama3:8b-text-q8_0", "llama3-8b-text", "q8_0"),
        ("llama3:iq4_xs", "llama3", "iq4_xs"),
        ("llama3:8b-bf16", "llama3-8b", "bf16"),
        ("llama3:fp8", "llama3", "fp8"),
        ("gpt-oss:20b-mxfp4", "gpt-oss-20b", "mxfp4"),
        ("user/model:7b", "user-model-7b", None),
        ("hf.co/x/Qwen3-8B-GGUF:Q4_K_M", "hf.co-x-qwen3-8b-gguf", "q4_k_m"),
        ("hf.co/y/Qwen3-8B-Q8_0-GGUF:latest", "hf.co-y-qwen3-8b-q8_0-gguf-latest", None),
        ("hf.co/z/M-GGUF:UD-Q4_K_XL", "hf.co-z-m-gguf-ud", "q4_k_xl"),
        ("hf.co/z/M-GGUF:IQ4_NL", "hf.co-z-m-gguf", "iq4_nl"),
        ("localhost:5000/ns/model:Q4_0", "localhost-5000-ns-model", "q4_0"),
        ("localhost:5000/ns/model", "localhost-5000-ns-model", None),
        ("faq2-helper-bot:7b", "faq2-helper-bot-7b", None),
        ("deepseek-r1-q8-distill-llama", "deepseek-r1-q8-distill-llama", None),
        ("my_model:q4_k_m", "my_model", "q4_k_m"),
    ],
)
def test_a_name_says_this_much_and_no_more(identifier: str, family: str, quantization: str | None) -> None:
    variant = derive_variant(identifier)
    assert (variant.family, variant.quantization) == (family, quantization)


PART = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,12}", fullmatch=True)
MODEL = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
TAG = st.one_of(
    MODEL,
    st.sampled_from(["latest", "7b", "q4_K_M", "Q8_0", "iq4_xs", "bf16", "8b-instruct-q4_K_M", "UD-Q4_K_XL", "-q4"]),
).filter(lambda tag: tag[0] not in "-.")
IDENTIFIER = st.builds(
    lambda head, model, tag: f"{head}{model}:{tag}",
    st.one_of(
        st.just(""), PART.map(lambda p: p + "/"), PART.map(lambda p: f"hf.co/{p}/"), st.just("localhost:5000/a/")
    ),
    MODEL,
    TAG,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(IDENTIFIER)
def test_no_name_is_misfiled(identifier: str) -> None:
    """Family and quantization together hold every letter; a quantization is one whole word of the tag."""
    parse_name(identifier)
    variant = derive_variant(identifier)
    base, tag = split_tag(identifier)
    whole = variant.family + (f"-{variant.quantization}" if variant.quantization else "")
    assert whole == re.sub(r"[^a-z0-9._-]+", "-", f"{base}-{tag}".lower())
    assert re.fullmatch(r"[a-z0-9._-]+-ollama-gguf(-[a-z0-9_]+)?", variant.name)
    if STRATEGY_A_QUANTIZATION.match(tag):
        assert variant.quantization == tag.lower()
    if variant.quantization is None:
        assert parse_quantization(tag) is None
        assert "-" not in tag or not tag.rpartition("-")[0] or parse_quantization(tag.rpartition("-")[2]) is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(IDENTIFIER, max_size=12, unique_by=str.lower))
def test_no_two_models_share_a_name(identifiers: list[str]) -> None:
    names: dict[str, str] = {}
    for identifier in sorted(identifiers):
        names[free_name(derive_variant(identifier).name, identifier.lower(), names)] = identifier
    assert sorted(names.values()) == sorted(identifiers)
    again: dict[str, str] = {}
    for identifier in sorted(identifiers):
        again[free_name(derive_variant(identifier).name, identifier.lower(), again)] = identifier
    assert again == names


def test_a_name_that_is_taken_gets_a_suffix_that_only_the_model_decides() -> None:
    plain = derive_variant("a-b/c:7b").name
    assert derive_variant("a/b-c:7b").name == plain
    suffixed = free_name(plain, "a/b-c:7b", {plain})
    assert re.fullmatch(re.escape(plain) + "-[0-9a-f]{6}", suffixed)
    assert free_name(plain, "a/b-c:7b", {plain, "another"}) == suffixed
    assert free_name(plain, "a/b-c:7b", {plain, suffixed}).startswith(suffixed)
    assert free_name(plain, "other", {plain}) != suffixed


@pytest.mark.parametrize(
    ("said", "found", "do"),
    [
        ("q4_k_m", "Q4_K_M", True),
        ("q4", "q4_k_m", True),
        ("q4", "q4_0", True),
        ("q4_k", "q4_k_s", True),
        ("q4_k_xl", "q4_k_m", True),
        ("int4", "q4_0", True),
        ("int4", "iq4_xs", True),
        ("int8", "q8_0", True),
        ("fp16", "f16", True),
        ("mxfp4", "mxfp4_moe", True),
        ("q4_0", "q4_k_m", False),
        ("q4", "q5_k_m", False),
        ("q4_k_xl", "q5_k_m", False),
        ("int8", "q4_0", False),
        ("f16", "bf16", False),
    ],
)
def test_a_name_and_a_header_agree_or_not(said: str, found: str, do: bool) -> None:
    assert agrees(said, found) is do
