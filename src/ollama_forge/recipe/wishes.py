"""What a recipe wants the model to say beside its weights, as a `Modelfile` without FROM.

In: the keys of a recipe or of its `create` step, and the recipe's folder. Out: changes that landing takes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ollama_forge.errors import ModelfileError, RecipeError
from ollama_forge.jobs.creation import Creation, override, take_template
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.schema import Wishes, parameter_texts
from ollama_forge.store.modelfile import Message, Modelfile, render_modelfile
from ollama_forge.store.parameters import ParameterValue, merge_parameters, parse_parameter

_TEXT_LIMIT_BYTES = 4 << 20


def wished_modelfile(folder: Path, wishes: Wishes) -> Modelfile:
    """The keys as a Modelfile; `@FILE` is read from the recipe's folder.

    Raises:
        ModelfileError: a parameter of the wrong type, or a value that no Modelfile can say.
        RecipeError: an `@FILE` that cannot be read.
    """
    stops: list[str] = []
    typed: list[tuple[str, ParameterValue]] = []
    for name, text in parameter_texts(wishes):
        if name == "stop":
            stops.append(text)
        else:
            typed.append((name, parse_parameter(name, text)))
    if stops:
        typed.append(("stop", tuple(stops)))
    modelfile = Modelfile(
        template=_text(folder, wishes.template, "template"),
        system=_text(folder, wishes.system, "system"),
        licenses=tuple(_text(folder, text, "license") or "" for text in wishes.license),
        parameters=merge_parameters((), typed),
        messages=tuple(Message(turn.role, turn.content) for turn in wishes.messages),
        renderer=wishes.renderer,
        parser=wishes.parser,
        requires=wishes.requires,
    )
    try:
        render_modelfile(replace(modelfile, sources=("BASE",)))
    except ModelfileError as exc:
        raise RecipeError(exc.what, why=exc.why, next=exc.next) from exc
    return modelfile


def combined_wishes(folder: Path, wishes: tuple[Wishes, ...], store_path: Path | None) -> Modelfile:
    """All of a recipe's wishes, later ones on top.

    Raises:
        As `wished_modelfile`; UsageError, NotFoundError: `template_from` names no model, or one without a template.
    """
    whole = Creation("", Modelfile())
    for part in wishes:
        whole = override(whole, wished_modelfile(folder, part))
        if part.template_from:
            whole = take_template(whole, part.template_from, store_path)
    return whole.changes


def _text(folder: Path, value: str | None, key: str) -> str | None:
    if value is None or not value.startswith("@"):
        return value
    path = locate(folder, value[1:])
    try:
        if path.stat().st_size > _TEXT_LIMIT_BYTES:
            raise RecipeError(f"{key!r}: {value!r} is too large for a text", next="Name a text file.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(
            f"{key!r}: {value!r} could not be read",
            why="A value that begins with @ names a text file in UTF-8, counted from the recipe's folder.",
        ) from exc
