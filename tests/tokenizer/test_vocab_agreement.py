"""Vocabularies against those that llama.cpp's own converter writes for the same folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers

from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field
from ollama_forge.tokenizer.vocab import read_vocabulary, vocabulary_fields

_REFERENCE = Path(__file__).with_name("reference_vocab.py")


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, ensure_ascii=False))


def drop_template_add_files(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda document: document.pop("chat_template"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("{{ tools }}")


def list_templates(folder: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]
    change_json(folder / "tokenizer_config.json", lambda document: document.update(chat_template=named))


def add_token(folder: Path, content: str, **flags: bool) -> None:
    def change(document: Any) -> None:
        token_id = max(entry["id"] for entry in document["added_tokens"]) + 1
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
        document["added_tokens"].append({"id": token_id, "content": content, **plain, **flags})

    change_json(folder / "tokenizer.json", change)


def add_several_tokens(folder: Path) -> None:
    for content, flags in {
        "<tool>": {},
        "<|looks special|>": {},
        "two words": {"normalized": False},
        "Ġbytes": {"normalized": False},
        "Ġkept": {"normalized": True},
        "▁under": {},
        "<unused7>": {},
        "<real>": {"special": True, "normalized": False},
    }.items():
        add_token(folder, content, **flags)


def drop_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def use_merges_of_before(folder: Path) -> None:
    def change(document: Any) -> None:
        document["model"]["merges"] = [" ".join(merge) for merge in document["model"]["merges"]]

    change_json(folder / "tokenizer.json", change)


def close_with_eos(folder: Path) -> None:
    def change(document: Any) -> None:
        entry = next(token for token in document["added_tokens"] if token["content"] == "<|end_of_text|>")
        template = document["post_processor"]["processors"][1]
        template["single"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 0}})
        template["pair"].append({"SpecialToken": {"id": "<|end_of_text|>", "type_id": 1}})
        template["special_tokens"]["<|end_of_text|>"] = {
            "id": "<|end_of_text|>",
            "ids": [entry["id"]],
            "tokens": ["<|end_of_text|>"],
        }

    change_json(folder / "tokenizer.json", change)


def wrap_like_roberta(folder: Path) -> None:
    end = tiny_tokenizers.token_ids("gpt2-bpe")["<|endoftext|>"]
    pair = ["<|endoftext|>", end]
    processor = {"type": "RobertaProcessing", "sep": pair, "cls": pair, "trim_offsets": True, "add_prefix_space": False}
    change_json(folder / "tokenizer.json", lambda document: document.update(post_processor=processor))


def state_a_prefix(folder: Path) -> None:
    change_json(folder / "tokenizer_config.json", lambda document: document.update(add_prefix_space=False))


@dataclass(frozen=True)
class Case:
    kind: str
    model_type: str
    converter: str
    n_padding: int = 0
    change: Callable[[Path], None] | None = None
    config: tuple[tuple[str, Any], ...] = ()


LLAMA, QWEN2, GPT2 = "llama:LlamaModel", "qwen:Qwen2Model", "gpt2:GPT2Model"
CASES = {
    "llama3": Case("llama3-bpe", "llama", LLAMA),
    "llama3 padded": Case("llama3-bpe", "llama", LLAMA, 7),
    "llama3 through qwen3": Case("llama3-bpe", "qwen3", "qwen:Qwen3Model"),
    "llama3 with added tokens": Case("llama3-bpe", "llama", LLAMA, 30, add_several_tokens),
    "llama3 with jinja files": Case("llama3-bpe", "llama", LLAMA, 0, drop_template_add_files),
    "llama3 with listed templates": Case("llama3-bpe", "llama", LLAMA, 0, list_templates),
    "llama3 with a closing token": Case("llama3-bpe", "llama", LLAMA, 0, close_with_eos),
    "llama3 without tokenizer_config": Case("llama3-bpe", "llama", LLAMA, 0, drop_config),
    "llama3 with the size of granite": Case("llama3-bpe", "llama", LLAMA, 49152 - 649),
    "qwen2": Case("qwen2-bpe", "qwen2", QWEN2),
    "qwen2 padded": Case("qwen2-bpe", "qwen2", QWEN2, 100),
    "qwen2 with old merges": Case("qwen2-bpe", "qwen2", QWEN2, 0, use_merges_of_before),
    "gpt2": Case("gpt2-bpe", "gpt2", GPT2),
    "gpt2 padded": Case("gpt2-bpe", "gpt2", GPT2, 1),
    "gpt2 like roberta": Case("gpt2-bpe", "gpt2", GPT2, 0, wrap_like_roberta),
    "llama2": Case("llama2-spm", "llama", LLAMA),
    "llama2 padded": Case("llama2-spm", "llama", LLAMA, 7),
    "llama2 too small": Case("llama2-spm", "llama", LLAMA, -50),
    "llama2 with a stated prefix": Case("llama2-spm", "llama", LLAMA, 0, state_a_prefix),
    "llama2 without tokenizer.json": Case("llama2-spm-model", "llama", LLAMA, 3),
    "llama2 without tokenizer_config": Case("llama2-spm", "llama", LLAMA, 0, drop_config),
    "code llama": Case("llama2-spm", "llama", LLAMA, 32016 - 700),
    "gemma": Case("gemma-spm", "gemma", "gemma:GemmaModel"),
    "gemma2": Case("gemma-spm", "gemma2", "gemma:Gemma2Model"),
    "gemma3": Case("gemma-spm", "gemma3_text", "gemma:Gemma3Model", 5),
    "phi3": Case("phi3-spm", "phi3", "phi:Phi3MiniModel"),
    "phi3 padded": Case("phi3-spm", "phi3", "phi:Phi3MiniModel", 64),
}


def plain_fields(fields: list[Field]) -> list[list[Any]]:
    return [
        [entry.key, entry.type.name, list(entry.value) if entry.type is ValueType.ARRAY else entry.value]
        for entry in fields
    ]


def test_keys_types_values_and_order_equal_the_converters(tmp_path: Path) -> None:
    jobs, ours = [], {}
    for number, (label, case) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        n_tokens = tiny_tokenizers.build_tokenizer(case.kind, folder)
        config = {
            "model_type": case.model_type,
            "vocab_size": n_tokens + case.n_padding,
            **tiny_tokenizers.special_ids(case.kind),
        }
        (folder / "config.json").write_text(json.dumps(config))
        if case.change:
            case.change(folder)
        vocabulary = read_vocabulary(folder, config)
        ours[label] = plain_fields(vocabulary_fields(vocabulary))
        jobs.append([str(folder), case.converter, vocabulary.pre])

    done = subprocess.run(
        [sys.executable, str(_REFERENCE)], input=json.dumps(jobs), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = dict(zip(CASES, json.loads(done.stdout), strict=True))

    wrong = {}
    for label, expected in theirs.items():
        keys = [entry[0] for entry in ours[label]]
        if keys != [entry[0] for entry in expected]:
            wrong[label] = (keys, [entry[0] for entry in expected])
        for mine, reference in zip(ours[label], expected, strict=False):
            if mine != reference:
                wrong.setdefault(label, _first_difference(mine, reference))
    assert wrong == {}


def _first_difference(mine: list[Any], reference: list[Any]) -> Any:
    if isinstance(mine[2], list) and isinstance(reference[2], list) and mine[:2] == reference[:2]:
        pairs = enumerate(zip(mine[2], reference[2], strict=False))
        return mine[0], len(mine[2]), len(reference[2]), [entry for entry in pairs if entry[1][0] != entry[1][1]][:5]
    return mine, reference


@pytest.mark.parametrize("kind", ["llama2-spm", "gemma-spm"])
def test_scores_from_tokenizer_json_order_merges_as_the_model_does(tmp_path: Path, kind: str) -> None:
    tiny_tokenizers.build_tokenizer(kind, tmp_path)
    config = {"model_type": "llama", **tiny_tokenizers.special_ids(kind)}
    from_model = read_vocabulary(tmp_path, config)
    (tmp_path / "tokenizer.model").unlink()
    from_json = read_vocabulary(tmp_path, config)

    assert from_json.tokens == from_model.tokens
    assert from_json.types == from_model.types
    assert from_json.scores is not None and from_model.scores is not None
    if kind == "llama2-spm":
        assert from_json.scores == from_model.scores
    pieces = [
        number for number, token in enumerate(from_model.tokens) if from_model.types[number] == 1 and len(token) > 1
    ]
    by_model = sorted(pieces, key=lambda number: from_model.scores[number])
    by_json = sorted(pieces, key=lambda number: from_json.scores[number])
    assert by_json == by_model
