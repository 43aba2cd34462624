"""From a recipe's file to a `Recipe`: everything that can be said against it is said at once, each with its line.

In: a path and what `--set` says. Out: a value that knows its source, its steps in order, and what the model shall say.
Whether the things that it names are there is looked at too, as far as they lie on this disk.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ollama_forge.errors import ForgeError, RecipeError
from ollama_forge.recipe.document import Document, Place, Problem, parse_document, read_recipe_text
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.schema import (
    ALIASES,
    FLAT_PARAMETERS,
    MEANT,
    SOURCES,
    STEPS,
    AbliterateStep,
    AdapterStep,
    CreateStep,
    DownsizeStep,
    FinetuneStep,
    MergeStep,
    Part,
    QuantizeStep,
    RecipeKeys,
    Wishes,
    is_parameter,
)
from ollama_forge.recipe.variables import substitute
from ollama_forge.source.hub import list_repo
from ollama_forge.source.hub_files import RepoName, parse_repo
from ollama_forge.source.ref import RefKind, looks_like_path, parse_ref

_NEEDS_PLAIN_WEIGHTS = (FinetuneStep, AbliterateStep, DownsizeStep)
_STEP_KEYS = ("quantize", "adapter")
_ONLY_FOR = {
    "revision": ("hf_repo", "checkpoint"),
    "gguf_file": ("hf_repo",),
    "quant": ("hf_repo", "checkpoint"),
    "outtype": ("hf_repo", "checkpoint"),
}


@dataclass(frozen=True)
class Source:
    """Where the weights come from.

    Attributes:
        kind: `base`, `gguf`, `hf_repo` or `checkpoint`.
        text: as written.
        ref: what to resolve: the same, or an absolute path.
        repo: for a repo of the Hub.
        outtype: what safetensors are converted to where no step quantizes them.
        quant: the file to take from a repo of GGUFs, or what safetensors are quantized to.
    """

    kind: str
    text: str
    ref: str
    repo: RepoName | None = None
    outtype: str = "auto"
    quant: str = ""


@dataclass(frozen=True)
class Recipe:
    """A recipe that can be built.

    Attributes:
        steps: in order; the wishes of `create` steps are in `wishes`.
        wishes: the top's keys first, then those of `create` steps.
    """

    path: Path
    name: str
    source: Source
    steps: tuple[Part, ...]
    wishes: tuple[Wishes, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent

    def locate(self, text: str) -> Path:
        """A path as the recipe means it: from its own folder."""
        return locate(self.folder, text)


@dataclass(frozen=True)
class Checked:
    """What came of reading: a recipe, or what is wrong with it."""

    recipe: Recipe | None
    problems: tuple[Problem, ...]


def read_recipe(path: Path, settings: Mapping[str, str] | None = None) -> Recipe:
    """The recipe of a file.

    Raises:
        RecipeError: with everything that is wrong, by line.
        NotFoundError, UsageError: no such file; a `--set` that means nothing.
    """
    checked = check_recipe(path, settings)
    if checked.recipe is None:
        raise recipe_error(path, checked.problems)
    return checked.recipe


def recipe_error(path: Path, problems: Sequence[Problem]) -> RecipeError:
    """All that is wrong with a recipe, as one error."""
    count = f"{len(problems)} errors" if len(problems) > 1 else "an error"
    return RecipeError(
        f"The recipe {str(path)!r} has {count}",
        why="\n        ".join(str(problem) for problem in problems),
        next=f"Mend it, then: ollama-forge validate-recipe {path}",
    )


def check_recipe(path: Path, settings: Mapping[str, str] | None = None) -> Checked:
    """Read a recipe and collect all that is wrong with it.

    Raises:
        NotFoundError, RecipeError, DiskError: the file itself cannot be read.
        UsageError: a `--set` that means nothing.
    """
    document, problems = parse_document(read_recipe_text(path))
    if document is None:
        return Checked(None, tuple(sorted(problems)))
    document, more = substitute(document, settings or {})
    reader = _Reader(path.absolute(), document)
    recipe = reader.read()
    found = sorted({*problems, *more, *reader.problems})
    return Checked(None if found else recipe, tuple(found))


def find_remote_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """What the Hub says against the repos of a recipe: missing, gated, no such revision. It asks for lists only."""
    document, _ = parse_document(read_recipe_text(recipe.path))
    found = []
    for place, named in _repos(recipe):
        try:
            list_repo(named.repo, named.revision)
        except ForgeError as exc:
            found.append(Problem(document.line_of(place) if document else 0, exc.what, exc.why))
    return tuple(sorted(found))


def _repos(recipe: Recipe) -> list[tuple[Place, RepoName]]:
    found: list[tuple[Place, RepoName]] = []
    if recipe.source.repo is not None:
        found.append(((recipe.source.kind,), recipe.source.repo))
    for number, step in enumerate(recipe.steps):
        texts = (step.path,) if isinstance(step, AdapterStep) else step.adapters if isinstance(step, MergeStep) else ()
        found += [(("steps", number), parse_repo(text)) for text in texts if text.startswith("hf:")]
    return found


class _Reader:
    def __init__(self, path: Path, document: Document) -> None:
        self.problems: list[Problem] = []
        self._path = path
        self._document = document

    def read(self) -> Recipe | None:
        top = self._validate_top()
        steps = self._read_steps(self._document.value.get("steps"))
        if top is None:
            return None
        assert isinstance(top, RecipeKeys)
        source = self._read_source(top)
        ordered = self._ordered(top, steps)
        self._check_order(ordered)
        for number, (step, place) in enumerate(ordered):
            self._check_step_paths(step, place, is_first=number == 0)
        wishes = (top, *(step for step, _ in ordered if isinstance(step, CreateStep)))
        self._check_wishes(wishes)
        if source is None:
            return None
        kept = tuple(step for step, _ in ordered if not isinstance(step, CreateStep))
        return Recipe(self._path, top.name, source, kept, wishes)

    def _validate_top(self) -> Part | None:
        """The top's keys; those that are wrong are left out, so that the rest is looked at all the same."""
        top = self._validate(RecipeKeys, self._document.value, ())
        if top is not None:
            return top
        wrong = {problem.line for problem in self.problems}
        sound = {key: item for key, item in self._document.value.items() if self._document.lines[(key,)] not in wrong}
        kept = len(self.problems)
        top = self._validate(RecipeKeys, {"name": "unnamed", **sound}, ())
        del self.problems[kept:]
        return top

    def _add(self, place: Place, what: str, hint: str = "") -> None:
        self.problems.append(Problem(self._document.line_of(place), what, hint))

    def _validate(self, model: type[Part], value: Any, place: Place) -> Part | None:
        if isinstance(value, dict):
            value = self._without_aliases(value, model, place)
        try:
            return model.model_validate(value)
        except ValidationError as exc:
            for error in exc.errors(include_url=False):
                where = (*place, *error["loc"])
                if error["type"] == "extra_forbidden":
                    self._unknown_key(str(error["loc"][-1]), where, model)
                elif error["type"] == "missing":
                    self._add(place, f"{str(error['loc'][-1])!r} is missing")
                else:
                    self._add(where, *_words(error))
            return None

    def _without_aliases(self, value: dict[str, Any], model: type[Part], place: Place) -> dict[str, Any]:
        renamed = {}
        for key, item in value.items():
            name = ALIASES.get(key, key)
            if name != key and name in value:
                self._add((*place, key), f"{key!r} and {name!r} mean the same")
                continue
            renamed[name if name in model.model_fields else key] = item
        return renamed

    def _unknown_key(self, key: str, place: Place, model: type[Part]) -> None:
        known = [name for name in model.model_fields if name != "kind"]
        if is_parameter(key) and "parameters" in known:
            self._add(place, f"There is no key {key!r} here", f"write it below: parameters: {{{key}: ...}}")
            return
        meant = MEANT.get(key, "")
        near = [meant] if meant in known else difflib.get_close_matches(key, known, n=1, cutoff=0.55)
        if near:
            self._add(place, f"There is no key {key!r}", f"did you mean {near[0]!r}?")
        elif key in STEPS:
            self._add(place, f"There is no key {key!r} here", f"write it as a step: steps: [{key}: ...]")
        else:
            self._add(place, f"There is no key {key!r}", f"known: {', '.join(known)}")

    def _read_source(self, top: RecipeKeys) -> Source | None:
        given = [kind for kind in SOURCES if getattr(top, kind)]
        if len(given) != 1:
            hint = "one of " + ", ".join(SOURCES)
            if given:
                self._add((given[1],), f"There are {len(given)} sources: {', '.join(given)}", "keep one")
            else:
                self._add((), "The recipe has no source", hint)
            return None
        kind = given[0]
        text: str = getattr(top, kind)
        for key, kinds in _ONLY_FOR.items():
            if key in top.model_fields_set and getattr(top, key) is not None and kind not in kinds:
                hint = "write `quantize` to make the weights smaller" if key == "quant" else "leave it out"
                self._add((key,), f"{key!r} is for {' and '.join(kinds)}, and this recipe has {kind!r}", hint)
        try:
            return self._located_source(kind, text, top)
        except ForgeError as exc:
            self._add((kind,), exc.what, exc.next)
            return None

    def _located_source(self, kind: str, text: str, top: RecipeKeys) -> Source | None:
        repo = None
        if kind == "hf_repo" or text.startswith("hf:"):
            repo = self._repo(text, top)
            return Source(kind, text, text, repo, top.outtype, repo.quant)
        if kind == "base":
            beside = locate(self._path.parent, text)
            is_path = looks_like_path(text) or beside.exists()
            if parse_ref(text).kind is RefKind.PATH and not beside.exists():
                self._add((kind,), f"There is no {text!r}", f"looked for {beside}")
                return None
            return Source(kind, text, str(beside) if is_path else text, None, top.outtype)
        beside = locate(self._path.parent, text)
        if kind == "gguf" and not beside.is_file():
            self._add((kind,), f"There is no file {text!r}", f"looked for {beside}")
            return None
        if kind == "checkpoint" and not beside.is_dir():
            self._add((kind,), f"There is no folder {text!r}", f"looked for {beside}; a repo is written hf:org/name")
            return None
        if "revision" in top.model_fields_set and top.revision is not None:
            self._add(("revision",), "'revision' is for repos of the Hub", f"{text!r} is a folder")
        return Source(kind, text, str(beside), None, top.outtype, top.quant or "")

    def _repo(self, text: str, top: RecipeKeys) -> RepoName:
        named = parse_repo(text)
        return RepoName(
            named.repo, top.revision or named.revision, top.gguf_file or named.file, top.quant or named.quant
        )

    def _read_steps(self, items: Any) -> list[tuple[Part, Place]]:
        if items is None:
            return []
        if not isinstance(items, list):
            self._add(("steps",), "`steps` is a list: each line begins with a dash", "for example `- quantize: Q4_K_M`")
            return []
        found = [(self._read_step(item, ("steps", number)), ("steps", number)) for number, item in enumerate(items)]
        return [(step, place) for step, place in found if step is not None]

    def _read_step(self, item: Any, place: Place) -> Part | None:
        if isinstance(item, str):
            item = {item: None}
        if not isinstance(item, dict) or not item:
            self._add(place, "A step is `kind: ...`", f"kinds: {', '.join(STEPS)}")
            return None
        if len(item) != 1:
            self._add(
                place, f"A step has one kind, and here are {len(item)} keys: {', '.join(item)}", "indent its keys"
            )
            return None
        written = str(next(iter(item)))
        options = item[written]
        kind: str = ALIASES.get(written, written)
        if kind not in STEPS:
            near = difflib.get_close_matches(kind, STEPS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"kinds: {', '.join(STEPS)}"
            self._add((*place, written), f"There is no step {written!r}", hint)
            return None
        model = STEPS[kind]
        if isinstance(options, (str, list)):
            if not model.shorthand:
                self._add((*place, written), f"The step {written!r} takes keys, not one value")
                return None
            options = {model.shorthand: options}
        return self._validate(model, options or {}, (*place, written))

    def _ordered(self, top: RecipeKeys, steps: list[tuple[Part, Place]]) -> list[tuple[Part, Place]]:
        """The flat keys as steps: quantize first, adapters on top."""
        if "steps" in self._document.value:
            for key in _STEP_KEYS:
                if getattr(top, key):
                    self._add((key,), f"{key!r} stands beside `steps`", "write it as a step, where it belongs in order")
            return steps
        flat: list[tuple[Part, Place]] = []
        if top.quantize:
            quantize = QuantizeStep(type=top.quantize, allow_requantize=top.allow_requantize)
            flat.append((quantize, ("quantize",)))
        elif top.allow_requantize:
            self._add(("allow_requantize",), "'allow_requantize' belongs to `quantize`", "quantize: Q4_K_M")
        flat += [(AdapterStep(path=path), ("adapter",)) for path in top.adapter]
        return flat

    def _check_order(self, steps: list[tuple[Part, Place]]) -> None:
        has_layers = False
        for number, (step, place) in enumerate(steps):
            if isinstance(step, CreateStep) and number != len(steps) - 1:
                self._add(place, "`create` comes last", "what the model says is added when it is landed")
            if isinstance(step, FinetuneStep) and has_layers:
                self._add(
                    place, "`finetune` needs plain weights, and an adapter lies on them", "add `- merge` before it"
                )
            if isinstance(step, MergeStep):
                if not step.adapters and not has_layers and number == 0:
                    self._add(place, "`merge` has no adapter to merge", "merge: ./adapter")
                if step.weights and len(step.weights) != len(step.adapters):
                    self._add(place, f"{len(step.weights)} weights for {len(step.adapters)} adapters")
            if isinstance(step, (AdapterStep, FinetuneStep)):
                has_layers = not getattr(step, "merge", False)
            elif isinstance(step, MergeStep):
                has_layers = False

    def _check_step_paths(self, step: Part, place: Place, *, is_first: bool) -> None:
        for key in step.paths:
            value = getattr(step, key)
            for text in value if isinstance(value, tuple) else (value,):
                if text is None or text.startswith("hf:"):
                    continue
                path = locate(self._path.parent, text)
                if not path.exists():
                    self._add((*place, key), f"There is no {text!r}", f"looked for {path}")

    def _check_wishes(self, wishes: Sequence[Wishes]) -> None:
        from ollama_forge.recipe.wishes import wished_modelfile

        for part in wishes:
            for name in FLAT_PARAMETERS:
                if getattr(part, name) is not None and name in part.parameters:
                    self._add((name,), f"{name!r} is here twice: by itself and under `parameters`")
            try:
                wished_modelfile(self._path.parent, part)
            except ForgeError as exc:
                self._add(self._place_of(exc, part), exc.what, exc.why)

    def _place_of(self, error: ForgeError, part: Wishes) -> Place:
        """The key that an error speaks of, as far as it names one."""
        for name in type(part).model_fields:
            if name in error.what.split() or f"{name!r}" in error.what:
                return (name,)
        return ()


def _words(error: Any) -> tuple[str, str]:
    """pydantic's finding as what a person reads."""
    shown = error.get("input")
    quoted = repr(shown if not isinstance(shown, str) or len(shown) <= 80 else shown[:77] + "...")
    key = next((str(part) for part in reversed(error["loc"]) if isinstance(part, str)), "")
    if error["type"] == "value_error":
        return str(error["ctx"]["error"]), ""
    if shown is None:
        return f"{key!r} has no value", ""
    return f"{key!r} is {quoted}", str(error["msg"])[:1].lower() + str(error["msg"])[1:]
