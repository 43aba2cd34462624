"""A recipe's text as values that know their lines. Text in; a tree of texts, lists and maps out, uninterpreted.

Every scalar stays the text that was written: which of them are numbers is the schema's business, so that `name: no`,
`revision: 0123456` and `lr: 1e-4` mean what they say. JSON is read as the YAML that it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ollama_forge.errors import NotFoundError, RecipeError
from ollama_forge.files import disk_error

LIMIT_BYTES = 256 << 10
_LIMIT_VALUES = 10_000
_LIMIT_DEPTH = 24
_NULLS = ("", "~", "null", "Null", "NULL")
_PLAIN_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!")

Place = tuple[str | int, ...]
"""Where a value stands: keys and list numbers from the top."""


@dataclass(frozen=True, order=True)
class Problem:
    """Something that is wrong with a recipe. `line` counts from 1; 0: no line of the file."""

    line: int
    what: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        return f"{where}{self.what}" + (f" ({self.hint})" if self.hint else "")

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"line": self.line, "what": self.what, "hint": self.hint}


@dataclass(frozen=True)
class Document:
    """A recipe's tree: maps, lists, texts, and None for a key without a value; `lines` says where each stands."""

    value: dict[str, Any]
    lines: Mapping[Place, int]

    def line_of(self, place: Place) -> int:
        """The line of a value, or of the nearest thing around it that has one."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return 1


class _TextLoader(yaml.SafeLoader):
    """Without YAML 1.1's guesses about booleans, numbers and dates."""


_TextLoader.yaml_implicit_resolvers = {}


class _Refused(Exception):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def read_recipe_text(path: Path) -> str:
    """The file's text.

    Raises:
        NotFoundError: no such file.
        RecipeError: too large, or not UTF-8.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > LIMIT_BYTES:
            raise RecipeError(
                f"{str(path)!r} is no recipe: it has {size_bytes:,} bytes",
                why=f"A recipe has at most {LIMIT_BYTES:,}.",
                next="Name a YAML or JSON file with a `name` and a source.",
            )
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no recipe {str(path)!r}", next="Check the path.") from exc
    except IsADirectoryError as exc:
        raise RecipeError(
            f"{str(path)!r} is a folder, not a recipe",
            why="A recipe is one YAML or JSON file with a `name` and a source.",
            next="Name the file in it.",
        ) from exc
    except UnicodeDecodeError as exc:
        raise RecipeError(f"{str(path)!r} is not UTF-8 text", next="Save it as UTF-8.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def parse_document(text: str) -> tuple[Document | None, list[Problem]]:
    """Understand YAML or JSON; None where the text is not even that."""
    text = text.replace("\t", " ") if text.lstrip().startswith("{") else text  # JSON's strings hold no raw tab
    try:
        nodes = list(yaml.compose_all(text, Loader=_TextLoader))
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 0
        return None, [Problem(line, f"This is not YAML: {exc.problem or exc.context}")]
    except yaml.YAMLError as exc:
        return None, [Problem(0, f"This is not YAML: {exc}")]
    except RecursionError:
        return None, [Problem(0, "It is nested too deeply")]
    if len(nodes) != 1 or not isinstance(nodes[0], yaml.MappingNode):
        what = "The file is empty" if not nodes else "A recipe is one list of `key: value`"
        return None, [Problem(1, what, "it begins with, for example, `name: my-model`")]
    walker = _Walker()
    try:
        value = walker.walk(nodes[0], ())
    except _Refused as exc:
        return None, [*walker.problems, exc.problem]
    return Document(value, walker.lines), walker.problems


class _Walker:
    def __init__(self) -> None:
        self.lines: dict[Place, int] = {}
        self.problems: list[Problem] = []
        self._n_values = 0

    def walk(self, node: yaml.Node, place: Place) -> Any:
        line = node.start_mark.line + 1
        self._n_values += 1
        if self._n_values > _LIMIT_VALUES or len(place) > _LIMIT_DEPTH:
            raise _Refused(
                Problem(line, "It is too large or nested too deeply", "aliases count as what they stand for")
            )
        self.lines.setdefault(place, line)
        if node.tag not in _PLAIN_TAGS:
            raise _Refused(Problem(line, f"The tag {node.tag!r} is not allowed", "write the value without a tag"))
        if isinstance(node, yaml.ScalarNode):
            is_plain = node.style is None
            return None if is_plain and node.value in _NULLS else _joined(node.value)
        if isinstance(node, yaml.SequenceNode):
            return [self.walk(child, (*place, number)) for number, child in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return dict(self._pairs(node, place))

    def _pairs(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise _Refused(Problem(line, "A key is not a word"))
            key = _joined(key_node.value)
            if key == "<<":
                raise _Refused(Problem(line, "Merge keys (<<) are not read", "write the keys out"))
            if key in seen:
                self.problems.append(Problem(line, f"{key!r} is here twice", f"first in line {seen[key]}"))
                continue
            seen[key] = line
            self.lines[(*place, key)] = line
            yield key, self.walk(value_node, (*place, key))


def _joined(text: str) -> str:
    """JSON writes rare characters as two halves; YAML reads each half by itself."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
