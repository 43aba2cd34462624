"""What a model answers to a list of prompts: greedily, in full, through the engine, as `ollama run` would be answered.

In: a `ResolvedModel` and prompts. Out: a `GivenAnswer` for each, in their order. The model's own system prompt, example
turns, stop strings and adapter layers count: what is asked is the artefact that ships, not a part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ollama_forge.engine import GREEDY, Engine, loading_from_parameters, open_engine, sampling_from_parameters
from ollama_forge.errors import DatasetError, TemplateError
from ollama_forge.files import Progress, no_progress
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.jobs.run import opening_turns
from ollama_forge.jobs.scratch import scratch_folder

LEAST_ROOM_TOKENS = 16
"""A prompt that leaves less of the context than this cannot be answered."""

OnAnswer = Callable[[int, int], None]
"""Called after each answer with how many are there, and how many there will be."""


@dataclass(frozen=True)
class GivenAnswer:
    """One answer.

    Attributes:
        prompt: as the file has it.
        text: what the model said; thoughts included.
        prompt_ids: what it read, the begin token included.
        token_ids: what it generated, the end token included.
        stopped: it ended by itself.
    """

    prompt: str
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    stopped: bool


@contextlib.contextmanager
def as_gguf(model: ResolvedModel, progress: Progress = no_progress) -> Iterator[ResolvedModel]:
    """The model with a GGUF that the engine can open; a Hugging Face folder is converted for that long."""
    if model.folder is None:
        yield model
        return
    with scratch_folder() as scratch:
        path = scratch / "model.gguf"
        convert_folder(model.folder, path, ConvertOptions(), progress=progress)
        yield replace(model, gguf_path=path, folder=None)


def ask_prompts(
    model: ResolvedModel,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    raw: bool = False,
    on_answer: OnAnswer | None = None,
) -> list[GivenAnswer]:
    """Ask them all, one after the other, each as a conversation of its own.

    Args:
        max_tokens: of an answer; it may end earlier, by itself or with the context.
        raw: prompts go in as they are, without the chat template.

    Raises:
        TemplateError: the model has no chat template and `raw` is false.
        DatasetError: a prompt does not fit the context; which one is said.
        EngineError: llama.cpp cannot load or run the model.
    """
    assert model.gguf_path is not None
    if not raw:
        require_template(model)
    parameters = dict(model.modelfile.parameters)
    loading: dict[str, Any] = loading_from_parameters(parameters)
    sampling = replace(
        sampling_from_parameters(parameters),
        temperature=GREEDY.temperature,
        seed=GREEDY.seed,
        max_tokens=max_tokens,
    )
    with open_engine(model.gguf_path, adapters=[(path, 1.0) for path in model.adapters], **loading) as engine:
        rendered = [_render(engine, model, prompt, raw) for prompt in prompts]
        ids = [tuple(engine.tokenize(text, add_special=True)) for text in rendered]
        _require_room(engine, model, prompts, ids)
        answers = []
        for prompt, text, prompt_ids in zip(prompts, rendered, ids, strict=True):
            said = engine.generate(list(prompt_ids), sampling)
            # A template that opens the thoughts itself leaves only their end in the answer.
            opened = "<think>" if text.rstrip().endswith("<think>") else ""
            stopped = said.stop_reason == "stop"
            answers.append(GivenAnswer(prompt, opened + said.text, prompt_ids, said.token_ids, stopped))
            if on_answer:
                on_answer(len(answers), len(prompts))
    return answers


def require_template(model: ResolvedModel) -> None:
    """Refuse a model that nobody can talk to.

    Raises:
        TemplateError: its GGUF holds no chat template.
    """
    assert model.gguf_path is not None
    with open_gguf(model.gguf_path) as gguf:
        if "tokenizer.chat_template" in gguf.metadata:
            return
    raise TemplateError(
        f"{model.text!r} has no chat template",
        why="Refusals are what a chat model answers to a user's turn; a base model continues text.",
        next="Add --raw to send the prompts as they are, or choose a chat model: ollama-forge list",
    )


def _render(engine: Engine, model: ResolvedModel, prompt: str, raw: bool) -> str:
    before = opening_turns(model)
    if raw:
        return "".join(turn.content + "\n\n" for turn in before if turn.role == "system") + prompt
    turns = [{"role": turn.role, "content": turn.content} for turn in before]
    return engine.apply_template([*turns, {"role": "user", "content": prompt}])


def _require_room(engine: Engine, model: ResolvedModel, prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    for number, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True), start=1):
        if len(tokens) + LEAST_ROOM_TOKENS > engine.context_length:
            raise DatasetError(
                f"Prompt {number} has {len(tokens):,} tokens, and the context of {model.text!r} has "
                f"{engine.context_length:,}: {prompt[:60]!r}",
                why="Nothing is cut off a prompt in silence: another prompt would be measured.",
                next="Shorten or remove it, or give the model a longer context (--num-ctx of create-from-base).",
            )
