"""What another trainer is asked to do, and what came of it: values, and the mark that a folder belongs to one run."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ollama_forge.dataset.prepare import PreparedFile
from ollama_forge.errors import ExistsError
from ollama_forge.files import make_folder, write_bytes
from ollama_forge.jobs.external_program import quoted
from ollama_forge.jobs.finetune_setup import FinetuneRequest
from ollama_forge.jobs.landing import LandedModel
from ollama_forge.jobs.resolve import ResolvedModel

TRAINER_FILE = "trainer.json"
BASE_FOLDER = "base-hf"
BASE_FILE = "base-f32.gguf"


@dataclass(frozen=True)
class TrainerOptions:
    """Who trains, and on what.

    Attributes:
        trainer: one of `trainers.TRAINERS`.
        base_gguf: train on this GGUF; the result is landed on the request's base all the same.
        prepared_output: where the data goes in the trainer's form.
        adapter_output: where the trainer's adapter goes.
        format: of the prepared data; None: the trainer's own.
        run_trainer: use llama.cpp's finetune, and fail where it is not there.
    """

    trainer: str = "auto"
    base_gguf: Path | None = None
    prepared_output: Path | None = None
    adapter_output: Path | None = None
    format: str | None = None
    run_trainer: bool = False


@dataclass(frozen=True)
class TrainerJob:
    """A run of another trainer.

    Attributes:
        command: the argv list.
        program: what is run; None where it is not installed here.
        files: what was written for it, the data first.
        result: the adapter (or, with `makes_model`, the GGUF) that will be there.
        partial: where the trainer writes it; it becomes `result` when the trainer has ended well.
        file_type: the quantization in which the trained model is landed; empty: as it is.
    """

    trainer: str
    command: tuple[str, ...]
    program: Path | None
    prepared: PreparedFile
    files: tuple[Path, ...]
    result: Path
    partial: Path | None = None
    makes_model: bool = False
    file_type: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class AnswerChange:
    """What the model said to one prompt before and after training."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class TrainerResult:
    """What came of it. Without training (a dry run, or a trainer that is not here) only `job` says something."""

    job: TrainerJob
    is_trained: bool = False
    adapter_gguf: Path | None = None
    landed: LandedModel | None = None
    answers: tuple[AnswerChange, ...] = ()
    undo: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    is_dry_run: bool = False

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        job = self.job
        return {
            "trainer": job.trainer,
            "trained": self.is_trained,
            "dry_run": self.is_dry_run,
            "command": list(job.command),
            "command_line": quoted(job.command),
            "files": [str(path) for path in job.files],
            "prepared": {
                "path": str(job.prepared.path),
                "format": job.prepared.format,
                "samples": job.prepared.n_samples,
                "bytes": job.prepared.size_bytes,
            },
            "adapter": None if job.makes_model or not self.is_trained else str(job.result),
            "adapter_gguf": str(self.adapter_gguf) if self.adapter_gguf else None,
            "model": str(job.result) if job.makes_model and self.is_trained else None,
            "answers": [asdict(pair) for pair in self.answers],
            "landed": self.landed.document() if self.landed else None,
            "undo": list(self.undo),
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 3),
        }


def check_claim(
    request: FinetuneRequest, trainer: str, base: ResolvedModel, base_gguf: Path | None, *, overwrite: bool
) -> bytes:
    """What will be written down about the run in the working folder.

    Raises:
        ExistsError: another run is in it; `--resume` goes on with the same one only, `--force` begins again.
    """
    asked = {
        "trainer": trainer,
        "base": str((base.gguf_path or base.folder or Path()).absolute()),
        "base_gguf": str(base_gguf.absolute()) if base_gguf else None,
    }
    claim = (json.dumps(asked, indent=2, sort_keys=True) + "\n").encode()
    path = request.folder / TRAINER_FILE
    if not path.exists() or overwrite:
        return claim
    if not request.resume:
        raise ExistsError(
            f"There is a run in {str(request.folder)!r} already",
            next="Add --resume to go on with it, --force to begin again, or choose another --workdir.",
        )
    if path.read_bytes() != claim:
        raise ExistsError(
            f"The run in {str(request.folder)!r} was asked something else",
            why="Its trainer or its base differs from what is asked now.",
            next="Use the same command as before, --force to begin again, or another --workdir.",
        )
    return claim


def write_claim(request: FinetuneRequest, claim: bytes) -> None:
    """Make the folder this run's. What was made of another base is removed: it would be taken for this one's."""
    path = request.folder / TRAINER_FILE
    if path.exists() and path.read_bytes() != claim:
        shutil.rmtree(request.folder / BASE_FOLDER, ignore_errors=True)
        (request.folder / BASE_FILE).unlink(missing_ok=True)
    make_folder(request.folder)
    write_bytes(path, claim, overwrite=True)
