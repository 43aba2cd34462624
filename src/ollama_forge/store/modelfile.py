"""The Modelfile: its text as a frozen value, and back.

Accepted is what Ollama's own state machine accepts (parser/parser.go:427 of v0.33); what a person could mean by a
line that it refuses is not guessed. Two differences, both to lose nothing: several ADAPTER lines are all kept
(Ollama's command line keeps the last), and from texts (TEMPLATE, SYSTEM, LICENSE, MESSAGE, stop) only control
characters are dropped, where Ollama also drops joiners, no-break and ideographic spaces. Either is told in
`Modelfile.warnings`.
"""

from __future__ import annotations

import codecs
import re
import string
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

from ollama_forge.errors import ModelfileError, NotFoundError
from ollama_forge.files import disk_error
from ollama_forge.store.go_json import round_to_float32
from ollama_forge.store.parameters import (
    DEPRECATED_PARAMETERS,
    ParameterValue,
    parse_parameter,
    render_parameter,
)

INSTRUCTIONS = (
    "FROM",
    "LICENSE",
    "TEMPLATE",
    "SYSTEM",
    "ADAPTER",
    "DRAFT",
    "RENDERER",
    "PARSER",
    "PARAMETER",
    "MESSAGE",
    "REQUIRES",
)
ROLES = ("system", "user", "assistant")
MODELFILE_LIMIT_BYTES = 64 << 20
_BLANKS = " \t"
_NEWLINES = "\r\n"
_TRIMMED = _BLANKS + _NEWLINES
_END_OF_LINE = re.compile(r"[\r\n]")
_LETTERS = frozenset(string.ascii_letters)
_PARAMETER_CHARACTERS = _LETTERS | frozenset(string.digits + "_")
_TEXTS = frozenset({"TEMPLATE", "SYSTEM", "LICENSE", "MESSAGE"})
_TRIPLE = '"""'
_VERSION_NUMBER = r"(?:0|[1-9][0-9]*)"
_SEMVER = re.compile(
    rf"v?{_VERSION_NUMBER}(?:\.{_VERSION_NUMBER}(?:\.{_VERSION_NUMBER}"
    r"(?:-[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?)?)?"
)


@dataclass(frozen=True)
class Message:
    """One turn of the conversation that a model starts with."""

    role: str
    content: str


@dataclass(frozen=True)
class Modelfile:
    """What a Modelfile asks for. None means that it says nothing; an empty text is an empty text.

    Attributes:
        sources: what stands behind FROM: a path or a model's name, uninterpreted.
        parameters: typed values sorted by name; `stop` is a tuple of texts.
        warnings: what was understood otherwise than written; not part of the value.
    """

    sources: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    drafts: tuple[str, ...] = ()
    template: str | None = None
    system: str | None = None
    licenses: tuple[str, ...] = ()
    parameters: tuple[tuple[str, ParameterValue], ...] = ()
    messages: tuple[Message, ...] = ()
    renderer: str | None = None
    parser: str | None = None
    requires: str | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Command:
    """One line, or block, of a Modelfile: `key` is a parameter's name or a message's role."""

    instruction: str
    value: str
    line: int
    key: str = ""


