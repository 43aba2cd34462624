"""What the statistics say is so: lengths, cuts, duplicates, contradictions, leaks, and what looks private."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny_templates
from conversations import chat_format, example, from_record
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.dataset.examples import Example
from ollama_forge.dataset.private import find_private_strings, mask
from ollama_forge.dataset.render import render_example
from ollama_forge.dataset.statistics import bin_lengths, measure_dataset

CHAT = chat_format("qwen2-bpe", tiny_templates.CHATML)


def qa(question: str, answer: str) -> Example:
    return from_record({"instruction": question, "output": answer})


def test_lengths_are_the_models_own_tokens() -> None:
    examples = [qa("Hi", "Hello."), qa("Hi again", "Hello. " * 30), qa("Why?", "Because.")]
    lengths = sorted(len(render_example(CHAT, item).input_ids) for item in examples)
    seen = measure_dataset(examples, CHAT, max_length=50)
    assert (seen.n_examples, seen.n_turns, seen.n_tokens) == (3, 6, sum(lengths))
    assert (seen.shortest, seen.median, seen.longest) == (lengths[0], lengths[1], lengths[2])
    assert seen.n_truncated == 1 and seen.n_lost == 0
    assert sum(item.count for item in seen.histogram) == 3


def test_duplicates_contradictions_and_short_answers_are_counted() -> None:
    examples = [qa("Hi", "Hello."), qa(" hi ", "hello."), qa("Hi", "Go away."), qa("Two and two?", "4"), qa("So?", "")]
    seen = measure_dataset(examples, CHAT, max_length=50)
    assert seen.n_duplicates == 1 and seen.n_contradictions == 1 and seen.n_short == 2


def test_validation_examples_in_the_training_data_are_leaks() -> None:
    training, held = [qa("Hi", "Hello."), qa("Why?", "Because.")], [qa("why?", "Because. "), qa("New", "Yes, new.")]
    assert measure_dataset(training, CHAT, max_length=50, validation=held).n_leaks == 1
    assert measure_dataset(training, CHAT, max_length=50).n_leaks is None


def test_what_the_template_refuses_is_counted_and_the_rest_is_measured() -> None:
    llama = chat_format("llama2-spm", tiny_templates.LLAMA2)
    refused = example(("assistant", "Hi"), ("user", "Hello"), ("assistant", "Yes"))
    seen = measure_dataset([refused, qa("Hi", "Hello.")], llama, max_length=50)
    assert seen.n_refused == 1 and "data.jsonl:7" in seen.refused[0] and seen.n_tokens > 0


def test_the_sample_shows_nothing_private_unless_it_is_asked_for() -> None:
    secret, open_one = qa("Write to anna.berg@example.org", "Done, she will answer."), qa("Hi", "Hello.")
    sample = measure_dataset([secret, open_one], CHAT, max_length=50).sample
    assert sample is not None and "Hello." in sample.text
    chosen = measure_dataset([secret, open_one], CHAT, max_length=50, sample_index=0).sample
    assert chosen is not None and "anna" in chosen.text
    seen = measure_dataset([secret], CHAT, max_length=50)
    assert seen.sample is None and seen.private == {"e-mail": 1}


@given(st.lists(st.integers(1, 100_000)))
def test_every_length_is_in_one_bin(lengths: list[int]) -> None:
    bins = bin_lengths(lengths)
    assert [item.count for item in bins] == [sum(b.low <= n <= b.high for n in lengths) for b in bins]
    assert sum(item.count for item in bins) == len(lengths)
    assert all(later.low == earlier.high + 1 for earlier, later in pairwise(bins))


SECRETS = {
    "e-mail": "anna.berg+x@mail.example.org",
    "Hugging Face token": "hf_" + "aB3" * 11,
    "GitHub token": "ghp_" + "aB3d" * 9,
    "API key": "sk-proj-" + "aB3d_" * 8,
    "AWS key": "AKIA" + "ABCD2345" * 2,
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.dozjgNryP4J3jVmNHl0w5N",
    "private key": "-----BEGIN RSA PRIVATE KEY-----",
    "password": "password: hunter2hunter2",
    "card number": "4539 1488 0343 6467",
    "random string": "q9Zk2LmX8vR4tYw7Bn3Hc6Jd5Fs1Gp0A",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_what_looks_private_is_found_once_and_masked(kind: str) -> None:
    secret = SECRETS[kind]
    found = find_private_strings(f"Look: {secret}, please.")
    assert [item.kind for item in found] == [kind]
    assert secret not in found[0].masked and len(found[0].masked) < 30


@pytest.mark.parametrize(
    "text",
    [
        "Call 555-1234 or write to us @ noon.",
        "The number 1234567890123 is not a card; 2024-05-17 neither; 0000 0000 0000 0000 neither.",
        "https://example.org/a/long/path/without/any/secret/in/it/index.html",
        "antidisestablishmentarianism_is_a_long_word_indeed",
        "def add(first, second): return first + second  # password",
        "deadbeef" * 8,
    ],
)
def test_ordinary_text_is_not_private(text: str) -> None:
    assert find_private_strings(text) == ()


def test_a_mask_shows_two_characters_at_each_end_at_most() -> None:
    assert mask("anna@example.org") == "an…rg (16 characters)"
    assert mask("hunter2") == "… (7 characters)"


@given(st.text(max_size=300))
def test_any_text_can_be_searched(text: str) -> None:
    assert all(item.masked for item in find_private_strings(text))


@pytest.mark.parametrize("unit", ["a", "a.", "@", "1 ", "eyJ", "a@", "sk-\n", "secret= ", "-----BEGIN "])
def test_a_long_monotonous_text_holds_nothing_and_ends(unit: str) -> None:
    assert find_private_strings(unit * 60_000) == ()


def test_a_text_full_of_addresses_ends_too() -> None:
    assert len(find_private_strings("a@b.org, " * 20_000)) == 20_000
