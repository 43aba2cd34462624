"""The mask covers each answer and the token that ends it, and nothing else, whatever the template does."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pytest
import tiny_templates
from conversations import (
    HERE,
    MOVES_SYSTEM,
    NO_END,
    NO_SYSTEM,
    OPENS_THOUGHT,
    SHOUTS_HISTORY,
    THINKING,
    chat_format,
    example,
    from_record,
    learnt_pieces,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.dataset.examples import Example, Turn
from ollama_forge.dataset.render import NOT_LEARNT, RenderOptions, render_example, render_prompt
from ollama_forge.errors import TemplateError, UsageError

TWO_ROUNDS = example(("user", "Hello?"), ("assistant", "It is five."), ("user", "Where?"), ("assistant", "In Paris."))
GUIDED = Example((Turn("system", "Be kind."), *TWO_ROUNDS.turns), HERE)

STYLES = {
    "llama2": ("llama2-spm", "</s>"),
    "llama3": ("llama3-bpe", "<|eot_id|>"),
    "chatml": ("qwen2-bpe", "<|im_end|>"),
    "qwen2": ("qwen2-bpe", "<|im_end|>"),
    "qwen-generation": ("qwen2-bpe", "<|im_end|>"),
    "gemma": ("gemma-spm", "<end_of_turn>"),
    "phi3": ("phi3-spm", "<|end|>"),
    "mistral": ("llama2-spm", "</s>"),
    "alpaca": ("llama2-spm", "</s>"),
}


def said(piece: str, end: str) -> str:
    """An answer without its end token; Phi-3's swallows the line end after it."""
    return piece.rstrip().removesuffix(end).strip()


@pytest.mark.parametrize("style", tiny_templates.TEMPLATES)
@pytest.mark.parametrize("conversation", [TWO_ROUNDS, GUIDED], ids=["plain", "system"])
def test_every_answer_and_its_end_is_learnt(style: str, conversation: Example) -> None:
    kind, end = STYLES[style]
    chat = chat_format(kind, tiny_templates.TEMPLATES[style])
    rendered = render_example(chat, conversation)
    pieces = learnt_pieces(chat, rendered)
    assert all(piece.rstrip().endswith(end) for piece in pieces)
    assert [said(piece, end) for piece in pieces] == ["It is five.", "In Paris."]


@pytest.mark.parametrize("style", tiny_templates.TEMPLATES)
def test_what_stands_before_the_answer_is_the_prompt(style: str) -> None:
    kind, _ = STYLES[style]
    chat = chat_format(kind, tiny_templates.TEMPLATES[style])
    rendered = render_example(chat, TWO_ROUNDS, RenderOptions(learn="last"))
    first = next(index for index, label in enumerate(rendered.labels) if label != NOT_LEARNT)
    assert list(rendered.input_ids[:first]) == render_prompt(chat, TWO_ROUNDS.messages()[:-1])


def test_the_begin_token_stands_once_in_front_whether_or_not_the_template_writes_it() -> None:
    for template in (tiny_templates.LLAMA3, tiny_templates.LLAMA3.replace("{{- bos_token }}", "")):
        chat = chat_format("llama3-bpe", template)
        ids = list(render_example(chat, TWO_ROUNDS).input_ids)
        assert ids[0] == chat.tokenizer.bos_id and ids.count(ids[0]) == 1
    without = chat_format("llama3-bpe", tiny_templates.CHATML, **{"tokenizer.ggml.add_bos_token": False})
    assert without.tokenizer.bos_id not in render_example(without, TWO_ROUNDS).input_ids


def test_last_and_all_choose_what_is_learnt() -> None:
    chat = chat_format("qwen2-bpe", tiny_templates.CHATML)
    last = render_example(chat, TWO_ROUNDS, RenderOptions(learn="last"))
    assert learnt_pieces(chat, last) == ["In Paris.<|im_end|>"]
    every = render_example(chat, TWO_ROUNDS, RenderOptions(learn="all"))
    assert every.labels == every.input_ids
    with pytest.raises(UsageError, match="learn"):
        RenderOptions(learn="some")


def test_an_answer_that_the_data_excludes_or_that_is_empty_is_not_learnt() -> None:
    chat = chat_format("qwen2-bpe", tiny_templates.CHATML)
    first = Turn("assistant", "It is six.", is_learnt=False)
    excluded = Example((TWO_ROUNDS.turns[0], first, *TWO_ROUNDS.turns[2:]), HERE)
    assert learnt_pieces(chat, render_example(chat, excluded)) == ["In Paris.<|im_end|>"]
    empty = example(("user", "Hello?"), ("assistant", " "), ("user", "Where?"), ("assistant", "In Paris."))
    assert learnt_pieces(chat, render_example(chat, empty)) == ["In Paris.<|im_end|>"]


