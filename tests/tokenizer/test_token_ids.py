"""Token ids of awkward texts: transformers on the folder, llama.cpp on our GGUF, and our own encoder, all equal."""

import json
import random
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
from awkward_texts import AWKWARD_TEXTS, texts_with
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ollama_forge.engine import open_engine
from ollama_forge.files import atomic_output
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import Field, TensorEntry, float32, string, uint32, write_gguf
from ollama_forge.tokenizer.encode import build_tokenizer
from ollama_forge.tokenizer.pretokenizer import PRETOKENIZERS
from ollama_forge.tokenizer.vocab import read_vocabulary, vocabulary_fields

WIDTH = 32
FAMILIES = {
    "llama3-bpe": "llama",
    "qwen2-bpe": "qwen2",
    "gpt2-bpe": "gpt2",
    "llama2-spm": "llama",
    "llama2-spm-json": "llama",
    "gemma-spm": "gemma2",
    "gemma-json": "gemma3_text",
    "phi3-spm": "phi3",
}


def write_model(path: Path, tokenizer_fields: list[Field], n_tokens: int, name: str) -> None:
    """A llama of zeros around a vocabulary."""
    fields = [
        string("general.architecture", "llama"),
        string("general.name", name),
        *(uint32(f"llama.{key}", value) for key, value in (("block_count", 1), ("context_length", 64))),
        *(uint32(f"llama.{key}", WIDTH) for key in ("embedding_length", "feed_forward_length")),
        *(uint32(f"llama.attention.{key}", 1) for key in ("head_count", "head_count_kv")),
        float32("llama.attention.layer_norm_rms_epsilon", 1e-5),
        uint32("llama.rope.dimension_count", WIDTH),
        *tokenizer_fields,
    ]
    shapes = {"token_embd.weight": (n_tokens, WIDTH), "output_norm.weight": (WIDTH,)}
    shapes |= {f"blk.0.{part}_norm.weight": (WIDTH,) for part in ("attn", "ffn")}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{part}.weight": (WIDTH, WIDTH) for part in parts}

    def entry(name: str, shape: tuple[int, ...]) -> TensorEntry:
        n_elements = 1
        for dimension in shape:
            n_elements *= dimension
        return TensorEntry(name, shape, GGMLType.F32, lambda: [bytes(4 * n_elements)])

    with atomic_output(path) as sink:
        write_gguf(sink, fields, [entry(name, shape) for name, shape in shapes.items()])


def build_gguf(folder: Path, kind: str) -> Path:
    n_tokens = tiny_tokenizers.build_tokenizer(kind, folder)
    vocabulary = read_vocabulary(folder, {"model_type": FAMILIES[kind], **tiny_tokenizers.special_ids(kind)}, n_tokens)
    path = folder / "model.gguf"
    write_model(path, vocabulary_fields(vocabulary), n_tokens, "phi-3" if kind == "phi3-spm" else "tiny")
    return path


def special_texts(kind: str) -> list[str]:
    roles = {
        key: token for key, token in tiny_tokenizers.token_ids(kind).items() if key.startswith("<") and len(key) > 2
    }
    tokens = [token for token in roles if not token.startswith(("<0x", "<unused", "<table", "</t", "<|res", "<|pl"))]
    return texts_with(sorted(tokens)[:6])


def reference_tokenizer(folder: Path, kind: str) -> Any:
    """transformers' tokenizer; for Llama's the one of tokenizer.json, which adds its space before a space too.

    transformers 5 builds LlamaTokenizer anew and leaves that space out, unlike version 4 and SentencePiece itself.
    """
    return (PreTrainedTokenizerFast if "spm" in kind and "gemma" not in kind else AutoTokenizer).from_pretrained(folder)


def comparable_texts(kind: str) -> list[str]:
    texts = AWKWARD_TEXTS + special_texts(kind)
    if kind == "qwen2-bpe":  # its normalizer composes characters; llama.cpp leaves that to the caller
        return [unicodedata.normalize("NFC", text) for text in texts]
    if kind.startswith("gemma"):  # in GGUF its token of two spaces is two spaces, not two U+2581
        return [text for text in texts if "▁▁" not in text]
    return texts