def read_modelfile(path: Path) -> Modelfile:
    """Read a Modelfile from disk: UTF-8, or UTF-16 with its byte order mark.

    Raises:
        NotFoundError: no such file.
        ModelfileError: Ollama would refuse it.
    """
    try:
        if path.stat().st_size > MODELFILE_LIMIT_BYTES:
            raise ModelfileError(f"{str(path)!r} is larger than 64 MiB", next="Name a Modelfile, not a model.")
        raw = path.read_bytes()
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no Modelfile {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read the Modelfile") from exc
    return parse_modelfile(decode_modelfile(raw))


def decode_modelfile(raw: bytes) -> str:
    """Bytes to text as Ollama does it: a byte order mark decides, and bytes that are no text become U+FFFD."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):
        if raw.startswith(mark):
            return raw[len(mark) :].decode(encoding, "replace")
    return raw.decode("utf-8", "replace")


def parse_modelfile(text: str) -> Modelfile:
    """Understand a whole Modelfile.

    Raises:
        ModelfileError: with the number of the line that Ollama would refuse.
    """
    reader = _Reader(text)
    commands = reader.read_commands()
    singles: dict[str, str] = {}
    lists: dict[str, list[str]] = {"FROM": [], "ADAPTER": [], "DRAFT": [], "LICENSE": []}
    messages: list[Message] = []
    parameters: dict[str, ParameterValue] = {}
    warnings = reader.warnings()
    for command in commands:
        if command.instruction in lists:
            lists[command.instruction].append(command.value)
        elif command.instruction == "MESSAGE":
            messages.append(Message(command.key, command.value))
        elif command.instruction == "PARAMETER":
            warnings += _add_parameter(parameters, command)
        elif command.instruction == "REQUIRES":
            singles["REQUIRES"] = _parse_requires(command)
        else:
            singles[command.instruction] = command.value
    if not lists["FROM"]:
        raise ModelfileError(
            "The Modelfile has no FROM line",
            why="FROM names the model to start from.",
            next="Add a first line such as: FROM llama3.2",
        )
    if len(lists["ADAPTER"]) > 1:
        warnings.append("Ollama's own `create` would keep only the last ADAPTER line; here all are kept.")
    return Modelfile(
        sources=tuple(lists["FROM"]),
        adapters=tuple(lists["ADAPTER"]),
        drafts=tuple(lists["DRAFT"]),
        template=singles.get("TEMPLATE"),
        system=singles.get("SYSTEM"),
        licenses=tuple(lists["LICENSE"]),
        parameters=tuple(sorted(parameters.items())),
        messages=tuple(messages),
        renderer=singles.get("RENDERER"),
        parser=singles.get("PARSER"),
        requires=singles.get("REQUIRES"),
        warnings=tuple(warnings),
    )


def _add_parameter(parameters: dict[str, ParameterValue], command: Command) -> list[str]:
    if command.key in DEPRECATED_PARAMETERS:
        return [f"Line {command.line}: PARAMETER {command.key} does nothing any more and is left out."]
    try:
        value = parse_parameter(command.key, command.value)
    except ModelfileError as exc:
        raise ModelfileError(f"Line {command.line}: {exc.what}", why=exc.why, next=exc.next) from None
    earlier = parameters.get(command.key)
    if isinstance(value, tuple) and isinstance(earlier, tuple):
        value = earlier + value
    parameters[command.key] = value
    return []


def _parse_requires(command: Command) -> str:
    if not _SEMVER.fullmatch(command.value):
        raise ModelfileError(
            f"Line {command.line}: REQUIRES {command.value[:100]!r} is not a version",
            why="It must be a semantic version.",
            next="Example: REQUIRES 0.14.0",
        )
    return command.value.removeprefix("v")


class _Reader:
    """Walks the text once. A value is looked at whenever a line of it ends, because only then can it be over."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._line = 1
        self._counted_to = 0
        self._n_dropped = 0
        self._n_kept = 0

    def read_commands(self) -> list[Command]:
        commands = []
        while self._skip_to_instruction():
            commands.append(self._read_command())
        return commands

    def warnings(self) -> list[str]:
        told = []
        if self._n_dropped:
            told.append(f"Ollama has no room for control characters in a Modelfile: {self._n_dropped} dropped.")
        if self._n_kept:
            told.append(
                f"Ollama's own `create` would drop {self._n_kept} characters of the texts (joiners, no-break or "
                "ideographic spaces); here they are kept."
            )
        return told

    def _skip_to_instruction(self) -> bool:
        while self._at < len(self._text):
            character = self._text[self._at]
            if character == "#":
                self._skip_line()
            elif character in _BLANKS + _NEWLINES:
                self._at += 1
            else:
                return True
        return False

    def _read_command(self) -> Command:
        line = self._line_number()
        start = self._at
        if not self._text[self._at].isprintable():  # Ollama drops it from the word that it starts
            self._at += 1
        word = self._read_word(_LETTERS).upper()
        if word not in INSTRUCTIONS or not self._take_blank():
            raise ModelfileError(
                f"Line {line}: {self._quote_line(start)} is not an instruction with a value",
                why="A line starts with one of " + ", ".join(INSTRUCTIONS) + ", then a blank and a value.",
                next="Check the line's first word.",
            )
        key = ""
        if word in ("PARAMETER", "MESSAGE"):
            key = self._read_word(_PARAMETER_CHARACTERS if word == "PARAMETER" else _LETTERS)
            if not self._take_blank() or not key or (word == "MESSAGE" and key not in ROLES):
                raise ModelfileError(
                    f"Line {line}: {self._quote_line(start)} cannot be understood",
                    why="It is `PARAMETER name value`, or `MESSAGE role text` with the role system, user or assistant; "
                    "one blank stands before the name or role.",
                    next="Examples: PARAMETER temperature 0.7 / MESSAGE user Hello",
                )
        keeps_spaces = word in _TEXTS or (word, key) == ("PARAMETER", "stop")
        return Command(word, self._read_value(line, start, keeps_spaces), line, key)

    def _read_value(self, line: int, command_start: int, keeps_spaces: bool) -> str:
        """Up to the first end of a line at which the text so far is not inside open quotes."""
        parts: list[str] = []
        quotes: str | None = None
        while True:
            part_start = self._at
            self._skip_line()
            part = self._cleaned(self._text[part_start : self._at], keeps_spaces)
            parts.append(part)
            if quotes is None:
                quotes = _opening_quotes(part.lstrip(_TRIMMED))
                is_closed = len(part.strip(_TRIMMED)) >= 2 * len(quotes)
            else:
                is_closed = True
            if is_closed and part.rstrip(_TRIMMED).endswith(quotes):
                value = "".join(parts).strip(_TRIMMED)
                return value[len(quotes) : len(value) - len(quotes)] if quotes else value
            if self._at >= len(self._text):
                raise ModelfileError(
                    f"Line {line}: the quotes of {self._quote_line(command_start)} are never closed",
                    why="A value that starts with a quote goes on to a line that ends with one.",
                    next=f"Put {_TRIPLE} before and after the value.",
                )
            parts.append(self._text[self._at])
            self._at += 1

    def _cleaned(self, text: str, keeps_spaces: bool) -> str:
        if text.isprintable():
            return text
        kept = []
        for character in text:
            if character.isprintable() or character == "\t":
                kept.append(character)
            elif keeps_spaces and unicodedata.category(character) not in ("Cc", "Cs"):
                kept.append(character)
                self._n_kept += 1
            else:
                self._n_dropped += 1
        return "".join(kept)

    def _read_word(self, alphabet: frozenset[str]) -> str:
        start = self._at
        while self._at < len(self._text) and self._text[self._at] in alphabet:
            self._at += 1
        return self._text[start : self._at]

    def _take_blank(self) -> bool:
        if self._at < len(self._text) and self._text[self._at] in _BLANKS:
            self._at += 1
            return True
        return False

    def _skip_line(self) -> None:
        match = _END_OF_LINE.search(self._text, self._at)
        self._at = match.start() if match else len(self._text)

    def _line_number(self) -> int:
        self._line += self._text.count("\n", self._counted_to, self._at)
        self._counted_to = self._at
        return self._line

    def _quote_line(self, start: int) -> str:
        match = _END_OF_LINE.search(self._text, start)
        return repr(self._text[start : match.start() if match else len(self._text)][:80])


def _opening_quotes(text: str) -> str:
    if text.startswith(_TRIPLE):
        return _TRIPLE
    return '"' if text.startswith('"') else ""


def render_modelfile(modelfile: Modelfile) -> str:
    """Text that `parse_modelfile`, and Ollama, understand as the same value.

    Raises:
        ModelfileError: what no Modelfile can say, such as a line that ends in three quotes, or a newline in a name.
    """
    wanted = _sayable(modelfile)
    lines = [f"FROM {_one_line('FROM', text)}" for text in wanted.sources]
    lines += [f"ADAPTER {_one_line('ADAPTER', text)}" for text in wanted.adapters]
    lines += [f"DRAFT {_one_line('DRAFT', text)}" for text in wanted.drafts]
    for instruction, text in (("TEMPLATE", wanted.template), ("SYSTEM", wanted.system)):
        if text is not None:
            lines.append(f"{instruction} {_block(instruction, text)}")
    for name, value in wanted.parameters:
        for item in value if isinstance(value, tuple) else (value,):
            lines.append(f"PARAMETER {_one_line('PARAMETER', name)} {_text('PARAMETER', render_parameter(item))}")
    for instruction, text in (("RENDERER", wanted.renderer), ("PARSER", wanted.parser), ("REQUIRES", wanted.requires)):
        if text is not None:
            lines.append(f"{instruction} {_one_line(instruction, text)}")
    lines += [f"MESSAGE {_one_line('MESSAGE', turn.role)} {_text('MESSAGE', turn.content)}" for turn in wanted.messages]
    lines += [f"LICENSE {_block('LICENSE', text)}" for text in wanted.licenses]
    rendered = "\n".join(lines) + "\n"
    if parse_modelfile(rendered) != wanted:
        raise _unsayable("a value", "Read back, the Modelfile would not say the same.")
    return rendered


def _sayable(modelfile: Modelfile) -> Modelfile:
    """Without an empty list of stops, and with floats as the 32 bits that Ollama keeps."""
    parameters = tuple(
        (name, round_to_float32(value) if isinstance(value, float) else value)
        for name, value in sorted(modelfile.parameters)
        if value != ()
    )
    return replace(modelfile, parameters=parameters)


def _one_line(instruction: str, text: str) -> str:
    if not text or text != text.strip(_TRIMMED) or _opening_quotes(text) or _END_OF_LINE.search(text):
        raise _unsayable(
            f"{instruction} {text[:80]!r}", "It must be one line, not empty, without a quote or a blank at its edge."
        )
    if not text.isprintable():
        raise _unsayable(f"{instruction} {text[:80]!r}", "It holds characters that Ollama drops.")
    return text


def _text(instruction: str, text: str) -> str:
    plain = text and text == text.strip(_TRIMMED) and not _opening_quotes(text) and not _END_OF_LINE.search(text)
    return text if plain else _block(instruction, text)


def _block(instruction: str, text: str) -> str:
    lines = _END_OF_LINE.split(text)
    if any(line.rstrip(_TRIMMED).endswith(_TRIPLE) for line in lines[:-1]):
        raise _unsayable(
            f"{instruction} {text[:80]!r}", "One of its lines ends in three quotes, which would end the text."
        )
    if any(unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\r\n" for character in text):
        raise _unsayable(f"{instruction} {text[:80]!r}", "It holds control characters, which Ollama drops.")
    return _TRIPLE + text + _TRIPLE


def _unsayable(what: str, why: str) -> ModelfileError:
    return ModelfileError(
        f"A Modelfile cannot say {what}", why=why, next="Change the text, or give it with its own option instead."
    )
