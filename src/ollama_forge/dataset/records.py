"""One record of a data file, in any of the forms that people have, understood as an `Example`.

In: a JSON value (a line, an array item, a table row). Out: an `Example`, or a `DatasetError` whose `what` is the reason
in a few words; who reads the file adds the line. The forms: Alpaca (`instruction`, `output`, optional `input`, and
LLaMA-Factory's `system` and `history`), `messages`, ShareGPT (`conversations` of `from` and `value`), and `prompt` with
`completion`. What a record says beside a conversation is kept or refused, never dropped without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import from_json

from ollama_forge.dataset.examples import ROLES, Example, Source, ToolCall, Turn
from ollama_forge.errors import DatasetError

ALPACA_KEYS = frozenset({"instruction", "input", "output", "system", "history"})
KNOWN_KEYS = ALPACA_KEYS | {"messages", "conversations", "prompt", "completion", "tools"}
"""Columns of a table that mean something here."""

WARNINGS = {
    "empty answer": "an assistant turn says nothing; it is not trained on",
    "empty question": "a user turn says nothing",
    "order": "roles are out of order (system first, then user and assistant in turn)",
    "last turn": "the last turn is not the assistant's; what follows the last answer is not trained on",
    "unknown keys": "keys that mean nothing here were ignored",
}
"""Kinds of warnings about a record that can be used, and what they mean."""

SCHEMA = """\
One JSON object per line (.jsonl), in one of these forms:
  {"instruction": "...", "output": "...", "input": "optional"}                   Alpaca
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
  {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}   ShareGPT
  {"prompt": "...", "completion": "..."}
