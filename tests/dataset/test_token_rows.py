"""Rows for a trainer: what is cut, dropped or held back is counted, and the same data gives the same rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_templates
from conversations import chat_format, example, from_record
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.dataset.examples import Example, Source, hash_examples
from ollama_forge.dataset.render import NOT_LEARNT
from ollama_forge.dataset.tokenize import split_examples, tokenize_examples
from ollama_forge.errors import DatasetError, TemplateError, UsageError

CHAT = chat_format("qwen2-bpe", tiny_templates.CHATML)
SHORT = example(("user", "Hi"), ("assistant", "Hello."))
LONG_ANSWER = example(("user", "Hi"), ("assistant", "Hello. " * 50))
LONG_QUESTION = example(("user", "Hi. " * 50), ("assistant", "Hello."))
EMPTY = example(("user", "Hi"), ("assistant", " "))


def test_long_rows_are_cut_and_those_without_an_answer_left_are_dropped() -> None:
    made = tokenize_examples([SHORT, LONG_ANSWER, LONG_QUESTION, EMPTY], CHAT, max_length=60)
    assert [len(row.input_ids) for row in made.rows] == [len(made.rows[0].input_ids), 60]
    assert made.n_truncated == 1 and made.longest > 60
    assert made.dropped == {"cut before the answer": 1, "no answer": 1}
    assert made.n_tokens == sum(len(row.input_ids) for row in made.rows)
    assert made.n_learnt == sum(label != NOT_LEARNT for row in made.rows for label in row.labels)


def test_long_rows_can_be_left_out_instead() -> None:
    made = tokenize_examples([SHORT, LONG_ANSWER], CHAT, max_length=60, overlong="drop")
    assert len(made.rows) == 1 and made.dropped == {"too long": 1} and made.n_truncated == 0


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_nothing_to_learn_from_is_an_error_with_the_reason(overlong: str) -> None:
    with pytest.raises(DatasetError) as caught:
        tokenize_examples([LONG_QUESTION, EMPTY], CHAT, max_length=20, overlong=overlong)
    assert "None of the 2 examples" in caught.value.what
    assert "answer" in caught.value.why and "--max-length" in caught.value.next
    with pytest.raises(DatasetError, match="No training example"):
        tokenize_examples([], CHAT, max_length=20)


def test_what_the_template_refuses_stops_or_is_counted() -> None:
    llama = chat_format("llama2-spm", tiny_templates.LLAMA2)
    refused = example(("assistant", "Hi"), ("user", "Hello"), ("assistant", "Yes"))
    with pytest.raises(TemplateError, match=r"data\.jsonl:7"):
        tokenize_examples([SHORT, refused], llama, max_length=100)
    made = tokenize_examples([SHORT, refused], llama, max_length=100, skip_refused=True)
    assert len(made.rows) == 1 and made.dropped == {"refused": 1} and "data.jsonl:7" in made.refusals[0]


def test_lengths_and_rules_that_make_no_sense_are_refused() -> None:
    for wrong in ({"max_length": 1}, {"max_length": 10, "overlong": "shrink"}):
        with pytest.raises(UsageError):
            tokenize_examples([SHORT], CHAT, **wrong)


EXAMPLES = st.lists(st.integers(0, 30), max_size=40).map(
    lambda numbers: [from_record({"instruction": f"q{n}", "output": f"a{n}"}) for n in numbers]
)


@given(EXAMPLES, st.sampled_from([0.0, 0.1, 0.5, 0.9]), st.integers(0, 3))
def test_a_split_loses_nothing_and_no_example_is_on_both_sides(
    examples: list[Example], share: float, seed: int
) -> None:
    training, validation = split_examples(examples, share, seed)
    assert sorted(map(str, [*training, *validation])) == sorted(map(str, examples))
    assert not {e.canonical() for e in training} & {e.canonical() for e in validation}
    n_different = len({e.canonical() for e in examples})
    assert bool(validation) == (share > 0 and n_different > 1)
    assert bool(training) == bool(examples)


@given(EXAMPLES, st.randoms(use_true_random=False))
def test_a_split_depends_on_content_and_seed_alone(examples: list[Example], draw: object) -> None:
    moved = [replace(item, source=Source(Path("elsewhere"), 1)) for item in reversed(examples)]
    for seed in (0, 1):
        held = {item.canonical() for item in split_examples(examples, 0.2, seed)[1]}
        assert {item.canonical() for item in split_examples(moved, 0.2, seed)[1]} == held


def test_another_seed_gives_another_split() -> None:
    examples = [from_record({"instruction": f"q{n}", "output": "a"}) for n in range(100)]
    first, second = (split_examples(examples, 0.1, seed)[1] for seed in (0, 1))
    assert len(first) == len(second) == 10 and first != second
    with pytest.raises(UsageError):
        split_examples(examples, 1.0)


def test_the_hash_is_of_what_is_said_and_of_its_order() -> None:
    as_messages = from_record({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})
    as_alpaca = from_record({"instruction": "q", "output": "a"})
    other = from_record({"instruction": "q", "output": "b"})
    assert hash_examples([as_messages]) == hash_examples([replace(as_alpaca, source=Source(Path("x"), 9))])
    assert hash_examples([as_alpaca, other]) != hash_examples([other, as_alpaca])
    assert hash_examples([as_alpaca]) == "f7848c0607d3cb54d34c8d11955363c80e5f0524b3b9bf3a9167a2c5c85e030f"
