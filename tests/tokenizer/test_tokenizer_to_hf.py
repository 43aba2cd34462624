"""A GGUF tokenizer as a Hugging Face folder: transformers gives the engine's ids, and reading it back loses nothing."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_tokenizers
from awkward_texts import AWKWARD_TEXTS
from test_token_ids import FAMILIES, special_texts, write_model
from transformers import AutoTokenizer

from ollama_forge.engine import open_engine
from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.tokenizer.pretokenizer import PRETOKENIZERS
from ollama_forge.tokenizer.to_hf import TokenizerFiles, plan_tokenizer_files
from ollama_forge.tokenizer.vocab import Vocabulary, read_vocabulary, vocabulary_fields

EXTRA_ROWS = 3


def vocabulary_of(kind: str, folder: Path) -> Vocabulary:
    n_tokens = tiny_tokenizers.build_tokenizer(kind, folder)
    config = {"model_type": FAMILIES[kind], **tiny_tokenizers.special_ids(kind)}
    return read_vocabulary(folder, config, n_tokens + EXTRA_ROWS)


def metadata_of(vocabulary: Vocabulary) -> dict[str, Any]:
    return {entry.key: entry.value for entry in vocabulary_fields(vocabulary)}


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, (tuple, list)) else value for key, value in metadata.items()}


def write(files: TokenizerFiles, folder: Path, config: Mapping[str, Any]) -> Path:
    for name, content in {**files.files, "config.json": json.dumps(config).encode()}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_gives_the_ids_of_the_engine(kind: str, tmp_path: Path) -> None:
    vocabulary = vocabulary_of(kind, tmp_path)
    fields = vocabulary_fields(vocabulary)
    write_model(tmp_path / "m.gguf", fields, len(vocabulary.tokens), "phi-3" if kind == "phi3-spm" else "tiny")
    metadata = metadata_of(vocabulary) | {"general.name": "phi-3" if kind == "phi3-spm" else "tiny"}
    files = plan_tokenizer_files(metadata, 4096)
    assert files.warnings == ()
    model_type = FAMILIES[kind]
    tokenizer = AutoTokenizer.from_pretrained(write(files, tmp_path / "out", {"model_type": model_type}))
    texts = AWKWARD_TEXTS + special_texts(kind)
    if model_type == "qwen2":  # transformers 5 builds this class anew, and composes characters first
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    with open_engine(tmp_path / "m.gguf", context_length=64, n_threads=1) as engine:
        for text in texts:
            assert tokenizer.encode(text, add_special_tokens=False) == engine.tokenize(text), text
        for text in ("", "Hello"):
            assert tokenizer.encode(text) == engine.tokenize(text, add_special=True), text
    assert tokenizer.model_max_length == 4096
    assert tokenizer.chat_template == vocabulary.chat_template
    for role in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{role}_token") == vocabulary.text_of(role)


@pytest.mark.parametrize("kind", FAMILIES)
def test_text_survives_there_and_back(kind: str, tmp_path: Path) -> None:
    files = plan_tokenizer_files(metadata_of(vocabulary_of(kind, tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(write(files, tmp_path / "out", {"model_type": FAMILIES[kind]}))
    for text in ("Hello, world!  It's 5.", "Größe\n\nund 今日は🚀", "a\tb"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_folder_reads_back_as_the_same_vocabulary(kind: str, tmp_path: Path) -> None:
    before = metadata_of(vocabulary_of(kind, tmp_path))
    config = {"model_type": FAMILIES[kind], **tiny_tokenizers.special_ids(kind)}
    folder = write(plan_tokenizer_files(before), tmp_path / "out", config)
    after = metadata_of(read_vocabulary(folder, config, len(before["tokenizer.ggml.tokens"])))
    assert plain(after) == plain(before)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if "spm" in kind or "gemma" in kind])
def test_sentencepiece_reads_the_model_file_and_agrees(kind: str, tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of(kind, tmp_path))
    ours = build_tokenizer(metadata)
    content = plan_tokenizer_files(metadata).files["tokenizer.model"]
    reference = sentencepiece.SentencePieceProcessor(model_proto=content)
    assert len(reference) == ours.n_tokens - EXTRA_ROWS
    for text in (text for text in AWKWARD_TEXTS if "▁" not in text and "\x00" not in text):
        assert reference.encode(text) == ours.encode(text, parse_special=False), text


def test_repeated_scores_are_told(tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("llama2-spm", tmp_path))
    scores = [-1000.0] * len(metadata["tokenizer.ggml.scores"])
    (warning,) = plan_tokenizer_files(metadata | {"tokenizer.ggml.scores": scores}).warnings
    assert "same score" in warning


@pytest.mark.parametrize("row", PRETOKENIZERS, ids=lambda row: row.name)
def test_every_pretokenizer_keeps_its_name_or_says_that_it_cannot(row: Any, tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("gpt2-bpe", tmp_path)) | {"tokenizer.ggml.pre": row.name}
    files = plan_tokenizer_files(metadata)
    config = {"model_type": "gpt2", **tiny_tokenizers.special_ids("gpt2-bpe")}
    folder = write(files, tmp_path / "out", config)
    found = read_name(folder, config, len(metadata["tokenizer.ggml.tokens"]))
    lost = [warning for warning in files.warnings if "does not convert back" in warning]
    # some names need more of the file than its splits: added tokens, a normalizer
    assert (found == row.name) != bool(lost)
    assert not lost or row.applies is not None


def read_name(folder: Path, config: Mapping[str, Any], n_tokens: int) -> str | None:
    try:
        return read_vocabulary(folder, config, n_tokens).pre
    except TokenizerError:
        return None


def test_templates_with_names_have_files_of_their_own(tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("qwen2-bpe", tmp_path))
    named = {"tokenizer.chat_template.tool_use": "{{ tools }}", "tokenizer.chat_templates": ["tool_use"]}
    files = plan_tokenizer_files(metadata | named)
    assert files.files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    config = {"model_type": "qwen2", **tiny_tokenizers.special_ids("qwen2-bpe")}
    folder = write(files, tmp_path / "out", config)
    after = metadata_of(read_vocabulary(folder, config, len(metadata["tokenizer.ggml.tokens"])))
    assert after["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert AutoTokenizer.from_pretrained(folder).chat_template == {
        "default": metadata["tokenizer.chat_template"],
        "tool_use": "{{ tools }}",
    }


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", ".", "x" * 100])
def test_a_template_whose_name_leads_elsewhere_gets_no_file(name: str, tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("qwen2-bpe", tmp_path))
    files = plan_tokenizer_files(metadata | {f"tokenizer.chat_template.{name}": "evil"})
    assert sorted(files.files) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert "left out" in files.warnings[0]


def test_a_template_with_other_line_ends_keeps_them(tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("qwen2-bpe", tmp_path)) | {"tokenizer.chat_template": "a\r\n{{ b }}\r"}
    config = {"model_type": "qwen2", **tiny_tokenizers.special_ids("qwen2-bpe")}
    folder = write(plan_tokenizer_files(metadata), tmp_path / "out", config)
    assert read_vocabulary(folder, config, len(metadata["tokenizer.ggml.tokens"])).chat_template == "a\r\n{{ b }}\r"


def test_an_end_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("llama3-bpe", tmp_path)) | {"tokenizer.ggml.add_eos_token": True}
    folder = write(plan_tokenizer_files(metadata), tmp_path / "out", {"model_type": "llama"})
    wanted = build_tokenizer(metadata).encode("Hello", add_special=True)
    assert AutoTokenizer.from_pretrained(folder).encode("Hello") == wanted


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    metadata = metadata_of(vocabulary_of("llama2-spm", tmp_path))
    with pytest.raises(TokenizerError, match="'t5'"):
        plan_tokenizer_files(metadata | {"tokenizer.ggml.model": "t5"})