Roles are system, user, assistant and tool. The same as a JSON array (.json), or as columns (.csv, .tsv, .parquet).
"""

_ROLES = {role: role for role in ROLES} | {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
_REASONING = ("reasoning_content", "reasoning", "thinking")


def parse_record(value: Any, source: Source, *, ignore_extra: bool = False) -> Example:
    """Understand a record.

    Args:
        value: as JSON gives it.
        source: where it stands.
        ignore_extra: accept an Alpaca record with keys that mean nothing here.

    Raises:
        DatasetError: it is in none of the known forms; `what` says why.
    """
    if not isinstance(value, dict):
        raise DatasetError(f"a JSON {_kind(value)}, and an object is expected")
    tools = _parse_tools(value.get("tools"))
    is_plain = False
    if value.get("messages") is not None:
        turns = _parse_messages(value["messages"], "messages")
    elif value.get("conversations") is not None:
        turns = _parse_messages(value["conversations"], "conversations")
    elif "instruction" in value or "output" in value:
        turns = _parse_alpaca(value, ignore_extra=ignore_extra)
        tools = ()
    elif "prompt" in value and "completion" in value:
        turns, is_plain = _parse_completion(value)
    else:
        keys = ", ".join(repr(key) for key in list(value)[:6]) or "no keys"
        raise DatasetError(f"neither 'instruction' and 'output' nor 'messages' (it has {keys})")
    if value.get("conversations") is not None and turns[0].role != "system" and value.get("system"):
        turns = (Turn("system", _text(value["system"], "system")), *turns)
    return Example(turns, source, tools, is_plain)


def record_warnings(example: Example) -> Iterator[str]:
    """Kinds of `WARNINGS` that an example earns."""
    if any(turn.role == "assistant" and turn.is_empty for turn in example.turns):
        yield "empty answer"
    if any(turn.role == "user" and turn.is_empty for turn in example.turns):
        yield "empty question"
    if not _is_in_order(example.turns):
        yield "order"
    if example.turns[-1].role != "assistant":
        yield "last turn"


def extra_keys(value: Any) -> tuple[str, ...]:
    """Keys of an Alpaca record that mean nothing here."""
    if not isinstance(value, dict) or "messages" in value or "conversations" in value or "instruction" not in value:
        return ()
    return tuple(key for key in value if key not in ALPACA_KEYS)


def _is_in_order(turns: tuple[Turn, ...]) -> bool:
    previous = ""
    for turn in turns:
        role = "system" if turn.role == "developer" else turn.role
        allowed = {
            "system": ("",),
            "user": ("", "system", "assistant"),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool"),
        }
        if previous not in allowed[role]:
            return False
        previous = role
    return True


# --- the forms --------------------------------------------------------------------------------------------------------


def _parse_alpaca(value: Mapping[str, Any], *, ignore_extra: bool) -> tuple[Turn, ...]:
    for key in ("instruction", "output"):
        if key not in value:
            raise DatasetError(f"{key!r} is missing")
    unknown = [key for key in value if key not in ALPACA_KEYS]
    if unknown and not ignore_extra:
        raise DatasetError(f"unknown key {unknown[0]!r} (an Alpaca record has 'instruction', 'input' and 'output')")
    instruction, output = _text(value["instruction"], "instruction"), _text(value["output"], "output")
    material = _text(value.get("input") or "", "input")
    turns: list[Turn] = []
    if value.get("system"):
        turns.append(Turn("system", _text(value["system"], "system")))
    history = value.get("history") or []
    if not isinstance(history, list):
        raise DatasetError(f"'history' is a {_kind(history)}, and a list of pairs is expected")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise DatasetError("'history' holds something that is not a pair of texts")
        turns.append(Turn("user", _text(pair[0], "history")))
        turns.append(Turn("assistant", _text(pair[1], "history")))
    return (*turns, Turn("user", instruction, material=material), Turn("assistant", output))


def _parse_completion(value: Mapping[str, Any]) -> tuple[tuple[Turn, ...], bool]:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        before = _turns_or_text(prompt, "prompt", "user")
        return _require_speakers((*before, *_turns_or_text(completion, "completion", "assistant"))), False
    return (Turn("user", _text(prompt, "prompt")), Turn("assistant", _text(completion, "completion"))), True


def _turns_or_text(value: Any, key: str, role: str) -> tuple[Turn, ...]:
    return _parse_turns(value, key) if isinstance(value, list) else (Turn(role, _text(value, key)),)


def _parse_messages(value: Any, key: str) -> tuple[Turn, ...]:
    if isinstance(value, str):
        value = _parse_json(value, key)  # a cell of a CSV file
    return _require_speakers(_parse_turns(value, key))


def _parse_turns(value: Any, key: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise DatasetError(f"{key!r} is a {_kind(value)}, and a list is expected")
    return tuple(_parse_turn(message, f"{key}[{index}]") for index, message in enumerate(value))


def _require_speakers(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    for role, word in (("user", "user"), ("assistant", "assistant")):
        if not any(turn.role == role and not turn.is_empty for turn in turns):
            raise DatasetError(f"no {word} message with text in it")
    return turns


def _parse_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DatasetError(f"{where} is a {_kind(message)}, and an object with 'role' and 'content' is expected")
    named = message.get("role", message.get("from"))
    if not isinstance(named, str):
        raise DatasetError(f"{where} has no role")
    role = _ROLES.get(named.strip().lower())
    if role is None:
        raise DatasetError(f"{where} has the role {named[:40]!r} (system, user, assistant and tool are known)")
    content = message.get("content", message.get("value"))
    if len(message) == 2 and type(content) is str and named != "function_call":
        return Turn(role, content)
    calls = _parse_calls(message, where)
    content = _content(message.get("content", message.get("value")), where, may_be_absent=bool(calls))
    if named == "function_call":
        calls, content = (_parse_call(_parse_json(content, where), where),), ""
    if calls and role != "assistant":
        raise DatasetError(f"{where} calls a tool, and only the assistant can")
    reasoning = next((message[name] for name in _REASONING if message.get(name)), "")
    flags = [message[name] for name in ("weight", "train", "training") if message.get(name) is not None]
    return Turn(
        role=role,
        content=content,
        reasoning=_text(reasoning, f"{where}.reasoning"),
        tool_calls=calls,
        call_id=_text(message.get("tool_call_id") or "", f"{where}.tool_call_id"),
        name=_text(message.get("name") or "", f"{where}.name"),
        is_learnt=all(bool(flag) for flag in flags),
    )


def _content(value: Any, where: str, *, may_be_absent: bool) -> str:
    if value is None and may_be_absent:
        return ""
    if value is None:
        raise DatasetError(f"{where} has no content")
    if not isinstance(value, list):
        return _text(value, f"{where}.content")
    pieces = []
    for part in value:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif isinstance(part, str):
            pieces.append(part)
        else:
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DatasetError(f"{where} holds a part of the kind {str(kind)[:40]!r}, and only text can be trained on")
    return "".join(pieces)


def _parse_calls(message: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = message.get("tool_calls")
    if calls is None and message.get("function_call") is not None:
        calls = [message["function_call"]]
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise DatasetError(f"{where}.tool_calls is a {_kind(calls)}, and a list is expected")
    return tuple(_parse_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))


def _parse_call(call: Any, where: str) -> ToolCall:
    body = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(body, dict) or not isinstance(body.get("name"), str):
        raise DatasetError(f"{where} is not an object with a function's 'name'")
    arguments = body.get("arguments", body.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{where}.arguments")
    call_id = call.get("id") or ""
    return ToolCall(body["name"], _json_text(arguments), _text(call_id, f"{where}.id"))


def _parse_tools(value: Any) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = _parse_json(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DatasetError("'tools' is not a list of objects")
    return tuple(_json_text(tool) for tool in value)


# --- values -----------------------------------------------------------------------------------------------------------


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise DatasetError(f"{where!r} is a {_kind(value)}, and text is expected")


def _parse_json(text: str, where: str) -> Any:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as exc:
        raise DatasetError(f"{where!r} is text that is not JSON: {str(exc)[:80]}") from exc


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
