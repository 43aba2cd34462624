"""Files of prompts and conversations as windows on which models are compared.

In: a `.txt` with a prompt in each line, or a `.jsonl` whose lines have a `prompt`, a `text`, `messages` or any other
form that training data has; and a `ChatFormat`. Out: windows in the model's own chat template, as the engine sends it.
A line with an answer is scored on the answer, any other on the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.dataset.chat_format import ChatFormat
from ollama_forge.dataset.examples import Example, Source
from ollama_forge.dataset.prompts import JSON_ENDINGS, KEYS, find_prompt_files, read_prompts
from ollama_forge.dataset.read import read_batches
from ollama_forge.dataset.records import parse_record
from ollama_forge.dataset.render import render_example, render_prompt
from ollama_forge.dataset.windows import Window, make_window, text_ids
from ollama_forge.errors import DatasetError

_ANSWER_KEYS = ("completion", "response", "answer")


@dataclass(frozen=True)
class PromptWindows:
    """What a file of prompts became.

    Attributes:
        windows: in the order of the file.
        n_answered: of them, how many are scored on an answer.
        n_too_long: prompts that were left out because they are longer than the context.
    """

    windows: tuple[Window, ...]
    n_answered: int
    n_too_long: int


def prompt_windows(path: Path, chat_format: ChatFormat, context: int) -> PromptWindows:
    """Render every line.

    Args:
        context: tokens; a longer prompt is left out and counted.

    Raises:
        DatasetError: a line that is neither a prompt nor a conversation, or nothing that could be scored.
        TemplateError: the template refuses a conversation.
        NotFoundError, DiskError: as `dataset.prompts`.
    """
    windows = []
    n_answered = n_too_long = longest = 0
    for path_ in find_prompt_files([path]):
        for item in _read_items(path_):
            window = _render(chat_format, item)
            longest = max(longest, len(window.input_ids))
            if len(window.input_ids) > context:
                n_too_long += 1
            elif window.n_scored:
                windows.append(window)
                n_answered += isinstance(item, Example)
    if not windows:
        raise DatasetError(
            f"{str(path)!r} holds nothing that can be scored",
            why=f"{n_too_long:,} prompts are longer than the context of {context:,} tokens (the longest has "
            f"{longest:,})."
            if n_too_long
            else "Its prompts have fewer than two tokens each.",
            next=f"Raise --context to {longest}, or shorten them."
            if n_too_long
            else "Write longer prompts, one in a line.",
        )
    return PromptWindows(tuple(windows), n_answered, n_too_long)


def _read_items(path: Path) -> Iterator[Example | str]:
    if path.suffix.lower() not in JSON_ENDINGS:
        yield from read_prompts([path], at_least=1)
        return
    for batch in read_batches(path):
        for line, reason in batch.problems:
            raise _bad_line(Source(path, line), reason)
        for value, line in zip(batch.values, batch.lines, strict=True):
            yield _parse_item(value, Source(path, line))


def _parse_item(value: Any, source: Source) -> Example | str:
    if isinstance(value, Mapping):
        answer = next((value[key] for key in _ANSWER_KEYS if key in value), None)
        if "prompt" in value and answer is not None:
            value = {"prompt": value["prompt"], "completion": answer}
        elif not any(key in value for key in KEYS):
            return _parse_conversation(value, source)
        else:
            value = next(value[key] for key in KEYS if key in value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    return _parse_conversation(value, source)


def _parse_conversation(value: Any, source: Source) -> Example | str:
    """An example, or the question of a conversation that nobody has answered yet."""
    messages = value.get("messages") if isinstance(value, Mapping) else None
    if isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], Mapping):
        content = messages[0].get("content")
        if messages[0].get("role") == "user" and isinstance(content, str) and content.strip():
            return content.strip()
    try:
        return parse_record(value, source, ignore_extra=True)
    except DatasetError as exc:
        raise _bad_line(source, exc.what) from exc


def _bad_line(source: Source, reason: str) -> DatasetError:
    return DatasetError(
        f"{source}: {reason}",
        why="A line is a prompt, or a conversation with an answer.",
        next='Write {"prompt": "..."}, {"prompt": "...", "completion": "..."} or {"messages": [...]} in each line.',
    )


def _render(chat_format: ChatFormat, item: Example | str) -> Window:
    if isinstance(item, Example):
        rendered = render_example(chat_format, item)
        return Window(rendered.input_ids, rendered.labels)
    if chat_format.template is None:
        return make_window(text_ids(chat_format.tokenizer, item))
    return make_window(render_prompt(chat_format, [{"role": "user", "content": item}]))
