"""`recipe.lock`: what a build was made of, so that it can be made again, or refused.

In: a finished plan. Out: a small JSON file beside the recipe: commits, hashes of files, settings with their seeds,
versions, and the digest that came out. No path of this machine, no time. `build --locked` compares all of it first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import NotFoundError, RecipeError
from ollama_forge.files import write_bytes

SCHEMA = 1
_LIMIT_BYTES = 8 << 20
_SHOWN = 12


@dataclass(frozen=True)
class Lock:
    """A lock as it was read. It is plain data, compared and never obeyed but for its commits."""

    path: Path
    document: Mapping[str, Any]

    @property
    def source_commit(self) -> str:
        """The commit of the source's repo; empty for others."""
        return str(self.document["source"].get("commit", ""))

    @property
    def digest(self) -> str:
        """The model that came out; empty where that is not said."""
        model = self.document.get("model")
        return str(model.get("digest", "")) if isinstance(model, dict) else ""

    def step_commits(self, number: int) -> dict[str, str]:
        """The commits of a step's adapters, by the recipe's words for them."""
        steps = self.document["steps"]
        return dict(steps[number].get("commits", {})) if number < len(steps) else {}

    def step_outputs(self, number: int) -> dict[str, str]:
        """The hashes of what a step made then."""
        steps = self.document["steps"]
        return dict(steps[number].get("outputs", {})) if number < len(steps) else {}


def lock_path(recipe_path: Path) -> Path:
    """Where the lock of a recipe lies: `recipe.yaml` has `recipe.lock`."""
    return recipe_path.with_suffix(".lock")


def read_lock(recipe_path: Path) -> Lock:
    """The lock of a recipe.

    Raises:
        NotFoundError: it was never built, or its lock is gone.
        RecipeError: it cannot be understood.
    """
    path = lock_path(recipe_path)
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise _broken(path, "It is too large.")
        document = json.loads(path.read_bytes())
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"There is no lock {str(path)!r}",
            why="--locked builds exactly what was built before.",
            next=f"Build it once without --locked: ollama-forge build {recipe_path}",
        ) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise _broken(path, str(exc)) from exc
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise _broken(path, f"It has no schema {SCHEMA}.")
    source, steps = document.get("source"), document.get("steps")
    is_sound = isinstance(source, dict) and isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
    if not is_sound or not all(_is_texts(step.get(key, {})) for step in steps or () for key in ("commits", "outputs")):
        raise _broken(path, "It is not what a build writes.")
    return Lock(path, document)


def write_lock(path: Path, document: Mapping[str, Any]) -> bool:
    """Write a lock; False when the file says the same already, and is left as it is."""
    raw = render_lock(document)
    try:
        if path.read_bytes() == raw:
            return False
    except OSError:
        pass  # none yet, or one that cannot be read: it is written anew
    write_bytes(path, raw, overwrite=True)
    return True


def render_lock(document: Mapping[str, Any]) -> bytes:
    """The one spelling of a lock."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def refuse_drift(lock: Lock, wanted: Mapping[str, Any]) -> None:
    """Compare what would be built with what was built.

    Raises:
        RecipeError: with each thing that differs.
    """
    differences = list(_differences(_comparable(lock.document), _comparable(wanted), ""))
    if differences:
        shown = differences[:_SHOWN]
        if len(differences) > _SHOWN:
            shown.append(f"and {len(differences) - _SHOWN} more")
        raise RecipeError(
            f"{lock.path.name} says otherwise: {len(differences)} difference{'s' if len(differences) > 1 else ''}",
            why="\n        ".join(shown),
            next="Bring the old inputs back, or build without --locked, which writes a new lock.",
        )


def _comparable(document: Mapping[str, Any]) -> dict[str, Any]:
    """Without what came out, which is not known yet."""
    steps = [{key: value for key, value in step.items() if key != "outputs"} for step in document.get("steps", ())]
    return {**{key: value for key, value in document.items() if key != "model"}, "steps": steps}


def _differences(then: Any, now: Any, where: str) -> Any:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(then, list) and isinstance(now, list) and where == "steps":
        for number in range(max(len(then), len(now))):
            one = then[number] if number < len(then) else None
            other = now[number] if number < len(now) else None
            yield from _differences(one, other, f"step {number + 1}")
    elif then != now:
        yield f"{where}: {_shown(then)} was locked, {_shown(now)} is here"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 72 else text[:69] + "..."


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _broken(path: Path, why: str) -> RecipeError:
    return RecipeError(
        f"{str(path)!r} is not a lock that can be read",
        why=why,
        next="Build without --locked, which writes a new one.",
    )
