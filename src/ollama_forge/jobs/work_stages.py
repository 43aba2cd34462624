"""A long job in stages that can be broken off anywhere: what is done, and from what it was made.

In: a working folder, and for each stage a key that stands for everything it depends on. Out: whether the stage is done
already. A stage counts as done only when its files are whole and it was made from the same; else it is done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import ExistsError, FormatError
from ollama_forge.files import make_folder, sweep_temp_files, write_bytes

STAGES_FILE = "run.json"


def hash_key(*parts: Any) -> str:
    """One hash of values that JSON can hold: the same values, the same hash."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class WorkFolder:
    """The folder of one job.

    Attributes:
        path: of the folder.
        job: its name; another job's folder is refused.
    """

    path: Path
    job: str

    def claim(self) -> None:
        """Begin in a new folder, or go on in one that this job began.

        Raises:
            ExistsError: the folder holds something else.
            DiskError: it cannot be made.
        """
        if self.path.is_dir():
            sweep_temp_files(self.path)
        known = self._read()
        if known is None and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ExistsError(
                f"{str(self.path)!r} is there already, and is no working folder of `{self.job}`",
                why="Nothing in it is touched.",
                next="Choose another --output-dir.",
            )
        make_folder(self.path)
        if known is None:
            self._write({})

    def has(self, stage: str, key: str, files: Sequence[Path] = ()) -> bool:
        """Whether a stage was done from the same inputs and its files are there."""
        entry = (self._read() or {}).get(stage)
        return entry is not None and entry["key"] == key and all(path.exists() for path in files)

    def facts(self, stage: str) -> Mapping[str, Any]:
        """What the stage left to know; empty when it is not done."""
        entry = (self._read() or {}).get(stage)
        return {} if entry is None else entry["facts"]

    def note(self, stage: str, key: str, facts: Mapping[str, Any] | None = None) -> None:
        """Write down that a stage is done; its files must be whole by now."""
        self._write({**(self._read() or {}), stage: {"key": key, "facts": dict(facts or {})}})

    def _read(self) -> dict[str, dict[str, Any]] | None:
        path = self.path / STAGES_FILE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["job"] != self.job:
                raise ExistsError(
                    f"{str(self.path)!r} is the working folder of `{document['job']}`",
                    next="Choose another --output-dir.",
                )
            stages: dict[str, dict[str, Any]] = document["stages"]
            if not all(isinstance(entry["key"], str) and isinstance(entry["facts"], dict) for entry in stages.values()):
                raise TypeError("a stage has no key")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as exc:
            raise FormatError(
                f"{str(path)!r} is damaged: {exc}",
                why="It says which stages of the job are done.",
                next="Remove it to begin anew, or choose another --output-dir.",
            ) from exc
        return stages

    def _write(self, stages: Mapping[str, Any]) -> None:
        text = json.dumps({"job": self.job, "stages": dict(stages)}, indent=2, sort_keys=True)
        write_bytes(self.path / STAGES_FILE, text.encode(), overwrite=True)
