"""A training example as a value, whatever file it came from.

In: turns that `records.py` has understood. Out: what `render.py` shows to a chat template, a canonical text and its
hash. An example is a whole conversation: nothing is folded into one question and one answer here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Source:
    """Where an example stands: `line` counts from 1; of a table or a JSON array it is the row."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True)
class ToolCall:
    """A function that the assistant calls; `arguments` is JSON text."""

    name: str
    arguments: str = "{}"
    call_id: str = ""


@dataclass(frozen=True)
class Turn:
    """One message.

    Attributes:
        role: one of `ROLES`.
        content: its text.
        material: what an Alpaca `input` holds; kept apart from the instruction so that Alpaca can be written again.
        reasoning: what the assistant thought before it answered.
        tool_calls: of an assistant.
        call_id: of a tool's answer: the call that it answers.
        name: of the speaker or the tool.
        is_learnt: False when the data says that this answer is not to be learnt (`weight: 0`, `train: false`).
    """

    role: str
    content: str
    material: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""
    is_learnt: bool = True

    @property
    def text(self) -> str:
        """What a chat model reads: the instruction, then the material below it."""
        return f"{self.content}\n\n{self.material}" if self.material and self.content else self.content or self.material

    @property
    def is_empty(self) -> bool:
        """Whether the turn says nothing."""
        return not self.tool_calls and not self.content.strip() and not self.material.strip()

    def message(self) -> dict[str, Any]:
        """The form that chat templates read; keys that hold nothing are left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [_call_message(call) for call in self.tool_calls]
        if self.call_id:
            message["tool_call_id"] = self.call_id
        if self.name:
            message["name"] = self.name
        return message


@dataclass(frozen=True)
class Example:
    """A conversation to learn from.

    Attributes:
        turns: in order.
        source: where it was read.
        tools: JSON schemas of the functions that the assistant may call, each as JSON text.
        is_plain: it came as prompt and completion: for a model without a chat template, one text.
    """

    turns: tuple[Turn, ...]
    source: Source
    tools: tuple[str, ...] = ()
    is_plain: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """The turns as chat templates read them."""
        return [turn.message() for turn in self.turns]

    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates read them; None when there are none."""
        return [json.loads(text) for text in self.tools] or None

    def record(self) -> dict[str, Any]:
        """The `messages` form of the whole example, from which it can be read again."""
        messages = self.messages()
        for turn, message in zip(self.turns, messages, strict=True):
            if not turn.is_learnt:
                message["weight"] = 0
        record: dict[str, Any] = {"messages": messages}
        if self.tools:
            record["tools"] = self.tool_schemas()
        return record

    def canonical(self) -> bytes:
        """The same bytes for the same conversation, whatever schema and file it came from."""
        return json.dumps(self.record(), ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the canonical bytes of the examples in their order: the identity of a dataset in a lineage."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.canonical())
        digest.update(b"\n")
    return digest.hexdigest()


def answered_turns(example: Example) -> tuple[int, ...]:
    """The indexes of the assistant turns that are to be learnt and that say something."""
    return tuple(
        index
        for index, turn in enumerate(example.turns)
        if turn.role == "assistant" and turn.is_learnt and not turn.is_empty
    )


def _call_message(call: ToolCall) -> dict[str, Any]:
    message: dict[str, Any] = {
        "type": "function",
        "function": {"name": call.name, "arguments": json.loads(call.arguments)},
    }
    return {"id": call.call_id, **message} if call.call_id else message
