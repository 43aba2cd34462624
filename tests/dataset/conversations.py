"""Chat formats and examples for the tests of `dataset`: real tokenizers, templates of every manner."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import tiny_tokenizers

from ollama_forge.dataset.chat_format import ChatFormat, chat_format_of
from ollama_forge.dataset.examples import Example, Source, Turn
from ollama_forge.dataset.records import parse_record
from ollama_forge.dataset.render import RenderedExample
from ollama_forge.tokenizer.vocab import read_vocabulary, vocabulary_fields

HERE = Source(Path("data.jsonl"), 7)

THINKING = """\
{%- set state = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set state.last = loop.index0 %}{%- endif %}\
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > state.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
"""Thoughts are shown of the last answer only; without thinking, the prompt holds an empty one."""

OPENS_THOUGHT = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}
"""
"""The prompt opens a thought; finished turns are shown without theirs."""

MOVES_SYSTEM = """\
{%- set state = namespace(last=-1, guide='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- set state.guide = message.content %}{%- endif %}
    {%- if message.role == 'user' %}{%- set state.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + (state.guide + ' | ' if loop.index0 == state.last and state.guide else '') }}
        {{- message.content + '<|im_end|>' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + '<|endoftext|>' }}
    {%- endif %}
{%- endfor %}
"""
"""The system prompt stands before the last question, wherever that is."""

SHOUTS_HISTORY = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {{- (message.content if loop.last else message.content | upper) + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
"""Earlier turns are shown in capitals: where they stand cannot be told from their text."""

NO_SYSTEM = """\
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- raise_exception('no system here') }}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

NO_END = """\
{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}
"""


@functools.cache
def _metadata(kind: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        n_tokens = tiny_tokenizers.build_tokenizer(kind, Path(folder))
        config = {"model_type": "llama", "vocab_size": n_tokens, **tiny_tokenizers.special_ids(kind)}
        fields = vocabulary_fields(read_vocabulary(Path(folder), config, n_tokens))
    name = "phi-3" if kind == "phi3-spm" else "tiny"
    return {"general.name": name, **{field.key: field.value for field in fields}}


def chat_format(kind: str, template: str | None = None, **changes: Any) -> ChatFormat:
    """The chat format of a tokenizer kind, with its own template or another."""
    metadata = {**_metadata(kind), **changes}
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return chat_format_of({key: value for key, value in metadata.items() if value is not None})


def example(*turns: tuple[str, str], **record: Any) -> Example:
    """An example of (role, text) turns."""
    return Example(tuple(Turn(role, text) for role, text in turns), HERE, **record)


def from_record(record: Any) -> Example:
    """What a JSON record means."""
    return parse_record(record, HERE)


def learnt_pieces(chat: ChatFormat, rendered: RenderedExample) -> list[str]:
    """The stretches of learnt tokens as text; the end token that was added is spelled out."""
    pieces: list[str] = []
    was_learnt = False
    previous_end = 0
    for token_id, label, (start, end) in zip(rendered.input_ids, rendered.labels, rendered.offsets, strict=True):
        assert label in (token_id, -100)
        text = rendered.text[max(start, previous_end) : end]
        if start == end == len(rendered.text):
            text = chat.tokenizer.tokens[token_id]
        previous_end = max(previous_end, end)
        if label != -100:
            if was_learnt:
                pieces[-1] += text
            else:
                pieces.append(text)
        was_learnt = label != -100
    return pieces
