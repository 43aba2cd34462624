"""A plan: commands of ours as argument lists, what they will take, and the hashes of what they read.

In: commands and what their dry runs said. Out: `CommandPlan`, and the JSON file that keeps it. A plan is obeyed only as
far as it names commands of the table here, and only while everything that it reads is what it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ollama_forge.dataset.read import find_data_files
from ollama_forge.errors import ForgeError, NameInvalidError, NotFoundError, RecipeError
from ollama_forge.files import Progress, disk_error, no_progress, write_bytes
from ollama_forge.gguf.reader import shard_paths
from ollama_forge.recipe.inputs import Fingerprints, hash_of
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.work import open_work_folder
from ollama_forge.source.hub import list_repo
from ollama_forge.source.hub_files import looks_like_repo, parse_repo
from ollama_forge.source.ref import RefKind, looks_like_path, parse_ref
from ollama_forge.store.catalog import open_store

SCHEMA = 1
PLANNABLE = (
    *("fetch", "import", "convert", "fetch-adapter", "create-from-base", "quantize", "merge", "retrain"),
    *("finetune", "train-run", "build"),
)
"""What a plan may name. Each has a dry run that says what it would do."""

_LIMIT_BYTES = 4 << 20
_FORBIDDEN = ("--dry-run", "--json", "--help", "-h")
_REFS = ("source", "base", "template_from", "gguf", "base_gguf")
_PATHS = ("adapters", "imatrix", "modelfile_path", "recipe", "more_data", "data")
_TEXTS = ("system", "template", "licenses")
_VOLATILE = ("seconds", "check", "dry_run", "command", "start")


class Part(BaseModel):
    """What all parts of a plan's file share: nothing that is not known here."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CommandEstimate(Part):
    """What a command takes; None: not known before it runs."""

    disk_bytes: int | None = None
    download_bytes: int = 0
    memory_bytes: int | None = None
    seconds: float | None = None


class PlannedCommand(Part):
    """One step: a command of `PLANNABLE`, its arguments, and what its dry run said."""

    command: str
    arguments: tuple[str, ...]
    estimate: CommandEstimate = CommandEstimate()
    dry_run: dict[str, Any] = {}

    @property
    def words(self) -> list[str]:
        return [self.command, *self.arguments]


class PlanInput(Part):
    """Something that a step reads: a file or folder by its hash, an Ollama model by its digest, a repo by its commit, a
    recipe by the key of its build."""

    kind: Literal["file", "ollama", "hub", "build"]
    ref: str
    hash: str


