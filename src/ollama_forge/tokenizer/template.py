"""Chat templates: from the files of a model or from a GGUF, to the text that the model reads.

In: a Jinja source and a conversation. Out: the text, and on request the places that `{% generation %}` marks, equal
to what transformers' `apply_chat_template` gives. Rendering is sandboxed and bounded (`sandbox.py`). Which text is
trained on is the business of `dataset/`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from ollama_forge.errors import NotFoundError, TemplateError
from ollama_forge.tokenizer.folder import TokenizerFolder, read_tokenizer_folder, token_text
from ollama_forge.tokenizer.meter import LimitReached, Meter
from ollama_forge.tokenizer.sandbox import MAX_SOURCE_CHARS, Refused, TemplateEnvironment
from ollama_forge.tokenizer.special import read_templates

MAX_DEPTH = 64
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_GGUF_ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are (start, end) in characters of what `{% generation %}` encloses."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """One template with the tokens that it may name.

    Attributes:
        source: Jinja.
        bos_token, eos_token: what the variables of those names hold; None leaves one undefined.
        extra: more variables, as transformers passes them (`pad_token`, ...).
        now: the clock of `strftime_now`.
    """

    source: str
    bos_token: str | None = ""
    eos_token: str | None = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    now: Callable[[], datetime] = datetime.now

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: plain values (text, numbers, lists, mappings) only.
            add_generation_prompt: end with what makes the model answer.
            tools: JSON schemas of functions.
            variables: further variables of the template, such as `enable_thinking`.

        Raises:
            TemplateError: the template is broken, refuses the conversation, tries to leave the sandbox, or wants more
                time or text than it may have.
        """
        return self.render_spans(messages, add_generation_prompt, tools, **variables).text

    def render_for_engine(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_thinking: bool = False,
    ) -> Rendered:
        """As llama.cpp's server renders it (common/chat.cpp): `enable_thinking` is always set, to whether the template
        knows thinking; `tools` and `add_generation_prompt` are undefined, not None or false, when there is nothing to
        say. transformers does it the other way round, and some templates tell the difference.

        Raises:
            TemplateError: as `render`.
        """
        absent = [*([] if tools else ["tools"]), *([] if add_generation_prompt else ["add_generation_prompt"])]
        return self.render_spans(
            messages, add_generation_prompt, tools or None, absent=absent, enable_thinking=enable_thinking
        )

    def render_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        absent: Sequence[str] = (),
        **variables: Any,
    ) -> Rendered:
        """The text and what `{% generation %}` encloses in it; the variables in `absent` are left undefined.

        Raises:
            TemplateError: as `render`; also when a marked part does not reach the text as it is.
        """
        compiled = _compile(self.source, self.now)
        environment = compiled.environment
        if not isinstance(environment, TemplateEnvironment):
            raise TypeError("a template was compiled outside its environment")
        named: dict[str, Any] = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        named = {name: value for name, value in named.items() if value is not None}
        plain = [_plain_message(message) for message in messages]
        plain_tools = None if tools is None else [_plain(tool) for tool in tools]
        values = {
            **named,
            **dict(self.extra),
            **variables,
            "messages": plain,
            "tools": plain_tools,
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        values = {name: value for name, value in values.items() if name not in absent}
        meter = Meter(_size(plain) + _size(plain_tools))
        environment.meter = meter
        parts: list[str] = []
        try:
            for part in compiled.generate(values):
                parts.append(part)
                meter.emitted += len(part)
        except _FAILURES as exc:
            raise _explain(exc) from exc
        finally:
            environment.meter = None
        text = "".join(parts)
        for start, end, enclosed in meter.spans:
            if text[start:end] != enclosed:
                raise TemplateError(
                    "The chat template changes what its {% generation %} block encloses",
                    why="A macro, a `set` block or a filter stands around the block, so its place is not known.",
                    next="Move {% generation %} out of it.",
                )
        return Rendered(text, tuple((start, end) for start, end, _ in meter.spans))


def read_chat_template(
    folder: Path, name: str | None = None, *, now: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """The template of a Hugging Face folder.

    Args:
        folder: where tokenizer_config.json or chat_template.jinja is.
        name: of a template beside the main one.
        now: the clock of `strftime_now`.

    Raises:
        NotFoundError: the folder has no template, or none of that name.
        TokenizerError: a file is broken.
    """
    files = read_tokenizer_folder(folder)
    templates = dict(read_templates(files))
    source = _choose(templates, name, str(folder))
    tokens = _special_tokens(files)
    return ChatTemplate(source, tokens.pop("bos_token", None), tokens.pop("eos_token", None), tokens, now)


def read_gguf_template(
    metadata: Mapping[str, Any], name: str | None = None, *, now: Callable[[], datetime] = datetime.now
) -> ChatTemplate:
    """The template in the metadata of a GGUF, with the tokens that its ids name.

    Raises:
        NotFoundError: there is no template, or none of that name.
    """
    prefix = "tokenizer.chat_template"
    templates = {key[len(prefix) + 1 :]: metadata[key] for key in metadata if key.startswith(prefix + ".")}
    if prefix in metadata:
        templates["default"] = metadata[prefix]
    source = _choose({key: value for key, value in templates.items() if isinstance(value, str)}, name, "this GGUF")
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    named: dict[str, str] = {}
    for role, key in _GGUF_ROLES.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and 0 <= token_id < len(tokens):
            named[f"{role}_token"] = str(tokens[token_id])
    return ChatTemplate(source, named.pop("bos_token", ""), named.pop("eos_token", ""), named, now)


def validate_template(source: str) -> None:
    """Parse a template.

    Raises:
        TemplateError: it is too long, or does not parse.
    """
    _compile(source, datetime.now)


@functools.lru_cache(maxsize=32)
def _compile(source: str, now: Callable[[], datetime]) -> jinja2.Template:
    if len(source) > MAX_SOURCE_CHARS:
        raise TemplateError(
            f"The chat template has {len(source):,} characters",
            why=f"{MAX_SOURCE_CHARS:,} are allowed.",
            next="Use a shorter template.",
        )
    try:
        return TemplateEnvironment(now).from_string(source)
    except _FAILURES as exc:
        raise _explain(exc) from exc


def _explain(exc: BaseException) -> TemplateError:
    if isinstance(exc, Refused):
        return TemplateError(
            f"The chat template refuses this conversation: {exc.message!r}",
            why="The template's author rules out such a sequence of messages.",
            next="Change the messages, or use another template.",
        )
    if isinstance(exc, LimitReached):
        return TemplateError(
            f"The chat template was stopped: {exc.message}",
            why="A template that a stranger wrote gets only so much work.",
            next="Look at the template (`ollama-forge show MODEL`); a normal one needs far less.",
        )
    if isinstance(exc, jinja2.exceptions.SecurityError):
        return TemplateError(
            f"The chat template tries to reach outside its sandbox: {exc.message}",
            why="No honest template does this.",
            next="Do not use this model's template, and doubt the rest of the model.",
        )
    if isinstance(exc, jinja2.TemplateSyntaxError):
        return TemplateError(
            f"The chat template does not parse: line {exc.lineno}: {exc.message}",
            next="Mend the template, or give another one.",
        )
    if isinstance(exc, RecursionError):
        return TemplateError("The chat template was stopped: it nests too deeply", next="Mend the template.")
    return TemplateError(
        f"The chat template fails on this conversation: {type(exc).__name__}: {exc}",
        why="It expects other messages, or it has a mistake.",
        next="Compare the messages with what the template reads (`ollama-forge show MODEL`).",
    )


def _choose(templates: Mapping[str, str], name: str | None, where: str) -> str:
    wanted = name or "default"
    if wanted in templates:
        return templates[wanted]
    raise NotFoundError(
        f"There is no chat template {wanted!r} in {where!r}"
        if templates
        else f"There is no chat template in {where!r}",
        why=f"It has: {', '.join(sorted(templates))}." if templates else "It is a base model, or the template is lost.",
        next="Give a template of your own.",
    )


def _special_tokens(files: TokenizerFolder) -> dict[str, Any]:
    """The variables that transformers hands to a template."""
    found: dict[str, Any] = {}
    for role in _ROLES:
        text = token_text(files.settings.get(f"{role}_token")) or token_text(files.special.get(f"{role}_token"))
        if text is not None:
            found[f"{role}_token"] = text
    return found


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that hold nothing, and with its reasoning under the names that templates know."""
    plain = {str(key): _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_FIELDS if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of JSON-like values, so that no method of a richer object is in a template's reach."""
    if depth > MAX_DEPTH:
        raise TemplateError(
            f"The messages nest more than {MAX_DEPTH} levels deep", next="Check the data that the messages come from."
        )
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, depth + 1): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, depth + 1) for item in value]
    raise TemplateError(
        f"A message holds a {type(value).__name__}, and only text, numbers, lists and mappings are allowed",
        next="Convert it to one of these.",
    )


def _size(value: Any) -> int:
    return len(json.dumps(value, default=str)) if value else 0
