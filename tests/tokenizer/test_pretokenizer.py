"""llama.cpp's pre-tokenizer names, from what tokenizer.json files say."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from tokenizers import Regex, pre_tokenizers

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.pretokenizer import (
    PRETOKENIZERS,
    canonical_pattern,
    detect_pretokenizer,
    find_pretokenizer,
    is_sentencepiece_like,
    llama_patterns,
)

LLAMA3 = tiny_tokenizers.LLAMA3_SPLIT
QWEN2 = tiny_tokenizers.QWEN2_SPLIT
DIGITS = {"type": "Digits", "individual_digits": True}
PLAIN_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLITTING_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


def document(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    added = [{"id": n, "content": content} for n, content in enumerate(more.pop("added", []))]
    model = {"type": "BPE", "ignore_merges": more.pop("ignore_merges", False)}
    node = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)}
    return {"model": model, "pre_tokenizer": node, "added_tokens": added, **more}


ROBERTA = {"type": "RobertaProcessing"}
GPT4O = next(row.splits[0] for row in PRETOKENIZERS if row.name == "gpt-4o")
TEKKEN = next(row.splits[0] for row in PRETOKENIZERS if row.name == "tekken")
DEEPSEEK3 = next(row.splits for row in PRETOKENIZERS if row.name == "deepseek-v3")

KNOWN = {
    "gpt-2": document(SPLITTING_BYTES),
    "gpt-2 (composing)": document(SPLITTING_BYTES, normalizer={"type": "NFC"}),
    "roberta-bpe": document(SPLITTING_BYTES, post_processor=ROBERTA),
    "llama-bpe": document(split(LLAMA3), PLAIN_BYTES, ignore_merges=True),
    "llama-bpe (removed gaps)": document(split(LLAMA3, "Removed", True), PLAIN_BYTES, ignore_merges=True),
    "dbrx": document(split(LLAMA3), PLAIN_BYTES),
    "glm4": document(split(LLAMA3), PLAIN_BYTES, ignore_merges=True, added=["[gMASK]", "<sop>", "<|user|>"]),
    "qwen2": document(split(QWEN2), PLAIN_BYTES, normalizer={"type": "NFC"}),
    "qwen35": document(
        split(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        PLAIN_BYTES,
    ),
    "smollm": document(DIGITS, SPLITTING_BYTES),
    "starcoder": document(DIGITS, SPLITTING_BYTES, added=["<fim_prefix>"]),
    "command-r": document(DIGITS, SPLITTING_BYTES, normalizer={"type": "NFC"}),
    "falcon": document(
        {"type": "Punctuation", "behavior": "Contiguous"},
        SPLITTING_BYTES,
        {"type": "Digits", "individual_digits": False},
        split("[0-9][0-9][0-9]"),
    ),
    "deepseek-coder": document(
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), DIGITS, PLAIN_BYTES
    ),
    "deepseek-v3": document(*(split(step.replace(r"\r\n", "\r\n")) for step in DEEPSEEK3), PLAIN_BYTES),
    "tekken": document(split(TEKKEN), PLAIN_BYTES, ignore_merges=True),
    "gpt-4o": document(split(GPT4O), PLAIN_BYTES),
    "bloom": document(split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), PLAIN_BYTES),
}


@pytest.mark.parametrize("case", KNOWN)
def test_name_follows_from_regexes_and_flags(case: str) -> None:
    assert detect_pretokenizer(KNOWN[case]) == case.split(" (")[0]


@pytest.mark.parametrize("case", KNOWN)
def test_added_tokens_of_a_fine_tune_change_nothing(case: str) -> None:
    changed = json.loads(json.dumps(KNOWN[case]))
    changed["added_tokens"] += [{"id": 900, "content": "<my_token>"}, {"id": 901, "content": "<|im_start|>"}]
    assert detect_pretokenizer(changed) == case.split(" (")[0]


@pytest.mark.parametrize(
    "spelling",
    [
        LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"),
        LLAMA3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"),
        LLAMA3.replace(r"\r\n", "\r\n"),
        LLAMA3.replace(r"\p{N}]?\p", r"\p{N}]?+\p").replace(r"\p{N}]+[", r"\p{N}]++["),
    ],
)
def test_spellings_of_one_regex_are_one(spelling: str) -> None:
    assert spelling != LLAMA3
    assert detect_pretokenizer(document(split(spelling), PLAIN_BYTES, ignore_merges=True)) == "llama-bpe"


@pytest.mark.parametrize(("kind", "name"), [("llama3-bpe", "llama-bpe"), ("qwen2-bpe", "qwen2"), ("gpt2-bpe", "gpt-2")])
def test_files_written_by_tokenizers_are_recognised(tmp_path: Path, kind: str, name: str) -> None:
    tiny_tokenizers.build_tokenizer(kind, tmp_path)
    assert detect_pretokenizer(json.loads((tmp_path / "tokenizer.json").read_text())) == name


@pytest.mark.parametrize("kind", ["llama2-spm", "gemma-spm", "phi3-spm", "t5-unigram"])
def test_sentencepiece_has_the_default_name(tmp_path: Path, kind: str) -> None:
    tiny_tokenizers.build_tokenizer(kind, tmp_path)
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    assert is_sentencepiece_like(parsed)
    assert detect_pretokenizer(parsed) == "default"


@pytest.mark.parametrize(
    "unknown",
    [
        document(split(r"\w+"), PLAIN_BYTES),
        document(split(LLAMA3), split(r"\d"), PLAIN_BYTES),
        document(split(LLAMA3, "MergedWithNext"), PLAIN_BYTES),
        document(split(r"\p{L}+", "Removed", True), PLAIN_BYTES),
        document({"type": "Punctuation", "behavior": "Isolated"}, SPLITTING_BYTES),
        document({"type": "WhitespaceSplit"}, PLAIN_BYTES),
    ],
)
def test_unknown_split_is_an_error_that_shows_it(unknown: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError) as caught:
        detect_pretokenizer(unknown)
    assert "does not implement" in caught.value.what and "\n  " in caught.value.what
    assert caught.value.why and caught.value.next


@pytest.mark.parametrize(
    "broken", [{}, {"pre_tokenizer": 3}, {"pre_tokenizer": {"type": "Sequence", "pretokenizers": {}}}]
)
def test_broken_documents_are_errors_too(broken: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError):
        detect_pretokenizer({"model": {"type": "BPE"}, **broken})


def test_every_row_is_written_in_canonical_form_and_compiles() -> None:
    for row in PRETOKENIZERS:
        for pattern in row.splits:
            assert canonical_pattern(pattern) == pattern
        for pattern in llama_patterns(row):
            pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    "alias", ["llama-v3", "smaug-bpe", "stablelm2", "olmo", "refact", "chatglm-bpe", "default", ""]
)
def test_names_of_older_files_are_known(alias: str) -> None:
    assert find_pretokenizer(alias) is not None


def test_a_name_that_nobody_knows_is_not_guessed() -> None:
    assert find_pretokenizer("kimi-k2") is None
