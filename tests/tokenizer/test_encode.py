"""The encoder that needs nothing but a GGUF's metadata: its two ways through SentencePiece, its offsets, its errors."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiny_tokenizers
from awkward_texts import AWKWARD_TEXTS
from hypothesis import given, settings
from hypothesis import strategies as st

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.encode import GGUFTokenizer, build_tokenizer
from ollama_forge.tokenizer.score_merge import ScoreMerger
from ollama_forge.tokenizer.vocab import read_vocabulary, vocabulary_fields

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n▁aehntoi's.123-é今🚀")), max_size=60
)


def metadata_of(kind: str, folder: Path, model_type: str = "llama") -> dict[str, Any]:
    n_tokens = tiny_tokenizers.build_tokenizer(kind, folder)
    config = {"model_type": model_type, **tiny_tokenizers.special_ids(kind)}
    return {entry.key: entry.value for entry in vocabulary_fields(read_vocabulary(folder, config, n_tokens))}


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_tokenizers.build_tokenizer("llama2-spm", folder)
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> GGUFTokenizer:
    return build_tokenizer(metadata_of("llama2-spm", llama_folder))


@pytest.fixture(scope="module")
def merger(llama_folder: Path) -> ScoreMerger:
    metadata = metadata_of("llama2-spm", llama_folder)
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    return ScoreMerger({token: n for n, token in enumerate(tokens)}, scores, frozenset(), True)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_merges_and_scores_give_the_same_ids(llama: GGUFTokenizer, merger: ScoreMerger, text: str) -> None:
    by_scores = [token_id for token_id, _, _ in merger.split_gaps(text, [])]
    assert llama.encode(text, parse_special=False) == by_scores


@settings(max_examples=300, deadline=None)
@given(text=TEXTS.filter(lambda text: "▁" not in text and "\x00" not in text))
def test_ids_equal_sentencepieces_own(llama: GGUFTokenizer, llama_folder: Path, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    assert llama.encode(text, parse_special=False) == reference.encode(text)


@pytest.mark.parametrize("kind", ["llama3-bpe", "qwen2-bpe", "gpt2-bpe", "llama2-spm", "gemma-spm"])
def test_offsets_cover_the_text_in_order(tmp_path: Path, kind: str) -> None:
    tokenizer = build_tokenizer(metadata_of(kind, tmp_path, "gemma2" if "gemma" in kind else "llama"))
    for text in AWKWARD_TEXTS:
        placed = tokenizer.encode_offsets(text)
        assert [token_id for token_id, _, _ in placed] == tokenizer.encode(text)
        covered = set()
        last_start = 0
        for _, start, end in placed:
            assert last_start <= start <= end <= len(text)
            last_start = start
            covered.update(range(start, end))
        assert covered == set(range(len(text)))


def test_offsets_of_the_exact_merger_are_the_same(llama: GGUFTokenizer, merger: ScoreMerger) -> None:
    for text in AWKWARD_TEXTS:
        assert list(merger.split_gaps(text, [])) == llama.encode_offsets(text, parse_special=False), text


def test_begin_and_end_are_added_when_the_file_says_so(tmp_path: Path) -> None:
    metadata = metadata_of("llama3-bpe", tmp_path)
    bos, eos = metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    plain = build_tokenizer(metadata)
    ids = plain.encode("Hello")
    assert plain.encode("Hello", add_special=True) == [bos, *ids]
    both = build_tokenizer(metadata | {"tokenizer.ggml.add_eos_token": True})
    assert both.encode("Hello", add_special=True) == [bos, *ids, eos]
    neither = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False})
    assert neither.encode("Hello", add_special=True) == ids


def test_special_tokens_are_text_when_they_are_not_to_be_parsed(tmp_path: Path) -> None:
    metadata = metadata_of("qwen2-bpe", tmp_path)
    tokenizer = build_tokenizer(metadata)
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert tokenizer.encode("a<|im_end|>b")[1] == end
    assert end not in tokenizer.encode("a<|im_end|>b", parse_special=False)
    tool = tokenizer.tokens.index("<tool_call>")
    assert tool in tokenizer.encode("<tool_call>", parse_special=False)


def test_text_that_is_not_unicode_is_encoded_with_a_replacement(llama: GGUFTokenizer) -> None:
    assert llama.encode("a\ud800b") == llama.encode("a\ufffdb")


def test_metadata_of_an_open_file_will_do(tmp_path: Path) -> None:
    from test_token_ids import build_gguf

    from ollama_forge.gguf.reader import open_gguf

    path = build_gguf(tmp_path, "gpt2-bpe")
    with open_gguf(path) as source:
        tokenizer = build_tokenizer(source.metadata)
    assert tokenizer.n_tokens == 512 and tokenizer.encode("the the")


BROKEN = {
    "no tokens": {"tokenizer.ggml.tokens": None},
    "tokens are text": {"tokenizer.ggml.tokens": "abc"},
    "too few types": {"tokenizer.ggml.token_type": [1]},
    "too few scores": {"tokenizer.ggml.scores": [1.0]},
    "other kind": {"tokenizer.ggml.model": "bert"},
    "no kind": {"tokenizer.ggml.model": None},
}


@pytest.mark.parametrize("case", BROKEN)
def test_metadata_that_does_not_fit_is_refused(llama_folder: Path, case: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        build_tokenizer(metadata_of("llama2-spm", llama_folder) | BROKEN[case])
    assert caught.value.next


def test_unknown_pretokenizer_is_refused_not_guessed(tmp_path: Path) -> None:
    metadata = metadata_of("gpt2-bpe", tmp_path)
    with pytest.raises(TokenizerError, match="kimi-k2"):
        build_tokenizer(metadata | {"tokenizer.ggml.pre": "kimi-k2"})
