"""Examples in the forms that other trainers take, one record at a time.

In: an `Example`. Out: bytes of a prepared file, and what that form cannot say, as counted losses. llama.cpp's blocks
are plain text; the others are JSON lines.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.dataset.examples import Example, Turn
from ollama_forge.errors import UsageError

LOSSES = {
    "no answer": "left out: no question that is answered",
    "earlier turns": "had earlier turns, which this form cannot hold; the last question and its answer are kept",
    "system as input": "had a system prompt, which went into the input",
    "after the answer": "had turns after the last answer, which were cut",
    "tools": "had tools, tool calls or tool results, which this form cannot hold",
    "reasoning": "had reasoning apart from the answer, which this form cannot hold",
    "not learnt": "had answers marked as not to be learnt, which this form cannot say",
}
"""What a form could not hold, and in words; counted per example."""


@dataclass(frozen=True)
class PreparedFormat:
    """One form of prepared data.

    Attributes:
        name: as typed.
        ending: of the file's name.
        words: for which tool, in one line.
        render: an example as bytes, losses counted; None when nothing is left of it.
        separator: between two examples.
    """

    name: str
    ending: str
    words: str
    render: Callable[[Example, Counter[str]], bytes | None]
    separator: bytes = b""


@dataclass(frozen=True)
class _Round:
    """The last question that is answered, in Alpaca's three parts, and what stood before it."""

    instruction: str
    material: str
    output: str
    system: str
    history: tuple[tuple[str, str], ...]


def render_block(example: Example, losses: Counter[str]) -> bytes | None:
    """The block of llama.cpp's finetune: `### Instruction:`, `### Input:` (`(none)` where empty), `### Response:`."""
    last = _last_round(example, losses)
    if last is None:
        return None
    material = _material_with_system(last, losses)
    if last.history:
        losses["earlier turns"] += 1
    return _text_bytes(
        f"### Instruction:\n{last.instruction}\n\n### Input:\n{material or '(none)'}\n\n### Response:\n{last.output}\n"
    )


def render_alpaca(example: Example, losses: Counter[str], *, keep_history: bool = False) -> bytes | None:
    """An Alpaca line.

    Args:
        keep_history: put the system prompt and earlier turns into `system` and `history`, as LLaMA-Factory reads them,
            instead of folding the first into `input` and leaving out the others.
    """
    last = _last_round(example, losses)
    if last is None:
        return None
    record: dict[str, Any] = {"instruction": last.instruction, "input": last.material, "output": last.output}
    if keep_history:
        if last.system:
            record["system"] = last.system
        if last.history:
            record["history"] = [list(pair) for pair in last.history]
    else:
        record["input"] = _material_with_system(last, losses)
        if last.history:
            losses["earlier turns"] += 1
    return _line(record)


def render_messages(example: Example, losses: Counter[str]) -> bytes | None:
    """A `messages` line: the conversation whole."""
    return _line(example.record())


def render_conversations(example: Example, losses: Counter[str]) -> bytes | None:
    """A `conversations` line of role and content, as Unsloth's notebooks read it."""
    if any(not turn.is_learnt for turn in example.turns):
        losses["not learnt"] += 1
    record: dict[str, Any] = {"conversations": example.messages()}
    if example.tools:
        record["tools"] = example.tool_schemas()
    return _line(record)


def render_chatml(example: Example, losses: Counter[str]) -> bytes | None:
    """A `text` line that holds the conversation in ChatML, for trainers that take finished text."""
    _count_richness(example, losses)
    turns = [turn for turn in example.turns if not turn.is_empty or turn.role != "assistant"]
    text = "".join(f"<|im_start|>{turn.role}\n{turn.text}<|im_end|>\n" for turn in turns if not turn.tool_calls)
    return _line({"text": text})


