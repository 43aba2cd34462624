"""What a name says about a model is read as gguf-py reads it."""

from pathlib import Path

import pytest
from gguf.metadata import Metadata
from gguf.utility import size_label as reference_size_label
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.convert.card import ParameterCount, model_id_of, parse_model_name, size_label, title

NAMES = [
    "meta-llama/Llama-3.2-1B-Instruct",
    "Mistral-7B-Instruct-v0.2",
    "mistralai/Mixtral-8x7B-v0.1",
    "Qwen/Qwen2.5-0.5B-Instruct",
    "google/gemma-2-2b-it",
    "bloom-7b1",
    "./models/thing",
    "../thing-3b",
    "/absolute",
    "NousResearch/Meta-Llama-3-8B",
    "Phi-3-mini-4k-instruct",
    "gpt2",
    "gpt2-medium",
    "a model with spaces 7B",
    "DeepSeek-R1-Distill-Qwen-1.5B",
    "some-model-128k-chat-v1.5-q4_k_m",
    "Qwen3-30B-A3B",
    "TinyStories-656K",
    "Yi-34B-200K-2-2",
    "x--y",
    "model-fp16",
    "v2",
    "-",
    "Hermes-2-Pro-Llama-3-8B",
    "org/repo/deeper",
]


def expected(model_id: str, n_parameters: int) -> tuple[str | None, ...]:
    return Metadata.get_model_id_components(model_id, n_parameters)


def found(model_id: str, n_parameters: int) -> tuple[str | None, ...]:
    parts = parse_model_name(model_id, n_parameters)
    return (
        parts.full_name,
        parts.organization,
        parts.basename,
        parts.finetune,
        parts.version,
        parts.size_label,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_parameters", [150_000, 1_200_000_000, 7_000_000_000, 30_000_000_000])
def test_names_are_taken_apart_as_gguf_py_does(name: str, n_parameters: int) -> None:
    assert found(name, n_parameters) == expected(name, n_parameters)
    assert title(name) == Metadata.id_to_title(name)


@pytest.mark.parametrize(
    ("place", "model_id"),
    [
        ("models--google--gemma-3-1b-it/snapshots/dcc83ea841ab6100d6b47a070329e1ba4cf78752", "google/gemma-3-1b-it"),
        ("models--gpt2/snapshots/abc", "gpt2"),
        ("snapshots/my-model", "my-model"),
        ("my-model", "my-model"),
    ],
)
def test_a_model_in_a_cache_is_called_by_its_repository(place: str, model_id: str, tmp_path: Path) -> None:
    assert model_id_of(tmp_path / place) == model_id


WORDS = [
    "llama",
    "3",
    "v1.5",
    "7B",
    "8x7b",
    "A3B",
    "instruct",
    "Chat",
    "mini",
    "128k",
    "Q4_K",
    "bf16",
    "it",
    "1.5b",
    "XL",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7), st.sampled_from([10**5, 10**9, 8 * 10**9]))
def test_any_row_of_words_is_taken_apart_as_gguf_py_does(words: list[str], n_parameters: int) -> None:
    name = "-".join(words)
    assert found(name, n_parameters) == expected(name, n_parameters)
    assert title(name) == Metadata.id_to_title(name)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**14), st.integers(0, 10**12), st.integers(0, 256))
def test_sizes_are_rounded_as_gguf_py_does(shared: int, per_expert: int, n_experts: int) -> None:
    total = shared + per_expert * n_experts
    counted = ParameterCount(total, shared, per_expert, n_experts)
    assert size_label(counted) == reference_size_label(total, shared, per_expert, n_experts)
