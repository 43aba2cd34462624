"""The memory of a context, against numbers worked out by hand and those that llama.cpp prints when it loads a model."""

from pathlib import Path
from typing import Any

import pytest
import tiny_gguf

from ollama_forge.arch.kv_cache import cache_layers, kv_cache_bytes, trained_context
from ollama_forge.errors import GGUFError, UsageError
from ollama_forge.gguf.reader import open_gguf


def metadata(architecture: str, **numbers: Any) -> dict[str, Any]:
    """Metadata of an architecture; `attention__head_count` stands for `attention.head_count`."""
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in numbers.items()}
    return {"general.architecture": architecture, **keys}


LLAMA_8B = metadata(
    "llama", block_count=32, embedding_length=4096, attention__head_count=32, attention__head_count_kv=8,
    context_length=8192,
)  # fmt: skip
GEMMA3_4B = metadata(
    "gemma3", block_count=34, embedding_length=2560, attention__head_count=8, attention__head_count_kv=4,
    attention__key_length=256, attention__value_length=256, attention__sliding_window=1024,
)  # fmt: skip


def test_grouped_heads_count_once_for_each_group() -> None:
    assert kv_cache_bytes(LLAMA_8B, 8192) == 2 * 32 * 8192 * 8 * 128 * 2 == 1 << 30


def test_without_a_number_of_key_heads_every_head_has_its_own() -> None:
    gpt2 = metadata("gpt2", block_count=12, embedding_length=768, attention__head_count=12)
    assert kv_cache_bytes(gpt2, 1024) == 2 * 12 * 1024 * 768 * 2


def test_a_context_is_rounded_up_as_llama_cpp_does_it() -> None:
    assert kv_cache_bytes(LLAMA_8B, 1) == kv_cache_bytes(LLAMA_8B, 256)
    assert cache_layers(LLAMA_8B, 257)[0].cells == 512


def test_fewer_bytes_for_each_element_make_it_smaller_in_proportion() -> None:
    assert kv_cache_bytes(LLAMA_8B, 8192, 34 / 32) == (1 << 30) * 34 // 64


def test_head_counts_may_differ_from_layer_to_layer() -> None:
    deci = metadata("deci", block_count=3, embedding_length=64, attention__head_count=[4, 0, 4],
                    attention__head_count_kv=[2, 0, 1])  # fmt: skip
    assert [layer.elements for layer in cache_layers(deci, 256)] == [256 * 2 * 32, 0, 256 * 2 * 16]


def test_most_gemma3_layers_keep_only_their_window() -> None:
    cells = [layer.cells for layer in cache_layers(GEMMA3_4B, 32768)]
    assert cells[:6] == [1536] * 5 + [32768]
    assert cells.count(32768) == 5
    assert kv_cache_bytes(GEMMA3_4B, 32768) == (5 * 32768 + 29 * 1536) * 2 * 4 * 256 * 2


def test_a_window_wider_than_the_context_changes_nothing() -> None:
    assert {layer.cells for layer in cache_layers(GEMMA3_4B, 1024)} == {1024}


def test_gemma2_slides_in_every_other_layer() -> None:
    gemma2 = metadata("gemma2", block_count=4, embedding_length=64, attention__head_count=4)
    assert [layer.cells for layer in cache_layers(gemma2, 8192)] == [4608, 8192, 4608, 8192]


def test_a_pattern_in_the_file_is_followed_and_with_it_the_sizes_of_sliding_heads() -> None:
    gemma4 = metadata(
        "gemma4", block_count=3, embedding_length=64, attention__head_count=2, attention__head_count_kv=[2, 2, 1],
        attention__key_length=64, attention__value_length=64, attention__key_length_swa=32,
        attention__value_length_swa=32, attention__sliding_window=512,
        attention__sliding_window_pattern=[True, True, False],
    )  # fmt: skip
    assert [layer.elements for layer in cache_layers(gemma4, 4096)] == [1024 * 128, 1024 * 128, 4096 * 128]


def test_layers_that_share_a_cache_keep_none() -> None:
    shared = {**GEMMA3_4B, "gemma3.attention.shared_kv_layers": 30}
    assert sum(layer.cells > 0 for layer in cache_layers(shared, 4096)) == 4


def test_a_window_that_llama_cpp_ignores_is_ignored() -> None:
    mistral = {**LLAMA_8B, "llama.attention.sliding_window": 4096}
    assert kv_cache_bytes(mistral, 32768) == kv_cache_bytes(LLAMA_8B, 32768)


def test_compressed_keys_stand_for_the_values_too() -> None:
    deepseek = metadata(
        "deepseek2", block_count=61, embedding_length=7168, attention__head_count=128, attention__head_count_kv=1,
        attention__key_length=576, attention__value_length=512, attention__key_length_mla=192,
    )  # fmt: skip
    assert kv_cache_bytes(deepseek, 4096) == 61 * 4096 * 576 * 2


def test_recurrent_layers_keep_nothing() -> None:
    qwen = metadata("qwen3next", block_count=8, embedding_length=64, attention__head_count=4)
    assert [layer.cells for layer in cache_layers(qwen, 256)] == [0, 0, 0, 256] * 2
    assert kv_cache_bytes(metadata("mamba", block_count=4), 4096) == 0


TINY = {"block_count": 2, "embedding_length": 64, "attention__head_count": 2, "attention__head_count_kv": 1}
WINDOWED = {**TINY, "attention__key_length": 32, "attention__value_length": 32, "attention__sliding_window": 64}


@pytest.mark.parametrize(
    ("architecture", "numbers", "printed_mib"),
    [
        ("llama", TINY, 0.50),
        ("phi3", TINY, 0.50),
        ("gpt2", {**TINY, "attention__head_count_kv": 2}, 1.00),
        ("gemma2", WINDOWED, 0.34),
        ("gemma3", WINDOWED, 0.19),
    ],
)
def test_sizes_are_those_that_llama_cpp_prints(architecture: str, numbers: dict[str, int], printed_mib: float) -> None:
    """`llama-imatrix -v -c 2048 -b 2048` of llama.cpp b11549 on such models: `llama_kv_cache: size`, summed."""
    found = kv_cache_bytes(metadata(architecture, **numbers), 2048) / 2**20
    assert found == pytest.approx(printed_mib, abs=0.006)


def test_an_open_file_is_taken_as_it_is(tmp_path: Path) -> None:
    with open_gguf(tiny_gguf.write_tiny_gguf(tmp_path / "m.gguf")) as file:
        assert kv_cache_bytes(file, 512) == 2 * 2 * 512 * 2 * 8 * 2
        assert trained_context(file) == tiny_gguf.CONTEXT_LENGTH
    assert trained_context({}) is None


@pytest.mark.parametrize("context", [0, -1, 1 << 31])
def test_a_context_that_is_no_number_of_tokens_is_refused(context: int) -> None:
    with pytest.raises(UsageError, match=repr(context)):
        kv_cache_bytes(LLAMA_8B, context)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 0),
        ("block_count", "32"),
        ("block_count", 1 << 30),
        ("attention.head_count", None),
        ("attention.head_count_kv", -8),
        ("attention.head_count_kv", [8, 8]),
        ("attention.key_length", 1 << 40),
        ("embedding_length", True),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_key(key: str, value: object) -> None:
    with pytest.raises(GGUFError, match=key):
        kv_cache_bytes({**LLAMA_8B, f"llama.{key}": value}, 4096)
