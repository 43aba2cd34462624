"""Records in every form become the same conversations; what cannot be used is refused with a reason."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from conversations import HERE, from_record
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.dataset.examples import ToolCall, answered_turns, hash_examples
from ollama_forge.dataset.formats import render_alpaca, render_messages
from ollama_forge.dataset.records import parse_record, record_warnings
from ollama_forge.errors import DatasetError

CHAT = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "Farewell.")]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def said(record: Any) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in from_record(record).turns]


def test_every_form_gives_the_same_conversation() -> None:
    forms = [
        {"messages": [{"role": role, "content": text} for role, text in CHAT]},
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in CHAT]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": t} for r, t in CHAT]},
        {"conversations": [{"role": role, "content": text} for role, text in CHAT[1:]], "system": "Be kind."},
        {"instruction": "Bye", "output": "Farewell.", "system": "Be kind.", "history": [["Hi", "Hello."]]},
        {
            "prompt": [{"role": role, "content": text} for role, text in CHAT[:4]],
            "completion": [{"role": "assistant", "content": "Farewell."}],
        },
        {"messages": json.dumps([{"role": role, "content": text} for role, text in CHAT])},
    ]
    assert [said(form) for form in forms] == [CHAT] * len(forms)
    assert len({hash_examples([from_record(form)]) for form in forms}) == 1


def test_alpaca_input_stands_below_the_instruction_and_is_kept_apart() -> None:
    turn = from_record({"instruction": "Sum up.", "input": "Long.", "output": "Short."}).turns[0]
    assert (turn.content, turn.material, turn.text) == ("Sum up.", "Long.", "Sum up.\n\nLong.")
    assert said({"instruction": "Go", "input": None, "output": "Gone"}) == [("user", "Go"), ("assistant", "Gone")]


def test_prompt_and_completion_are_plain_text_and_a_conversation() -> None:
    example = from_record({"prompt": "2 + 2 =", "completion": " 4"})
    assert example.is_plain
    assert [(turn.role, turn.content) for turn in example.turns] == [("user", "2 + 2 ="), ("assistant", " 4")]


def test_tool_calls_reasoning_and_weights_are_kept() -> None:
    example = from_record(
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "look it up"},
                {"role": "tool", "content": "21", "tool_call_id": "c1", "name": "weather"},
                {"role": "assistant", "content": "Wrong.", "weight": 0},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "21 degrees."},
            ],
            "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        }
    )
    call = example.turns[1]
    assert call.tool_calls == (ToolCall("weather", '{"city":"Köln"}', "c1"),)
    assert (call.reasoning, example.turns[2].call_id) == ("look it up", "c1")
    assert answered_turns(example) == (1, 5)
    assert example.messages()[1]["tool_calls"] == [CALL]
    assert example.tool_schemas() == [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    again = parse_record(json.loads(json.dumps(example.record())), HERE)
    assert again == example


def test_arguments_as_json_text_are_the_same_as_an_object() -> None:
    as_text = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
    question = {"role": "user", "content": "?"}
    first, second = (
        from_record({"messages": [question, {"role": "assistant", "tool_calls": [call]}]}) for call in (CALL, as_text)
    )
    assert first == second


def test_sharegpt_function_calls_become_tool_calls() -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
            {"from": "observation", "value": "21"},
            {"from": "gpt", "value": "21 degrees."},
        ]
    }
    turns = from_record(record).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1].tool_calls == (ToolCall("weather", '{"city":"Rome"}'),)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "a JSON number"),
        (None, "a JSON null"),
        (["a"], "a JSON list"),
        ({}, "neither 'instruction'"),
        ({"text": "x"}, "it has 'text'"),
        ({"instruction": "a"}, "'output' is missing"),
        ({"output": "a"}, "'instruction' is missing"),
        ({"instruction": 1, "output": "b"}, "'instruction' is a number"),
        ({"instruction": "a", "output": None}, "'output' is a null"),
        ({"instruction": "a", "output": "b", "input": 1}, "'input' is a number"),
        ({"instruction": "a", "output": "b", "outptu": "c"}, "unknown key 'outptu'"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "not a pair"),
        ({"messages": {}}, "'messages' is a object"),
        ({"messages": []}, "no user message"),
        ({"messages": ["hi"]}, "messages[0] is a string"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": 1}]}, "is a number"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]}, "no user message"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "only the assistant"),
        ({"messages": "not json"}, "not JSON"),
        ({"conversations": 7}, "'conversations' is a number"),
        ({"prompt": 1, "completion": "x"}, "'prompt' is a number"),
        ({"prompt": "x"}, "neither"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_with_its_reason(record: Any, reason: str) -> None:
    with pytest.raises(DatasetError) as caught:
        from_record(record)
    assert reason in caught.value.what


def test_unknown_keys_are_refused_for_alpaca_alone_and_can_be_ignored() -> None:
    record = {"instruction": "a", "output": "b", "text": "c"}
    assert parse_record(record, HERE, ignore_extra=True).turns[1].content == "b"
    messages = [{"role": "user", "content": "a", "id": 3}, {"role": "assistant", "content": "b"}]
    assert said({"messages": messages, "id": "x"}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("roles", "warnings"),
    [
        ("ua", set()),
        ("sua", set()),
        ("uaua", set()),
        ("uatta", set()),
        ("au", {"order", "last turn"}),
        ("uua", {"order"}),
        ("uaa", {"order"}),
        ("usa", {"order"}),
        ("uau", {"last turn"}),
        ("uta", {"order"}),
    ],
)
def test_roles_out_of_order_and_a_last_turn_that_is_not_the_assistants_are_warnings(
    roles: str, warnings: set[str]
) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    record = {"messages": [{"role": names[role], "content": "x"} for role in roles]}
    assert set(record_warnings(from_record(record))) == warnings


def test_an_empty_answer_is_a_warning() -> None:
    assert set(record_warnings(from_record({"instruction": "a", "output": " \n"}))) == {"empty answer"}
    assert set(record_warnings(from_record({"instruction": "", "output": "x"}))) == {"empty question"}


# --- round trips ------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
ROUNDS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)


@given(ROUNDS, st.one_of(st.just(""), TEXT))
def test_messages_survive_alpaca_with_history(rounds: list[tuple[str, str]], system: str) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in rounds:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    losses: Counter[str] = Counter()
    line = render_alpaca(from_record({"messages": messages}), losses, keep_history=True)
    assert line is not None and not losses
    back = render_messages(from_record(json.loads(line)), losses)
    assert back is not None and json.loads(back) == {"messages": messages}


@given(TEXT, st.one_of(st.just(""), TEXT), TEXT)
def test_alpaca_survives_itself_exactly_and_messages_in_its_text(instruction: str, material: str, output: str) -> None:
    record = {"instruction": instruction, "input": material, "output": output}
    losses: Counter[str] = Counter()
    line = render_alpaca(from_record(record), losses)
    assert line is not None and json.loads(line) == record
    as_messages = render_messages(from_record(record), losses)
    assert as_messages is not None
    back = render_alpaca(from_record(json.loads(as_messages)), losses)
    text = f"{instruction}\n\n{material}" if material else instruction
    assert back is not None and json.loads(back) == {"instruction": text, "input": "", "output": output}
    assert not losses


KEYS = (
    *("messages", "conversations", "role", "from", "content", "value", "instruction", "output", "input", "prompt"),
    *("completion", "tools", "tool_calls", "function", "name", "arguments", "history", "weight", "system"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner | st.sampled_from(["user", "assistant", "human", "gpt", "tool", "function_call"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_is_an_example_or_a_reason(value: Any) -> None:
    try:
        example = from_record(value)
    except DatasetError as error:
        assert error.what
    else:
        assert from_record(json.loads(json.dumps(example.record()))).canonical() == example.canonical()