def test_what_follows_the_last_answer_is_not_learnt() -> None:
    chat = chat_format("qwen2-bpe", tiny_templates.CHATML)
    trailing = Example((*TWO_ROUNDS.turns, Turn("user", "Thanks")), HERE)
    assert learnt_pieces(chat, render_example(chat, trailing)) == ["It is five.<|im_end|>", "In Paris.<|im_end|>"]


def test_tool_calls_are_learnt_and_their_results_are_not() -> None:
    chat = chat_format("qwen2-bpe", tiny_templates.QWEN2)
    call = {"function": {"name": "weather", "arguments": {"city": "Köln"}}}
    record = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "It is 21."},
        ],
        "tools": [{"type": "function", "function": {"name": "weather"}}],
    }
    notes: Counter[str] = Counter()
    rendered = render_example(chat, from_record(record), RenderOptions(view="transformers"), notes)
    called, answered = learnt_pieces(chat, rendered)
    assert '"city": "Köln"' in called and called.endswith("</tool_call><|im_end|>")
    assert answered == "It is 21.<|im_end|>"
    assert '"name": "weather"' in rendered.text and not notes


def test_thoughts_are_learnt_of_the_last_answer_and_earlier_answers_as_they_are_shown_later() -> None:
    chat = chat_format("qwen2-bpe", THINKING)
    assert chat.knows_thinking
    thought = Turn("assistant", "In Paris.", reasoning="France, so")
    conversation = Example((*TWO_ROUNDS.turns[:3], thought), HERE)
    notes: Counter[str] = Counter()
    pieces = learnt_pieces(chat, render_example(chat, conversation, notes=notes))
    assert pieces == ["It is five.<|im_end|>", "<think>\nFrance, so\n</think>\n\nIn Paris.<|im_end|>"]
    assert notes == {"shown differently": 1}


def test_variables_choose_between_thinking_and_not() -> None:
    chat = chat_format("qwen2-bpe", THINKING)
    question = example(("user", "Where?"), ("assistant", "In Paris."))
    silent = RenderOptions(variables={"enable_thinking": False})
    assert learnt_pieces(chat, render_example(chat, question, silent)) == ["In Paris.<|im_end|>"]
    prompt = render_prompt(chat, question.messages()[:-1], silent)
    assert list(render_example(chat, question, silent).input_ids[: len(prompt)]) == prompt


def test_what_only_the_prompt_has_is_put_before_the_last_answer() -> None:
    chat = chat_format("qwen2-bpe", OPENS_THOUGHT)
    thought = example(("user", "Where?"), ("assistant", "France, so\n</think>\nIn Paris."))
    notes: Counter[str] = Counter()
    rendered = render_example(chat, thought, notes=notes)
    prompt = render_prompt(chat, thought.messages()[:-1])
    assert list(rendered.input_ids[: len(prompt)]) == prompt
    assert "".join(learnt_pieces(chat, rendered)).strip() == "In Paris.<|im_end|>"
    assert notes["prompt completed"] == 1


def test_a_system_prompt_that_moves_does_not_hide_earlier_answers() -> None:
    chat = chat_format("qwen2-bpe", MOVES_SYSTEM)
    notes: Counter[str] = Counter()
    pieces = learnt_pieces(chat, render_example(chat, GUIDED, notes=notes))
    assert pieces == [" It is five.<|endoftext|>", " In Paris.<|endoftext|>"]
    assert notes == {"shown differently": 1}


def test_an_answer_that_cannot_be_placed_is_left_out_and_counted_or_refused_by_name() -> None:
    chat = chat_format("qwen2-bpe", SHOUTS_HISTORY)
    notes: Counter[str] = Counter()
    assert learnt_pieces(chat, render_example(chat, TWO_ROUNDS, notes=notes)) == ["In Paris.<|im_end|>"]
    assert notes["only the last"] == 1
    with pytest.raises(TemplateError, match=r"data\.jsonl:7: where the answer in turn 2"):
        render_example(chat, TWO_ROUNDS, RenderOptions(is_strict=True))
    trailing = Example((*TWO_ROUNDS.turns, Turn("user", "Thanks")), HERE)
    with pytest.raises(TemplateError, match="turn 4"):
        render_example(chat, trailing)


