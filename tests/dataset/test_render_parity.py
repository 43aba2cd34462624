"""What is trained on is what will be sent: token by token, for every family, judged by the engine itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from ollama_forge.convert.plan import plan_conversion
from ollama_forge.dataset.chat_format import open_chat_format
from ollama_forge.dataset.examples import Example, Source, Turn
from ollama_forge.dataset.render import NOT_LEARNT, render_example, render_prompt
from ollama_forge.engine import Engine, open_engine
from ollama_forge.errors import EngineError, TemplateError
from ollama_forge.files import atomic_output
from ollama_forge.gguf.writer import write_gguf

CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "What is two plus three? It's <b>5</b>?"}],
    "two rounds": [
        {"role": "user", "content": "Grüße aus Köln: 今日は 🚀"},
        {"role": "assistant", "content": "It is five."},
        {"role": "user", "content": "def add(first, second):\n\treturn first  +  second"},
    ],
    "system": [
        {"role": "system", "content": "Be kind.\nAlways."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Where is Paris?"},
    ],
}
ANSWER = "Paris is the capital of France."


@pytest.fixture(scope="module", params=tiny_models.KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    """A family's folder, and the engine that runs the GGUF made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_models.build_model(request.param, folder)
    path = folder / "model.gguf"
    with plan_conversion(folder) as conversion, atomic_output(path) as sink:
        write_gguf(sink, conversion.fields, conversion.entries)
    with open_engine(path, context_length=256) as engine:
        yield path, engine


@pytest.mark.parametrize("chat", CHATS)
def test_the_prompt_trained_on_is_the_prompt_that_the_engine_sends(model: tuple[Path, Engine], chat: str) -> None:
    path, engine = model
    chat_format = open_chat_format(path)
    messages = CHATS[chat]
    if chat_format.template is None:
        with pytest.raises(EngineError):
            engine.apply_template(messages)
        with pytest.raises(TemplateError):
            render_prompt(chat_format, messages)
        return
    sent = engine.tokenize(engine.apply_template(messages), add_special=True)
    assert render_prompt(chat_format, messages) == sent
    turns = tuple(Turn(message["role"], message["content"]) for message in messages)
    example = Example((*turns, Turn("assistant", ANSWER)), Source(path, 1))
    rendered = render_example(chat_format, example)
    assert list(rendered.input_ids[: len(sent)]) == sent
    learnt = [token for token in rendered.labels[len(sent) :] if token != NOT_LEARNT]
    assert learnt == list(rendered.input_ids[len(sent) : len(sent) + len(learnt)])
    assert engine.detokenize(learnt[:-1]).strip() == ANSWER
    assert learnt[-1] in chat_format.end_ids


def test_a_folder_and_the_gguf_made_of_it_read_alike(model: tuple[Path, Engine]) -> None:
    path, _ = model
    turns = (Turn("user", "Where is Paris?"), Turn("assistant", ANSWER))
    example = Example(turns, Source(path, 1))
    from_file, from_folder = (render_example(open_chat_format(place), example) for place in (path, path.parent))
    assert from_file == from_folder


def test_a_template_free_model_reads_a_completion_as_the_engine_reads_its_text(model: tuple[Path, Engine]) -> None:
    path, engine = model
    chat_format = open_chat_format(path)
    if chat_format.template is not None:
        return
    example = Example(
        (Turn("user", "Paris is the"), Turn("assistant", " capital of France.")), Source(path, 1), (), True
    )
    rendered = render_example(chat_format, example)
    assert list(rendered.input_ids) == [
        *engine.tokenize("Paris is the capital of France.", add_special=True),
        chat_format.tokenizer.eos_id,
    ]
    n_prompt = len(engine.tokenize("Paris is the", add_special=True))
    assert [label != NOT_LEARNT for label in rendered.labels] == [
        index >= n_prompt for index in range(len(rendered.labels))
    ]
