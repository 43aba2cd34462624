"""The work folder: what each step of a build made, kept under the hash of all that went into it.

`OLLAMA_FORGE_HOME/builds/steps/KIND-KEY/` holds a step's files; its `done.json`, written last, says that they are
whole. `builds/landed/KEY.json` says which model a whole recipe came to. So a killed build goes on where it was, and a
second one has nothing to do.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.errors import RecipeError, RegistryError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.registry.registry_file import forge_home, lock_registry

DONE = "done.json"
_KEY_DIGITS = 24
_REPORTS = (".html", ".png", ".json", ".csv")
_REPORT_BYTES = 8 << 20


@dataclass(frozen=True)
class StepResult:
    """What a step left: the state of the model after it.

    Attributes:
        weights: the GGUF file or the folder; None: the source's own.
        adapters: layers on top, in order.
        template: an Ollama template that the step asks for.
        outputs: SHA-256 by file name, of the files that this step made.
        facts: what it tells: losses, tensors, warnings.
    """

    weights: Path | None = None
    adapters: tuple[Path, ...] = ()
    template: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LandedRecord:
    """A finished build.

    Attributes:
        digest: of the manifest; empty while it is being landed.
        outputs: what each step made, SHA-256 by file name.
    """

    digest: str
    outputs: Mapping[int, Mapping[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkFolder:
    """Where builds keep what they made."""

    root: Path

    @property
    def memo_path(self) -> Path:
        """Where hashes of files are remembered."""
        return self.root / "hashes.json"

    def step_dir(self, kind: str, key: str) -> Path:
        """The folder of a step."""
        return self.root / "steps" / f"{kind}-{key[:_KEY_DIGITS]}"

    def read_step(self, kind: str, key: str) -> StepResult | None:
        """A step's result, when it is whole and all its files are still there."""
        folder = self.step_dir(kind, key)
        document = _read_json(folder / DONE)
        if not document or document.get("key") != key:
            return None
        try:
            result = StepResult(
                weights=_back(self.root, document["weights"]),
                adapters=tuple(self.root / text for text in document["adapters"]),
                template=document["template"],
                outputs=dict(document["outputs"]),
                facts=dict(document["facts"]),
            )
            is_whole = all((self.root / text).stat().st_size == size for text, size in document["sizes"].items())
        except (KeyError, TypeError, ValueError, OSError, AttributeError):
            return None
        return result if is_whole else None

    def write_step(self, kind: str, key: str, result: StepResult) -> None:
        """Say that a step is done; its files are under their final names already."""
        files = [path for path in (result.weights, *result.adapters) if path is not None]
        document = {
            "key": key,
            "weights": _relative(self.root, result.weights),
            "adapters": [_relative(self.root, path) for path in result.adapters],
            "template": result.template,
            "outputs": result.outputs,
            "facts": result.facts,
            "sizes": {str(_relative(self.root, path)): path.stat().st_size for path in files if path.is_file()},
        }
        path = self.step_dir(kind, key) / DONE
        write_bytes(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)

    @contextlib.contextmanager
    def open_step(self, kind: str, key: str) -> Iterator[Path]:
        """The folder of a step that is to be done (again), for one process at a time.

        Raises:
            RecipeError: another build is doing this step.
        """
        folder = self.step_dir(kind, key)
        make_folder(folder)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(lock_registry(folder / "step", timeout_seconds=0))
            except RegistryError as exc:
                raise RecipeError(
                    f"Another build is doing the step `{kind}`",
                    why=f"It works in {str(folder)!r}.",
                    next="Wait for it to end; its result will be used by this one.",
                ) from exc
            with contextlib.suppress(FileNotFoundError):
                (folder / DONE).unlink()
            yield folder

    def tidy(self, kind: str, key: str, result: StepResult) -> None:
        """Remove what a finished step needed on its way - checkpoints, copies in other forms - but for its reports."""
        folder = self.step_dir(kind, key)
        results = [path for path in (result.weights, *result.adapters) if path is not None]
        for path in sorted(folder.rglob("*"), reverse=True):
            is_result = any(path == kept or path.is_relative_to(kept) for kept in results)
            if is_result or path == folder / DONE:
                continue
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()  # only the empty ones go
            elif path.suffix not in _REPORTS or path.stat().st_size > _REPORT_BYTES:
                path.unlink(missing_ok=True)

    def size_of(self, kind: str, key: str) -> int:
        """Bytes that a step keeps here; what it shares with Ollama's store (a file of two names) does not count."""
        found = (path.stat() for path in self.step_dir(kind, key).rglob("*") if path.is_file())
        return sum(status.st_size for status in found if status.st_nlink == 1)

    def discard(self, kind: str, key: str) -> None:
        """Give a step's disk back."""
        shutil.rmtree(self.step_dir(kind, key), ignore_errors=True)

    def read_landed(self, key: str) -> LandedRecord | None:
        """Which model a recipe came to, if it did or was about to."""
        found = _read_json(self.root / "landed" / f"{key}.json")
        if found is None:
            return None
        try:
            outputs = {int(number): dict(hashes) for number, hashes in found["outputs"].items()}
            return LandedRecord(str(found["digest"]), outputs)
        except (KeyError, ValueError, TypeError, AttributeError):
            return None

    def write_landed(self, key: str, record: LandedRecord) -> None:
        """Remember which model a recipe came to."""
        document = {
            "digest": record.digest,
            "outputs": {str(number): dict(hashes) for number, hashes in record.outputs.items()},
        }
        path = self.root / "landed" / f"{key}.json"
        write_bytes(path, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode(), overwrite=True)

    def forget_landed(self, key: str) -> None:
        """It came to none: what was to be landed was refused."""
        (self.root / "landed" / f"{key}.json").unlink(missing_ok=True)


def open_work_folder() -> WorkFolder:
    """The work folder of this person; it is made when something is written there."""
    return WorkFolder(forge_home() / "builds")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _relative(root: Path, path: Path | None) -> str | None:
    if path is None:
        return None
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _back(root: Path, text: str | None) -> Path | None:
    return None if text is None else root / text
