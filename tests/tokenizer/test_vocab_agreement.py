"""Vocabularies against those that llama.cpp's own converter writes for the same folder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field
from ollama_forge.tokenizer.vocab import read_vocabulary, vocabulary_fields

_REFERENCE = Path(__file__).with_name("reference_vocab.py")


def reference_fields(folder: Path, converter: str, pre: str) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, str(_REFERENCE), str(folder), converter, pre], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def plain_fields(fields: list[Field]) -> list[list[Any]]:
    def plain(entry: Field) -> Any:
        return list(entry.value) if entry.type is ValueType.ARRAY else entry.value

    return [[entry.key, entry.type.name, None, plain(entry)] for entry in fields]


def write_config(folder: Path, kind: str, model_type: str, n_rows: int, **more: Any) -> dict[str, Any]:
    config = {"model_type": model_type, "vocab_size": n_rows, **tiny_tokenizers.special_ids(kind), **more}
    (folder / "config.json").write_text(json.dumps(config))
    return config


AGREEING = [
    ("llama3-bpe", "llama", "llama:LlamaModel"),
    ("qwen2-bpe", "qwen2", "qwen:Qwen2Model"),
    ("gpt2-bpe", "gpt2", "gpt2:GPT2Model"),
    ("llama2-spm", "llama", "llama:LlamaModel"),
    ("llama2-spm", "mistral", "llama:LlamaModel"),
    ("llama2-spm-model", "llama", "llama:LlamaModel"),
    ("gemma-spm", "gemma2", "gemma:Gemma2Model"),
    ("gemma-spm", "gemma3_text", "gemma:Gemma3Model"),
    ("phi3-spm", "phi3", "phi:Phi3MiniModel"),
    ("llama3-bpe", "qwen3", "qwen:Qwen3Model"),
]


@pytest.mark.parametrize("n_padding", [0, 7])
@pytest.mark.parametrize(("kind", "model_type", "converter"), AGREEING)
def test_keys_types_values_and_order_equal_the_converters(
    tmp_path: Path, kind: str, model_type: str, converter: str, n_padding: int
) -> None:
    n_tokens = tiny_tokenizers.build_tokenizer(kind, tmp_path)
    config = write_config(tmp_path, kind, model_type, n_tokens + n_padding)
    vocabulary = read_vocabulary(tmp_path, config)

    written = plain_fields(vocabulary_fields(vocabulary))
    expected = reference_fields(tmp_path, converter, vocabulary.pre)

    assert [entry[0] for entry in written] == [entry[0] for entry in expected]
    for ours, theirs in zip(written, expected, strict=True):
        assert ours[:2] == theirs[:2]
        assert ours[3] == theirs[3], ours[0]
