"""The working folder of a training run: one run each, which is known by what it was asked.

In: a folder and what a run is asked. Out: the folder is the run's, or an error. Files that a run makes of its input
before it is known whether it can start are named after that input, so that another run does not take them for its own.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ollama_forge.errors import ExistsError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.weights.adapter import RESULT_FOLDER

RUN_FILE = "run.json"
_RESULTS = (RESULT_FOLDER, "student.gguf")


def claim_folder(folder: Path, asked: Mapping[str, Any], *, is_resumed: bool) -> None:
    """Write down what a run is asked, or go on with the run that was asked the same.

    A run that ended before its first checkpoint has left nothing to lose: its folder is free.

    Raises:
        ExistsError: there is another run in the folder, or this one and it is not to be resumed.
    """
    text = json.dumps(asked, indent=2, sort_keys=True)
    path = folder / RUN_FILE
    is_finished = any((folder / name).exists() for name in _RESULTS)
    if not path.exists() or not (is_finished or any(folder.glob("checkpoint-*"))):
        make_folder(folder)
        write_bytes(path, text.encode(), overwrite=True)
        return
    is_same = path.read_text(encoding="utf-8") == text
    if is_same and is_resumed:
        return
    if is_same and not is_finished:
        raise ExistsError(
            f"There is a run in {str(folder)!r} already",
            why="It is not finished.",
            next="Add --resume to go on, or choose another --workdir.",
        )
    raise ExistsError(
        f"There is a run in {str(folder)!r} already" + ("" if is_same else ", and it was asked something else"),
        why="It is finished." if is_finished else "It is not finished; model, data or options are not the same.",
        next=f"Choose another --workdir, or remove the folder: {removal_of(folder)}",
    )


def removal_of(folder: Path) -> str:
    """The command that takes a run's folder away, as it is pasted into a shell."""
    return f"rm -r {shlex.quote(str(folder))}"


def name_after(stem: str, *inputs: object) -> str:
    """The name of a GGUF that is made of some inputs: another one for others."""
    return f"{stem}-{hashlib.sha256(json.dumps([str(item) for item in inputs]).encode()).hexdigest()[:12]}.gguf"
