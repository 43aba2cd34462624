"""Rows of two tokenizers side by side: labels stay only where both stand at the same letter of the same answer."""

from __future__ import annotations

import pytest
from conversations import chat_format, example

from ollama_forge.dataset.align import align_rows
from ollama_forge.dataset.render import NOT_LEARNT
from ollama_forge.dataset.tokenize import tokenize_examples
from ollama_forge.tokenizer.compare import match_vocabularies
from ollama_forge.tokenizer.decode import decode_tokens

TALK = example(
    ("user", "Grüße aus Köln?"),
    ("assistant", "In 1999 there were 365 days, 12 months and 8,760 hours; für die Straße."),
    ("user", "And then?"),
    ("assistant", "今天天气很好。 The end."),
)
PAIRS = [
    ("llama3-bpe", "qwen2-bpe"),
    ("qwen2-bpe", "llama2-spm"),
    ("gemma-spm", "llama3-bpe"),
    ("llama2-spm", "gemma-spm"),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_both_have_read_the_same_part_of_the_answer_at_each_common_place(ours: str, theirs: str) -> None:
    formats = [chat_format(kind) for kind in (ours, theirs)]
    rows = [tokenize_examples([TALK], each, max_length=512).rows for each in formats]
    (found,) = align_rows(rows[0], rows[1], formats[0].tokenizer, formats[1].tokenizer)
    labelled = [place for place, label in enumerate(found.student.labels) if label != NOT_LEARNT]
    assert len(labelled) == len(found.places) >= 12
    assert list(found.teacher_ids) == list(rows[1][0].input_ids)
    for place, other in zip(labelled, found.places, strict=True):
        said = [
            decode_tokens(each.tokenizer, _answer_before(row, at)).lstrip(" ")
            for each, row, at in ((formats[0], rows[0][0], place), (formats[1], rows[1][0], other))
        ]
        assert said[0] == said[1]


def _answer_before(row: object, place: int) -> list[int]:
    """Tokens of the answer that stands at `place`, up to it."""
    labels, ids = row.labels, row.input_ids  # type: ignore[attr-defined]
    start = place
    while start > 0 and labels[start - 1] != NOT_LEARNT:
        start -= 1
    return list(ids[start:place])


def test_a_model_with_the_same_tokenizer_meets_itself_everywhere() -> None:
    one = chat_format("llama3-bpe")
    rows = tokenize_examples([TALK], one, max_length=512).rows
    (found,) = align_rows(rows, rows, one.tokenizer, one.tokenizer)
    assert found.student.labels == rows[0].labels
    assert list(found.places) == [place for place, label in enumerate(rows[0].labels) if label != NOT_LEARNT]


def test_an_example_that_only_one_of_them_kept_is_left_out() -> None:
    one = chat_format("llama3-bpe")
    rows = tokenize_examples([TALK], one, max_length=512).rows
    assert align_rows(rows, [], one.tokenizer, one.tokenizer) == []


def test_vocabularies_match_up_to_unused_words_at_the_end() -> None:
    words = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": ["a", "b", "c"]}
    padded = {**words, "tokenizer.ggml.tokens": ["a", "b", "c", "[PAD3]"], "tokenizer.ggml.token_type": [1, 1, 1, 5]}
    assert match_vocabularies(words, padded).n_words == match_vocabularies(padded, words).n_words == 3
    longer = {**padded, "tokenizer.ggml.token_type": [1, 1, 1, 1]}
    assert "3 and 4 words" in match_vocabularies(words, longer).difference
    other = {**words, "tokenizer.ggml.tokens": ["a", "c", "b"]}
    assert match_vocabularies(words, other).difference == "word 1 is 'b' in one and 'c' in the other"
    assert "'gpt2' and 'llama'" in match_vocabularies(words, {**words, "tokenizer.ggml.model": "llama"}).difference
    merged = {**words, "tokenizer.ggml.merges": ["a b"]}
    assert "another order" in match_vocabularies(words, merged).difference
    assert not match_vocabularies({}, {}).is_same
