"""Ask a model: one question or a conversation, through the embedded engine or a running Ollama.

In: a `ResolvedModel` (or a name, for a server) and parameters. Out: `Answer` for each question.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ollama_forge.engine import Engine, Sampling, loading_from_parameters, open_engine, sampling_from_parameters
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.modelfile import Message
from ollama_forge.store.server import OllamaServer

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What the model said. `stop_reason` is `stop` or `length`."""

    text: str
    tokens: int
    stop_reason: str
    prompt_tokens: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "stop_reason": self.stop_reason,
            "prompt_tokens": self.prompt_tokens,
            "seconds": round(self.seconds, 3),
        }


class Chat(Protocol):
    """Something that answers, and remembers what was said."""

    def ask(self, prompt: str, on_text: OnText | None = None) -> Answer: ...


@dataclass
class EngineChat:
    """A conversation with the embedded engine.

    Attributes:
        is_plain: the model has no Jinja template, so the prompt goes in as it is.
    """

    engine: Engine
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)
    is_plain: bool = False

    def ask(self, prompt: str, on_text: OnText | None = None) -> Answer:
        """Answer `prompt` in the light of what was said before."""
        turns = [*self.messages, Message("user", prompt)]
        if self.is_plain:
            system = "".join(turn.content + "\n\n" for turn in turns if turn.role == "system")
            said = self.engine.generate(system + prompt, self.sampling, on_text=on_text)
        else:
            documents = [{"role": turn.role, "content": turn.content} for turn in turns]
            said = self.engine.chat(documents, self.sampling, on_text, reuse_prompt=len(turns) > 2)
            self.messages = [*turns, Message("assistant", said.text)]
        return Answer(said.text, said.n_tokens, said.stop_reason, said.prompt_tokens, said.seconds)


@dataclass
class ServerChat:
    """A conversation with a model of a running Ollama, which adds the model's own system prompt and parameters."""

    server: OllamaServer
    name: str
    options: Mapping[str, Any]
    messages: list[Message] = field(default_factory=list)

    def ask(self, prompt: str, on_text: OnText | None = None) -> Answer:
        """Answer `prompt` in the light of what was said before."""
        self.messages.append(Message("user", prompt))
        documents = [{"role": turn.role, "content": turn.content} for turn in self.messages]
        said = self.server.chat(self.name, documents, options=self.options, on_text=on_text)
        self.messages.append(Message("assistant", said.text))
        return Answer(said.text, said.n_tokens, said.stop_reason, said.prompt_tokens, said.seconds)


@contextlib.contextmanager
def open_chat(
    model: ResolvedModel,
    *,
    parameters: Mapping[str, Any],
    system: str | None = None,
    adapters: tuple[Path, ...] = (),
    raw: bool = False,
) -> Iterator[EngineChat]:
    """Load a model for questions; its own parameters apply first, then `parameters`.

    Args:
        system: replaces the model's system prompt.
        adapters: LoRA GGUFs on top of the model's own.
        raw: send prompts as they are, without the chat template.
    """
    assert model.gguf_path is not None
    merged = {**dict(model.modelfile.parameters), **parameters}
    with open_gguf(model.gguf_path) as gguf:
        has_template = "tokenizer.chat_template" in gguf.metadata
    loading: dict[str, Any] = loading_from_parameters(merged)
    paths = [(path, 1.0) for path in (*model.adapters, *adapters)]
    with open_engine(model.gguf_path, adapters=paths, projector=model.projector, **loading) as engine:
        sampling = sampling_from_parameters(merged)
        if sampling.max_tokens is None:
            sampling = replace(sampling, max_tokens=engine.context_length)
        yield EngineChat(engine, sampling, opening_turns(model, system), is_plain=raw or not has_template)


def opening_turns(model: ResolvedModel, system: str | None = None) -> list[Message]:
    """What stands before the first question: the system prompt, then the model's own example turns."""
    prompt = model.modelfile.system if system is None else system
    turns = [Message("system", prompt)] if prompt else []
    return [*turns, *model.modelfile.messages]