class CommandPlan(Part):
    """A whole plan."""

    schema_version: Literal[1] = 1
    steps: tuple[PlannedCommand, ...]
    inputs: tuple[PlanInput, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form: what the file holds."""
        return self.model_dump(mode="json")


def plan_inputs(
    command: str, params: Mapping[str, Any], *, fresh: bool = False, progress: Progress = no_progress
) -> tuple[PlanInput, ...]:
    """What a command reads, by content.

    Args:
        params: its arguments as click understood them.
        fresh: read every file again instead of believing its time.

    Raises:
        NotFoundError: something is not there.
    """
    store_path = params.get("store_path")
    prints = Fingerprints(open_work_folder().memo_path, trusts_memo=not fresh, progress=progress)
    found: list[PlanInput] = []
    for name in _REFS:
        if params.get(name):
            found.append(_ref_input(str(params[name]), name, params, prints, store_path))
    for name in _PATHS:
        value = params.get(name)
        for path in value if isinstance(value, (tuple, list)) else [value]:
            if path is not None:
                found.append(_path_input(Path(path), params, prints, is_data=name in ("data", "more_data")))
    for name in _TEXTS:
        value = params.get(name)
        for text in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(text, str) and text.startswith("@"):
                found.append(_path_input(locate(Path(), text[1:]), params, prints))
    if command in ("fetch", "fetch-adapter") and params.get("repo"):
        repo = parse_repo(str(params["repo"])).repo
        found.append(PlanInput(kind="hub", ref=repo, hash=str(params.get("revision") or "")))
    prints.save()
    return tuple(dict.fromkeys(found))


def _ref_input(
    text: str, name: str, params: Mapping[str, Any], prints: Fingerprints, store_path: Path | None
) -> PlanInput:
    path = locate(Path(), text)
    if looks_like_path(text) or name in ("gguf", "base_gguf"):
        return _path_input(path, params, prints)
    if parse_ref(text).kind is RefKind.HUB or (name == "source" and not path.exists() and looks_like_repo(text)):
        named = parse_repo(text)
        commit = params.get("revision") if name == "source" else ""
        return PlanInput(kind="hub", ref=text, hash=commit or list_repo(named.repo, named.revision).commit)
    try:
        return PlanInput(kind="ollama", ref=text, hash=open_store(store_path).find(text).digest)
    except (NotFoundError, NameInvalidError):
        if not path.exists():
            raise
        return _path_input(path, params, prints)


def _path_input(path: Path, params: Mapping[str, Any], prints: Fingerprints, *, is_data: bool = False) -> PlanInput:
    if not path.exists():
        raise NotFoundError(f"There is no file or folder {str(path)!r}", next="Check the path.")
    if is_data:
        files = find_data_files([path], params.get("include") or ())
        return PlanInput(kind="file", ref=str(path), hash=hash_of([prints.file(file) for file in files]))
    if path.is_file():
        hashes = [prints.file(part) for part in shard_paths(path)]
        return PlanInput(kind="file", ref=str(path), hash=hashes[0] if len(hashes) == 1 else hash_of(hashes))
    parts = prints.files([path], "") or {entry.name: prints.file(entry) for entry in sorted(path.glob("*.gguf"))}
    return PlanInput(kind="file", ref=str(path), hash=hash_of(parts))


def read_plan(path: Path) -> CommandPlan:
    """A plan from its file, checked: known commands only.

    Raises:
        NotFoundError: no such file.
        RecipeError: it is no plan, or names what no plan may name.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise _no_plan(path, "It is too large.")
        plan = CommandPlan.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError as exc:
        raise NotFoundError(
            f"There is no plan {str(path)!r}", next="Make one: ollama-forge plan -o plan.json COMMAND ..."
        ) from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _no_plan(path, f"{where}: {first['msg']}") from exc
    except (ValueError, RecursionError) as exc:
        raise _no_plan(path, str(exc)) from exc
    for step in plan.steps:
        if step.command not in PLANNABLE:
            raise _no_plan(path, f"{step.command!r} is no command that a plan may name.")
        if any(word in _FORBIDDEN for word in step.arguments):
            raise _no_plan(path, "Its arguments hold one that a plan may not hold.")
    return plan


def write_plan(path: Path, plan: CommandPlan, *, overwrite: bool = False) -> None:
    """Keep a plan in a file; the same plan is the same bytes."""
    text = json.dumps(plan.document(), indent=2, sort_keys=True, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode(), overwrite=overwrite)


def refuse_changes(planned: Sequence[PlanInput], now: Sequence[PlanInput]) -> None:
    """Compare what a plan was made for with what is here.

    Raises:
        RecipeError: with each input that differs.
    """
    here = {(item.kind, item.ref): item.hash for item in now}
    changed = [
        f"{item.ref}: {item.hash[:12]} was planned, {here.get((item.kind, item.ref), 'nothing')[:12]} is here"
        for item in planned
        if here.get((item.kind, item.ref)) != item.hash
    ]
    changed += [f"{ref}: the plan does not know it" for kind, ref in here if (kind, ref) not in _keys(planned)]
    if changed:
        raise RecipeError(
            "What the plan was made for has changed",
            why="\n        ".join(changed),
            next="Plan again: ollama-forge plan -o plan.json COMMAND ...",
        )


def _keys(inputs: Sequence[PlanInput]) -> set[tuple[str, str]]:
    return {(item.kind, item.ref) for item in inputs}


def without_times(document: Mapping[str, Any]) -> dict[str, Any]:
    """A dry run's document without what the clock says."""
    return {
        key: without_times(value) if isinstance(value, dict) else value
        for key, value in document.items()
        if key not in _VOLATILE
    }


def _no_plan(path: Path, why: str) -> ForgeError:
    return RecipeError(
        f"{str(path)!r} is not a plan that can be run",
        why=why,
        next="Make one: ollama-forge plan -o plan.json COMMAND ...",
    )