def differences(texts: list[str], **encoders: Any) -> list[tuple[str, dict[str, list[int]]]]:
    found = []
    for text in texts:
        ids = {name: list(encode(text)) for name, encode in encoders.items()}
        if len({tuple(value) for value in ids.values()}) > 1:
            found.append((text, ids))
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_ids_equal_those_of_transformers_and_of_the_engine(tmp_path: Path, kind: str) -> None:
    path = build_gguf(tmp_path, kind)
    texts = comparable_texts(kind)
    assert len(texts) >= 200
    transformers_tokenizer = reference_tokenizer(tmp_path, kind)
    with open_gguf(path) as source:
        ours = build_tokenizer(source.metadata)
    with open_engine(path, context_length=64) as engine:
        found = differences(
            texts,
            transformers=lambda text: transformers_tokenizer.encode(text, add_special_tokens=False),
            engine=lambda text: engine.tokenize(text, parse_special=True),
            ours=ours.encode,
        )
        plain = differences(
            special_texts(kind),
            engine=lambda text: engine.tokenize(text, parse_special=False),
            ours=lambda text: ours.encode(text, parse_special=False),
        )
        around = differences(
            ["", "Hello"],
            engine=lambda text: engine.tokenize(text, add_special=True),
            ours=lambda text: ours.encode(text, add_special=True),
        )
    assert (found, plain, around) == ([], [], [])


def test_repeated_scores_are_merged_from_the_left_as_the_engine_does(tmp_path: Path) -> None:
    n_tokens = tiny_tokenizers.build_tokenizer("llama2-spm", tmp_path)
    vocabulary = read_vocabulary(tmp_path, {"model_type": "llama", **tiny_tokenizers.special_ids("llama2-spm")})
    path = tmp_path / "model.gguf"
    write_model(path, vocabulary_fields(replace(vocabulary, scores=(-1000.0,) * n_tokens)), n_tokens, "tiny")
    with open_gguf(path) as source:
        ours = build_tokenizer(source.metadata)
    texts = AWKWARD_TEXTS + special_texts("llama2-spm")
    with open_engine(path, context_length=64) as engine:
        assert differences(texts, engine=engine.tokenize, ours=ours.encode) == []


def random_texts(seed: int, n_texts: int) -> list[str]:
    choose = random.Random(seed)
    alphabet = (
        "aAbBzZ0123456789'sStTmMdDlLrReEvV   \n\r\t.,!?-_/()$#é\u0301ßÄΩдЖ今日はㅎ한שمनि🚀\u200d½Ⅷ٣\u3000\xa0ǅʰªα"
    )
    return ["".join(choose.choice(alphabet) for _ in range(choose.randrange(1, 30))) for _ in range(n_texts)]


@pytest.fixture(scope="module")
def words_of_any_kind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, list[str]]:
    """A vocabulary trained on whole texts, whose tokens cross every border that a pre-tokenizer could draw."""
    folder = tmp_path_factory.mktemp("any")
    texts = AWKWARD_TEXTS + random_texts(5, 300)
    tiny_tokenizers.build_tokenizer("gpt2-bpe", folder)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=6000, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    trained.train_from_iterator(texts * 2, trainer)
    model = json.loads(trained.to_str())["model"]
    document = json.loads((folder / "tokenizer.json").read_text())
    end = len(model["vocab"])
    document["model"] |= {"vocab": {**model["vocab"], "<|endoftext|>": end}, "merges": model["merges"]}
    document["added_tokens"][0]["id"] = end
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return folder, end + 1, texts


@pytest.mark.slow
@pytest.mark.parametrize("pre", ["default", *(row.name for row in PRETOKENIZERS)])
def test_every_pretokenizer_splits_as_the_engine_does(
    tmp_path: Path, words_of_any_kind: tuple[Path, int, list[str]], pre: str
) -> None:
    folder, n_tokens, texts = words_of_any_kind
    config = {"model_type": "gpt2", "bos_token_id": n_tokens - 1, "eos_token_id": n_tokens - 1}
    vocabulary = replace(read_vocabulary(folder, config), pre=pre)
    path = tmp_path / "model.gguf"
    write_model(path, vocabulary_fields(vocabulary), n_tokens, "tiny")
    with open_gguf(path) as source:
        ours = build_tokenizer(source.metadata)
    with open_engine(path, context_length=64) as engine:
        assert differences(texts, engine=engine.tokenize, ours=ours.encode) == []
