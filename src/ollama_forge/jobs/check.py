"""Prove that a model works before it gets its name: it loads, its prompt is the training prompt, it answers and stops.

In: an installed model that nobody sees yet. Out: `CheckReport`; a prompt that differs, or an answer that is not made of
numbers, is a `CheckError`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ollama_forge.errors import CheckError, TemplateError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.installed import InstalledModel

if TYPE_CHECKING:
    from ollama_forge.engine import Engine, Generation

CHECK_TOKENS = 48
CHECK_CONTEXT = 1024
QUESTION = "Hello! Who are you?"


@dataclass(frozen=True)
class CheckReport:
    """What the check saw.

    Attributes:
        loaded: llama.cpp opened it.
        template: `equal` (two renderers agree), `none` (no chat template), or `unrendered` (ours refuses the turns).
        stopped: it ended by itself within `CHECK_TOKENS` tokens; a base model often does not.
        sample: what it said.
    """

    loaded: bool
    template: str
    stopped: bool
    sample: str

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "loaded": self.loaded,
            "template": self.template,
            "stopped": self.stopped,
            "sample": self.sample,
        }


def check_model(model: InstalledModel, source: str | None = None) -> CheckReport:
    """Load, compare prompts, generate.

    Args:
        source: what the errors call the weights; their blob by default.

    Raises:
        EngineError: llama.cpp refuses the model.
        CheckError: the prompt that the engine sends differs from the one the template means, or the model computes
            no numbers.
    """
    from ollama_forge.engine import GREEDY, open_engine, sampling_from_parameters  # many commands never come here

    assert model.model_path is not None
    adapters = [(path, 1.0) for path in model.adapters]
    sampling = replace(
        sampling_from_parameters(dict(model.parameters)), temperature=GREEDY.temperature, max_tokens=CHECK_TOKENS
    )
    with open_engine(model.model_path, adapters=adapters, context_length=CHECK_CONTEXT) as engine:
        system = [{"role": "system", "content": model.system}] if model.system else []
        template = compare_prompts(model, engine)
        if template == "none":
            said = engine.generate(QUESTION, sampling, n_logprobs=1)
        else:
            said = engine.chat([*system, {"role": "user", "content": QUESTION}], sampling, n_logprobs=1)
    _require_numbers(said, source or str(model.model_path))
    return CheckReport(loaded=True, template=template, stopped=said.stop_reason == "stop", sample=said.text)


def _require_numbers(said: Generation, source: str) -> None:
    """The likeliest token of a model that works has a probability; NaN in its weights leaves it none."""
    if not all(math.isfinite(token.logprob) for token in said.logprobs):
        raise CheckError(
            f"{source!r} computes no numbers: its probabilities are NaN, so it was not landed",
            why=f"Some weights are not finite: the file is damaged, or its training diverged. It says "
            f"{said.text[:20]!r}.",
            next="Get the model again, and check it where it came from.",
        )


def compare_prompts(model: InstalledModel, engine: Engine) -> str:
    """Whether the sandboxed template and the engine write the same prompt for a short conversation.

    Raises:
        CheckError: they differ; the error shows both.
    """
    from ollama_forge.tokenizer.template import read_gguf_template

    assert model.model_path is not None
    with open_gguf(model.model_path) as gguf:
        if "tokenizer.chat_template" not in gguf.metadata:
            return "none"
        template = read_gguf_template(gguf.metadata)
    turns = [
        {"role": "user", "content": "What is two plus two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": QUESTION},
    ]
    try:
        ours = template.render_for_engine(turns).text
        thinking = template.render_for_engine(turns, enable_thinking=True).text
    except TemplateError:
        return "unrendered"
    theirs = engine.apply_template(turns)
    begin = template.bos_token or ""
    if theirs.removeprefix(begin) not in (ours.removeprefix(begin), thinking.removeprefix(begin)):
        raise CheckError(
            f"The prompt of {model.name.display!r} would not be the one that its template means",
            why=f"The template gives {ours!r}; llama.cpp sends {theirs!r}.",
            next="Report the model, or land it unchecked with --no-check.",
        )
    return "equal"
