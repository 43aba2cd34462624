"""Where each answer stands in the text that a chat template makes of a conversation.

In: a way to render, and the conversation. Out: for each assistant turn the characters that the model would have to
write: from the end of the prompt that asks for this answer to the end of the turn. Most templates have no
`{% generation %}` marks, so the places are found by rendering the beginnings of the conversation and checking,
character by character, that each is the beginning of the whole. Where a template shows a turn differently once more
turns follow (thinking that is stripped, a system prompt that moves), the answer is found by changing it and looking
where the text changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import TemplateError

Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
"""(messages, add_generation_prompt) -> text; raises TemplateError."""


@dataclass(frozen=True)
class Answer:
    """The place of an assistant turn.

    Attributes:
        turn: index of the message.
        start, end: characters of the text; `end` may lie behind the token that ends the turn, or just before it.
        is_exact: what stands before `start` is the prompt that the engine sends when it asks for this answer, and what
            follows is what the template shows of the answer when it has just been given.
    """

    turn: int
    start: int
    end: int
    is_exact: bool


def locate_answer(render: Render, messages: Sequence[Mapping[str, Any]], text: str, turn: int) -> Answer | None:
    """The place of one assistant turn; None where it cannot be told exactly.

    Args:
        render: the template.
        messages: the conversation.
        text: of the whole conversation.
        turn: index of an assistant message.
    """
    prompt = _try(render, messages[:turn], True)
    is_last = turn == len(messages) - 1
    said = text if is_last else _try(render, messages[: turn + 1], False)
    follows_prompt = prompt is not None and text.startswith(prompt)
    if follows_prompt and prompt is not None and said is not None and text.startswith(said) and len(said) > len(prompt):
        return Answer(turn, len(prompt), len(said), is_exact=True)
    found = _probe(render, messages, text, turn)
    if found is None:
        return None
    start, end = found
    if follows_prompt and prompt is not None and len(prompt) <= start:
        return Answer(turn, len(prompt), end, is_exact=said is not None and said.startswith(text[:end]))
    if prompt is not None and said is not None and said.startswith(prompt):
        lead = said[len(prompt) : max(said.find(text[start:end], len(prompt)), len(prompt))]
        if lead and text[:start].endswith(lead):
            start -= len(lead)
    return Answer(turn, start, end, is_exact=False)


def missing_prompt(render: Render, messages: Sequence[Mapping[str, Any]], text: str, answer: Answer) -> str:
    """What the prompt that asks for an answer has in it and the finished text lacks, right before the answer.

    Some templates write more when they ask (an opened or an empty thought) than they show of a turn that was answered.
    """
    prompt = _try(render, messages[: answer.turn], True)
    if prompt is None or text.startswith(prompt) or not prompt.startswith(text[: answer.start]):
        return ""
    return prompt[answer.start :]


def _try(render: Render, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str | None:
    try:
        return render(messages, add_generation_prompt)
    except TemplateError:
        return None


def _probe(render: Render, messages: Sequence[Mapping[str, Any]], text: str, turn: int) -> tuple[int, int] | None:
    """The characters that change with the content of a turn; None unless they are a part of that content alone."""
    content = messages[turn].get("content")
    if not isinstance(content, str) or not content.strip() or messages[turn].get("tool_calls"):
        return None
    visible = content.strip()
    start, end_distance = len(text), len(text)
    for stand_in in _stand_ins(visible):
        changed = [*messages[:turn], {**messages[turn], "content": stand_in}, *messages[turn + 1 :]]
        other = _try(render, changed, False)
        if other is None or other == text:
            return None
        start = min(start, _shared_length(text, other))
        end_distance = min(end_distance, _shared_length(text[::-1], other[::-1]))
    end = len(text) - end_distance
    place = text[start:end]
    if not place.strip() or not visible.endswith(place.strip()):
        return None
    return start, end


def _stand_ins(content: str) -> tuple[str, str]:
    """Two texts that begin and end otherwise than the content and than each other."""
    letters = [letter for letter in "qzjxkv" if letter not in (content[0], content[-1])]
    return letters[0] + "stand-in" + letters[1], letters[2] + "stand-in" + letters[3]


def _shared_length(first: str, second: str) -> int:
    """How many characters two texts share from their beginning on."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
