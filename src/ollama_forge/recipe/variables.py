"""Variables of a recipe: `{{ name }}` and `${name}`, from its own `variables` and from `--set`, never from elsewhere.

In: a document. Out: the same with every variable replaced, in all texts but `template`, whose braces are Go's own. A
backslash before one (`\\${name}`) keeps it as it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ollama_forge.errors import UsageError
from ollama_forge.recipe.document import Document, Place, Problem

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USE = re.compile(r"(?P<kept>\\?)(?:\{\{\s*(?P<braces>[A-Za-z_]\w*)\s*\}\}|\$\{(?P<dollar>[A-Za-z_]\w*)\})", re.ASCII)
_VARIABLES = "variables"
_TEMPLATE = "template"
_LONGEST = 64 << 10


def substitute(document: Document, settings: Mapping[str, str]) -> tuple[Document, list[Problem]]:
    """The document without variables.

    Args:
        settings: what `--set` says; it wins over the recipe's own values.

    Raises:
        UsageError: a setting that the recipe knows nothing of.
    """
    replacer = _Replacer(document, settings)
    value = {
        key: item if key == _VARIABLES else replacer.replace_in(item, (key,)) for key, item in document.value.items()
    }
    unknown = [name for name in settings if name not in replacer.known_names]
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(replacer.known_names), n=1)
        known = ", ".join(sorted(replacer.known_names))
        raise UsageError(
            f"--set {unknown[0]!r}: the recipe has no such variable",
            why=f"Its variables are {known}."
            if known
            else "It has none: --set changes variables, not the recipe's keys.",
            next=f"Did you mean {near[0]}?"
            if near
            else "Add it under `variables:`, and use it as ${" + unknown[0] + "}.",
        )
    return replace(document, value=value), replacer.problems


class _Replacer:
    def __init__(self, document: Document, settings: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._document = document
        self._settings = dict(settings)
        self._own = self._read_own(document.value.get(_VARIABLES))
        self._used: set[str] = set()
        self._resolving: list[str] = []
        self._resolved: dict[str, str] = {}

    @property
    def known_names(self) -> set[str]:
        return set(self._own) | self._used

    def _read_own(self, found: Any) -> dict[str, str]:
        if found is None:
            return {}
        if not isinstance(found, dict):
            self._add((_VARIABLES,), "`variables` is a list of `name: value`")
            return {}
        own = {}
        for name, value in found.items():
            if not _NAME.fullmatch(name):
                self._add((_VARIABLES, name), f"{name!r} is not a variable's name", "letters, digits and _")
            elif isinstance(value, (dict, list)):
                self._add((_VARIABLES, name), f"The variable {name!r} is not a text")
            else:
                own[name] = value or ""
        return own

    def replace_in(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self.replace_in(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.replace_in(item, (*place, number)) for number, item in enumerate(value)]
        if isinstance(value, str) and place[-1] != _TEMPLATE:
            return self._replace_text(value, place)
        return value

    def _replace_text(self, text: str, place: Place) -> str:
        def found(match: re.Match[str]) -> str:
            if match["kept"]:
                return match[0][1:]
            name = match["braces"] or match["dollar"]
            self._used.add(name)
            return self._value_of(name, match[0], place)

        replaced = _USE.sub(found, text)
        if len(replaced) > _LONGEST and len(replaced) > len(text):
            self._add(place, "Its variables make it longer than any recipe needs")
            return text
        return replaced

    def _value_of(self, name: str, written: str, place: Place) -> str:
        if name in self._settings:
            return self._settings[name]
        if name not in self._own:
            near = difflib.get_close_matches(name, sorted({*self._own, *self._settings}), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "add it under `variables:`, or give it with --set"
            self._add(place, f"There is no variable {name!r} (to keep the text, write \\{written})", hint)
            return written
        if name in self._resolving:
            self._add((_VARIABLES, name), f"The variable {name!r} needs itself", " -> ".join(self._resolving))
            return ""
        if name not in self._resolved:
            self._resolving.append(name)
            self._resolved[name] = self._replace_text(self._own[name], (_VARIABLES, name))
            self._resolving.pop()
        return self._resolved[name]

    def _add(self, place: Place, what: str, hint: str = "") -> None:
        problem = Problem(self._document.line_of(place), what, hint)
        if problem not in self.problems:
            self.problems.append(problem)
