"""Texts are cut as llama.cpp's perplexity tool cuts them, and prompts are shown as the engine shows them."""

import json
from pathlib import Path

import pytest
from learnt_model import MODEL_DIR

from ollama_forge.dataset.chat_format import ChatFormat, open_chat_format
from ollama_forge.dataset.prompt_windows import prompt_windows
from ollama_forge.dataset.windows import NOT_SCORED, cut_windows, make_window, text_ids, text_windows
from ollama_forge.errors import DatasetError, NotFoundError, UsageError
from ollama_forge.tokenizer.decode import decode_tokens


@pytest.fixture(scope="module")
def chat_format() -> ChatFormat:
    return open_chat_format(MODEL_DIR)


def scored(window: object) -> list[int]:
    return [index for index, label in enumerate(window.labels) if label != NOT_SCORED]  # type: ignore[attr-defined]


def test_only_the_second_half_of_whole_windows_is_scored(chat_format: ChatFormat) -> None:
    tokenizer = chat_format.tokenizer
    ids = list(range(10, 35))
    windows = cut_windows(tokenizer, ids, 8)
    assert [len(window.input_ids) for window in windows] == [8, 8, 8]
    assert all(scored(window) == [5, 6, 7] for window in windows)
    assert list(windows[1].input_ids[1:]) == ids[9:16]
    assert windows[1].n_scored == 3


def test_the_begin_token_stands_over_the_first_of_each_window_where_the_model_adds_one(
    chat_format: ChatFormat,
) -> None:
    tokenizer = chat_format.tokenizer
    assert tokenizer.adds_bos
    windows = text_windows(tokenizer, "The capital of Velmora is Tarnik. " * 20, 16)
    assert len(windows) > 3
    assert all(window.input_ids[0] == tokenizer.bos_id for window in windows)
    assert text_ids(tokenizer, "The")[0] == tokenizer.bos_id


def test_a_text_shorter_than_a_window_is_scored_whole(chat_format: ChatFormat) -> None:
    (window,) = cut_windows(chat_format.tokenizer, [0, 30, 31, 32], 512)
    assert scored(window) == [1, 2, 3]


def test_words_that_look_like_special_tokens_stay_words(chat_format: ChatFormat) -> None:
    ids = text_ids(chat_format.tokenizer, "<|end|>")
    assert len(ids) > 2
    assert decode_tokens(chat_format.tokenizer, ids[1:]) == "<|end|>"


@pytest.mark.parametrize(("ids", "context"), [([], 8), ([7], 8), ([7, 8, 9, 10], 3)])
def test_nothing_to_score_is_refused(chat_format: ChatFormat, ids: list[int], context: int) -> None:
    with pytest.raises(UsageError):
        cut_windows(chat_format.tokenizer, ids, context)


def test_tokens_become_the_text_again(chat_format: ChatFormat) -> None:
    text = "Zweiunddreißig Räder, 速い – naïve 🙂\n\ttabs"
    assert decode_tokens(chat_format.tokenizer, chat_format.tokenizer.encode(text)) == text
    assert decode_tokens(chat_format.tokenizer, [10**6, -1]) == ""


def test_a_prompt_of_a_text_file_is_scored_in_the_chat_template(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("What colour is the glimbel?\n\nHello.\n", encoding="utf-8")
    found = prompt_windows(path, chat_format, 64)
    assert (len(found.windows), found.n_answered, found.n_too_long) == (2, 0, 0)
    shown = decode_tokens(chat_format.tokenizer, found.windows[0].input_ids)
    assert shown.endswith("<|user|>What colour is the glimbel?<|end|><|assistant|>")
    assert scored(found.windows[0]) == list(range(1, len(found.windows[0].input_ids)))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hello.", "completion": "Good day."},
        {"prompt": "Hello.", "response": "Good day."},
        {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]},
        {"instruction": "Hello.", "output": "Good day."},
    ],
)
def test_a_line_with_an_answer_is_scored_on_the_answer(
    record: dict[str, object], chat_format: ChatFormat, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = prompt_windows(path, chat_format, 64)
    (window,) = found.windows
    learnt = [label for label in window.labels if label != NOT_SCORED]
    assert found.n_answered == 1
    assert decode_tokens(chat_format.tokenizer, learnt) == "Good day.<|end|>"


@pytest.mark.parametrize(
    "record",
    [{"prompt": "Hello."}, {"text": "Hello."}, "Hello.", {"messages": [{"role": "user", "content": "Hello."}]}],
)
def test_a_line_without_an_answer_is_a_prompt(record: object, chat_format: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    found = prompt_windows(path, chat_format, 64)
    assert found.n_answered == 0
    assert "Hello." in decode_tokens(chat_format.tokenizer, found.windows[0].input_ids)


def test_prompts_longer_than_the_context_are_counted_and_left_out(chat_format: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Hello.\n" + "Hello again. " * 40 + "\n", encoding="utf-8")
    found = prompt_windows(path, chat_format, 32)
    assert (len(found.windows), found.n_too_long) == (1, 1)
    path.write_text("Hello again. " * 40 + "\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="nothing that can be scored"):
        prompt_windows(path, chat_format, 32)


@pytest.mark.parametrize("line", ['{"question": "?"}', "{broken", '{"prompt": 7}', "[]", '{"prompt": " "}'])
def test_a_line_that_is_no_prompt_is_named(line: str, chat_format: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello."}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"prompts\.jsonl:2"):
        prompt_windows(path, chat_format, 32)


def test_a_file_that_is_not_there_or_empty_is_an_error(chat_format: ChatFormat, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        prompt_windows(tmp_path / "none.txt", chat_format, 32)
    (tmp_path / "empty.txt").write_text("\n\n", encoding="utf-8")
    with pytest.raises(DatasetError):
        prompt_windows(tmp_path / "empty.txt", chat_format, 32)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DatasetError):
        prompt_windows(tmp_path / "empty.jsonl", chat_format, 32)


def test_a_window_of_its_own_can_begin_to_score_anywhere() -> None:
    window = make_window([5, 6, 7, 8], first_scored=3)
    assert list(window.labels) == [NOT_SCORED] * 3 + [8]
    assert window.n_scored == 1