FORMATS: Mapping[str, PreparedFormat] = {
    row.name: row
    for row in (
        PreparedFormat("llama.cpp", ".txt", "llama.cpp finetune --sample-start '### Instruction'", render_block, b"\n"),
        PreparedFormat("axolotl", ".jsonl", "Axolotl, datasets: type: chat_template (messages)", render_messages),
        PreparedFormat("unsloth", ".jsonl", "Unsloth, column conversations of role and content", render_conversations),
        PreparedFormat("chatml", ".jsonl", "any trainer that takes finished text, column text, ChatML", render_chatml),
        PreparedFormat("alpaca", ".jsonl", "any trainer that takes instruction, input and output", render_alpaca),
    )
}


def parse_formats(text: str) -> tuple[PreparedFormat, ...]:
    """`"llama.cpp,axolotl"` as rows of `FORMATS`.

    Raises:
        UsageError: an unknown name, or none.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in FORMATS:
            raise UsageError(
                f"There is no format {name!r}",
                why=f"Known formats: {', '.join(FORMATS)}.",
                next="ollama-forge prepare-training-data --list-formats",
            )
    if not names:
        raise UsageError("No format was named", next="Example: --format llama.cpp")
    return tuple(FORMATS[name] for name in names)


def line_format(target: str, *, keep_history: bool = False) -> PreparedFormat:
    """JSON lines of `alpaca` or `messages`, as people keep their own data.

    Raises:
        UsageError: another target, or a history where the form has one anyway.
    """
    if target == "messages" and not keep_history:
        return PreparedFormat("messages", ".jsonl", "messages lines", render_messages)
    if target != "alpaca":
        raise UsageError(
            f"--to {target!r} with --keep-history" if keep_history else f"There is no form {target!r}",
            why="Messages hold the whole conversation anyway; alpaca and messages are known.",
            next="Leave --keep-history out, or say --to alpaca.",
        )
    render = functools.partial(render_alpaca, keep_history=keep_history)
    return PreparedFormat("alpaca", ".jsonl", "Alpaca lines", render)


def _last_round(example: Example, losses: Counter[str]) -> _Round | None:
    """The last user turn with text that an assistant answers; of several answers to it the last one."""
    turns = example.turns
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and not _is_mute(turn)]
    answer = answers[-1] if answers else 0
    questions = [i for i, turn in enumerate(turns[:answer]) if turn.role == "user" and not turn.is_empty]
    if not questions:
        losses["no answer"] += 1
        return None
    question = questions[-1]
    _count_richness(example, losses)
    if answer != len(turns) - 1:
        losses["after the answer"] += 1
    system = "\n\n".join(turn.content for turn in turns if turn.role in ("system", "developer") and turn.content)
    return _Round(
        turns[question].content, turns[question].material, turns[answer].content, system, _pairs(turns[:question])
    )


def _is_mute(turn: Turn) -> bool:
    return not turn.content.strip()


def _pairs(turns: tuple[Turn, ...]) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    question = ""
    for turn in turns:
        if turn.role == "user":
            question = f"{question}\n\n{turn.text}" if question else turn.text
        elif turn.role == "assistant" and not _is_mute(turn):
            pairs.append((question, turn.content))
            question = ""
    return (*pairs, (question, "")) if question else tuple(pairs)


def _material_with_system(last: _Round, losses: Counter[str]) -> str:
    if not last.system:
        return last.material
    losses["system as input"] += 1
    return f"{last.system}\n\n{last.material}" if last.material else last.system


def _count_richness(example: Example, losses: Counter[str]) -> None:
    if example.tools or any(turn.tool_calls or turn.role == "tool" for turn in example.turns):
        losses["tools"] += 1
    if any(turn.reasoning for turn in example.turns):
        losses["reasoning"] += 1
    if any(not turn.is_learnt for turn in example.turns):
        losses["not learnt"] += 1


def _line(record: Mapping[str, Any]) -> bytes:
    return _text_bytes(json.dumps(record, ensure_ascii=False) + "\n")


def _text_bytes(text: str) -> bytes:
    return text.encode("utf-8")