def test_a_template_that_refuses_names_the_example() -> None:
    chat = chat_format("llama2-spm", tiny_templates.LLAMA2)
    with pytest.raises(TemplateError, match=r"data\.jsonl:7.*refuses"):
        render_example(chat, example(("assistant", "Hi"), ("user", "Hello"), ("assistant", "Yes")))


def test_a_system_prompt_that_the_template_refuses_goes_into_the_first_question() -> None:
    chat = chat_format("qwen2-bpe", NO_SYSTEM)
    notes: Counter[str] = Counter()
    rendered = render_example(chat, GUIDED, notes=notes)
    assert rendered.text.startswith("<|im_start|>user\nBe kind.\nHello?<|im_end|>")
    assert learnt_pieces(chat, rendered) == ["It is five.<|im_end|>", "In Paris.<|im_end|>"]
    assert notes == {"system merged": 1}


def test_where_a_template_writes_no_end_one_is_added_and_told() -> None:
    chat = chat_format("llama2-spm", NO_END)
    notes: Counter[str] = Counter()
    pieces = learnt_pieces(chat, render_example(chat, TWO_ROUNDS, notes=notes))
    assert pieces == [" It is five.\n", " In Paris.\n</s>"]
    assert notes == {"end added": 1, "no end": 1}


def test_without_a_template_alpaca_blocks_or_plain_text_are_used() -> None:
    chat = chat_format("llama2-spm", **{"tokenizer.chat_template": None})
    assert chat.template is None
    notes: Counter[str] = Counter()
    rendered = render_example(chat, from_record({"instruction": "Sum", "input": "2 + 2", "output": "4"}), notes=notes)
    assert rendered.text == "### Instruction:\nSum\n\n### Input:\n2 + 2\n\n### Response:\n4"
    assert learnt_pieces(chat, rendered) == ["4</s>"]
    assert notes == {"no template": 1}
    plain = render_example(chat, from_record({"prompt": "2 + 2 =", "completion": " four"}), notes=notes)
    assert (plain.text, learnt_pieces(chat, plain)) == ("2 + 2 = four", [" four</s>"])
    assert notes == {"no template": 1}
    assert learnt_pieces(chat, render_example(chat, TWO_ROUNDS)) == ["It is five.</s>", "In Paris.</s>"]


@pytest.mark.parametrize("kind", ["qwen2-bpe", "llama2-spm", "gemma-spm"])
def test_no_token_reaches_over_the_border_between_prompt_and_answer(kind: str) -> None:
    chat = chat_format(kind, **{"tokenizer.chat_template": None})
    text = "The kettle sings when the water boils"
    for border in range(1, len(text)):
        notes: Counter[str] = Counter()
        record = {"prompt": text[:border], "completion": text[border:]}
        rendered = render_example(chat, from_record(record), notes=notes)
        prompt = chat.tokenizer.encode(text[:border], add_special=True)
        assert list(rendered.input_ids[: len(prompt)]) == prompt
        assert learnt_pieces(chat, rendered) == [text[border:] + chat.tokenizer.tokens[chat.tokenizer.eos_id or 0]]
        assert not notes


def test_the_two_views_differ_where_a_template_can_tell_them_apart() -> None:
    template = (
        "{% if tools is defined and tools is none %}none{% endif %}{% if enable_thinking is defined %}set{% endif %}"
    )
    template += tiny_templates.CHATML
    chat = chat_format("qwen2-bpe", template)
    assert render_example(chat, TWO_ROUNDS).text.startswith("set<|im_start|>")
    assert render_example(chat, TWO_ROUNDS, RenderOptions(view="transformers")).text.startswith("none<|im_start|>")


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text
)


@pytest.mark.parametrize("style", ["llama3", "chatml", "gemma", "phi3", "mistral"])
@given(rounds=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_answers_are_found_whole(style: str, rounds: list[tuple[str, str]]) -> None:
    kind, end = STYLES[style]
    chat = chat_format(kind, tiny_templates.TEMPLATES[style])
    turns = [turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))]
    pieces = learnt_pieces(chat, render_example(chat, example(*turns)))
    assert [said(piece, end) for piece in pieces] == [answer for _, answer in rounds]


def test_dates_in_a_template_do_not_split_prompt_and_answer() -> None:
    chat = chat_format("llama3-bpe", tiny_templates.LLAMA3)
    assert datetime.now().strftime("%Y") in render_example(chat, TWO_ROUNDS).text
