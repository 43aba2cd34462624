"""What reading a vocabulary does where the converter has no say, and its errors."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from tokenizers import models

from ollama_forge.errors import NotFoundError, TokenizerError
from ollama_forge.gguf.writer import Field
from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.vocab import Vocabulary, read_vocabulary, vocabulary_fields


def build(folder: Path, kind: str, **config: Any) -> dict[str, Any]:
    tiny_tokenizers.build_tokenizer(kind, folder)
    return {"model_type": "llama", **tiny_tokenizers.special_ids(kind), **config}


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False))


def value_of(vocabulary: Vocabulary, key: str) -> Any:
    found: list[Field] = [entry for entry in vocabulary_fields(vocabulary) if entry.key == key]
    return found[0].value if found else None


def test_rows_beyond_the_tokenizer_are_unused(tmp_path: Path) -> None:
    config = build(tmp_path, "llama2-spm-json")
    vocabulary = read_vocabulary(tmp_path, config, 710)
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(vocabulary.scores or ()) == 710
    assert vocabulary.tokens[-1] == "[PAD709]" and vocabulary.types[-1] == TokenType.UNUSED


def test_config_of_a_model_that_also_sees_is_looked_into(tmp_path: Path) -> None:
    config = build(tmp_path, "gemma-spm")
    nested = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "vocab_size": 765}}
    vocabulary = read_vocabulary(tmp_path, nested | {"eos_token_id": config["eos_token_id"]})
    assert len(vocabulary.tokens) == 765
    assert vocabulary.add_space_prefix is False


def test_json_of_gemma_says_that_no_space_goes_in_front(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, build(tmp_path, "gemma-json"))
    assert value_of(vocabulary, "tokenizer.ggml.add_space_prefix") is False


def test_added_tokens_of_a_fine_tune_are_kept_without_tokenizer_config(tmp_path: Path) -> None:
    config = build(tmp_path, "llama2-spm")
    token = {"id": 700, "content": "<tool>", "special": False, "normalized": False}
    change_json(tmp_path / "tokenizer.json", lambda document: document["added_tokens"].append(token))
    change_json(tmp_path / "tokenizer_config.json", lambda document: document.pop("added_tokens_decoder"))
    vocabulary = read_vocabulary(tmp_path, config, 704)
    assert vocabulary.tokens[700] == "<tool>" and vocabulary.types[700] == TokenType.USER_DEFINED


def test_tokens_that_only_a_role_names_are_control_tokens(tmp_path: Path) -> None:
    config = build(tmp_path, "gpt2-bpe")
    change_json(tmp_path / "tokenizer.json", lambda document: document.update(added_tokens=[]))
    vocabulary = read_vocabulary(tmp_path, config)
    assert vocabulary.types[vocabulary.tokens.index("<|endoftext|>")] == TokenType.CONTROL


def test_no_begin_token_means_that_none_is_added(tmp_path: Path) -> None:
    build(tmp_path, "llama3-bpe")
    change_json(tmp_path / "tokenizer.json", lambda document: document.update(post_processor=None))
    change_json(tmp_path / "tokenizer_config.json", lambda document: document.pop("bos_token"))
    vocabulary = read_vocabulary(tmp_path, {"model_type": "llama"})
    assert vocabulary.special.id_of("bos") is None
    assert value_of(vocabulary, "tokenizer.ggml.add_bos_token") is False


def test_every_end_of_generation_is_known(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, build(tmp_path, "llama3-bpe"))
    ends = {vocabulary.tokens[token_id] for token_id in vocabulary.special.stop_ids}
    assert ends == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert (vocabulary.text_of("bos"), vocabulary.text_of("pad")) == ("<|begin_of_text|>", None)
    assert vocabulary.chat_template and "ipython" in vocabulary.chat_template


def test_unigram_becomes_llama_cpps_unigram(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, build(tmp_path, "t5-unigram"))
    assert vocabulary.model == "t5" and vocabulary.charsmap
    assert value_of(vocabulary, "tokenizer.ggml.remove_extra_whitespaces") is True
    assert value_of(vocabulary, "tokenizer.ggml.add_space_prefix") is True
    assert vocabulary.types[2] == TokenType.UNKNOWN
    keys = [entry.key.rpartition(".")[2] for entry in vocabulary_fields(vocabulary)]
    assert keys[:4] == ["model", "pre", "tokens", "scores"]


def test_tiktoken_file_beside_tokenizer_json_is_passed_over(tmp_path: Path) -> None:
    config = build(tmp_path, "llama3-bpe")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\n")
    assert read_vocabulary(tmp_path, config).pre == "llama-bpe"


def test_vocabulary_is_frozen(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, build(tmp_path, "gpt2-bpe"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        vocabulary.pre = "x"  # type: ignore[misc]


def test_more_tokens_than_rows_is_an_error_for_byte_level(tmp_path: Path) -> None:
    config = build(tmp_path, "qwen2-bpe", vocab_size=600)
    with pytest.raises(TokenizerError, match=r"629 tokens.*600 rows"):
        read_vocabulary(tmp_path, config)


def test_dropped_tokens_are_counted_for_sentencepiece(tmp_path: Path) -> None:
    config = build(tmp_path, "llama2-spm", vocab_size=690)
    assert read_vocabulary(tmp_path, config).n_dropped == 10


def test_merges_that_scores_cannot_say_are_refused(tmp_path: Path) -> None:
    config = build(tmp_path, "llama2-spm-json")

    def drop_one(document: Any) -> None:
        merges = document["model"]["merges"]
        results = ["".join(merge) for merge in merges]
        merges.pop(next(n for n, result in enumerate(results) if results.count(result) > 1))

    change_json(tmp_path / "tokenizer.json", drop_one)
    with pytest.raises(TokenizerError, match=r"joins .* never"):
        read_vocabulary(tmp_path, config)


def set_model(key: str, value: Any) -> Callable[[Any], None]:
    return lambda document: document["model"].update({key: value})


BROKEN = {
    "no model": lambda document: document.pop("model"),
    "vocabulary is a list": set_model("vocab", [1, 2]),
    "id is text": set_model("vocab", {"a": "x"}),
    "id is true": set_model("vocab", {"a": True}),
    "id is negative": set_model("vocab", {"a": -1}),
    "id is huge": set_model("vocab", {"a": 2_000_000_000}),
    "added id is huge": lambda document: document["added_tokens"].append({"id": 2_000_000_000, "content": "x"}),
    "two ids for one text": lambda document: document["added_tokens"].append({"id": 800, "content": "e"}),
    "merge of three": set_model("merges", [["a", "b", "c"]]),
    "merge of one": set_model("merges", ["ab"]),
    "word pieces": set_model("type", "WordPiece"),
    "other splits": lambda document: document.update(pre_tokenizer={"type": "Whitespace"}),
    "not an object": None,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tokenizer_json_is_a_clear_error(tmp_path: Path, case: str) -> None:
    config = build(tmp_path, "llama3-bpe")
    change = BROKEN[case]
    if change is None:
        (tmp_path / "tokenizer.json").write_text("[]")
    else:
        change_json(tmp_path / "tokenizer.json", change)
    with pytest.raises(TokenizerError) as caught:
        read_vocabulary(tmp_path, config)
    assert caught.value.next


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "\x00", '"text"'])
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json"]
)
def test_files_that_are_not_json_objects_are_named(tmp_path: Path, name: str, content: str) -> None:
    config = build(tmp_path, "gpt2-bpe")
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        read_vocabulary(tmp_path, config)


@pytest.mark.parametrize("size", [0, -3, "many", 1 << 40, True, 2.5])
def test_impossible_vocab_size_is_refused_before_anything_is_made(tmp_path: Path, size: Any) -> None:
    config = build(tmp_path, "gpt2-bpe", vocab_size=size)
    if size == 0:
        assert len(read_vocabulary(tmp_path, config).tokens) == 512
        return
    with pytest.raises(TokenizerError, match=r"vocab_size|tokens"):
        read_vocabulary(tmp_path, config)


def test_folder_without_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="neither") as caught:
        read_vocabulary(tmp_path, {})
    assert "save_pretrained" in caught.value.next
    with pytest.raises(NotFoundError):
        read_vocabulary(tmp_path / "nothing", {})


def test_merges_of_the_model_are_all_written(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, build(tmp_path, "gpt2-bpe"))
    _, merges = models.BPE.read_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert [tuple(line.split(" ")) for line in vocabulary.merges] == merges
