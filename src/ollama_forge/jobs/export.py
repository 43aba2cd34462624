"""A model leaves as files: a GGUF shared or copied, or a Hugging Face folder made from it; with the Modelfile.

In: a model argument and where the result goes. Out: `Exported` or `ExportedFolder`; with `dry_run` what would be there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.convert.to_hf import HFOptions, plan_hf_folder, write_hf_folder
from ollama_forge.errors import UsageError
from ollama_forge.files import Progress, no_progress, place_copy, refuse_existing, require_free_space, write_bytes
from ollama_forge.jobs.resolve import ResolvedModel, resolve, resolve_gguf
from ollama_forge.store.modelfile import render_modelfile
from ollama_forge.transform.folder import atomic_folder, require_free_target
from ollama_forge.weights.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Exported:
    """What was written. `how` is `reflink`, `hardlink` or `copy`."""

    files: tuple[Path, ...]
    how: str
    size_bytes: int
    dry_run: bool

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.files[0]),
            "files": [str(path) for path in self.files],
            "how": self.how,
            "bytes": self.size_bytes,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True)
class ExportedFolder:
    """A Hugging Face folder that was written, or with `dry_run` that would be.

    Attributes:
        files: names inside the folder.
        dtype: of most weights, as config.json says it.
        dtypes: how many tensors have each dtype.
    """

    output: Path
    files: tuple[str, ...]
    family: str
    dtype: str
    dtypes: Mapping[str, int]
    parameters: int
    size_bytes: int
    seconds: float
    dry_run: bool
    warnings: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "output": str(self.output),
            "files": list(self.files),
            "family": self.family,
            "dtype": self.dtype,
            "dtypes": dict(self.dtypes),
            "parameters": self.parameters,
            "bytes": self.size_bytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
            "dry_run": self.dry_run,
        }


def export_model(
    ref: str,
    output: Path,
    *,
    store_path: Path | None = None,
    with_modelfile: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Exported:
    """Write a model's weights under `output`; adapters go beside it, as `<output stem>-adapter-N.gguf`.

    Nothing that reads GGUF edits it in place, so a hard link is as good as a copy; it is made only where the file
    system has no reflinks.

    Raises:
        ExistsError: a file is there and `overwrite` is false.
        UsageError: the model is a Hugging Face folder.
    """
    resolve_gguf(ref, store_path)
    model = resolve(ref, store_path)
    assert model.gguf_path is not None
    adapters = {
        output.with_name(f"{output.stem}-adapter-{number}.gguf"): path
        for number, path in enumerate(model.adapters, start=1)
    }
    modelfile_path = output.with_name(output.name + ".Modelfile")
    wanted = [output, *adapters, *([modelfile_path] if with_modelfile else [])]
    for path in wanted:
        refuse_existing(path, overwrite=overwrite)
    size_bytes = sum(path.stat().st_size for path in (model.gguf_path, *adapters.values()))
    if dry_run:
        require_free_space(output.parent, size_bytes, output.name)
        return Exported(tuple(wanted), "", size_bytes, dry_run=True)
    how = place_copy(model.gguf_path, output, overwrite=overwrite)
    for target, source in adapters.items():
        place_copy(source, target, overwrite=overwrite)
    if with_modelfile:
        text = render_modelfile(
            replace(
                model.modelfile,
                sources=(f"./{output.name}",),
                adapters=tuple(f"./{target.name}" for target in adapters),
                drafts=(),
            )
        )
        write_bytes(modelfile_path, text.encode(), overwrite=overwrite)
    return Exported(tuple(wanted), how, size_bytes, dry_run=False)


def export_folder(
    ref: str,
    output: Path,
    options: HFOptions,
    *,
    store_path: Path | None = None,
    with_modelfile: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> ExportedFolder:
    """Write a model as a folder that transformers loads: whole, or not at all.

    Raises:
        ExistsError: the folder is there and `overwrite` is false.
        UsageError: the model is a folder already, or has adapter layers, which the folder could not say.
        UnsupportedError: its family, tokenizer or a tensor is not known.
        FormatError: the file does not hold together.
    """
    started = time.monotonic()
    require_free_target(output, overwrite=overwrite)
    model = resolve(ref, store_path)
    gguf_path = _require_one_gguf(ref, model)
    modelfile = {}
    if with_modelfile:
        text = render_modelfile(replace(model.modelfile, sources=(".",), adapters=(), drafts=()))
        modelfile = {"Modelfile": text.encode()}
    with open_checkpoint(gguf_path) as checkpoint:
        plan = plan_hf_folder(checkpoint, options)
        plan = replace(plan, files={**plan.files, **modelfile})
        if dry_run:
            require_free_space(output.parent, plan.size_bytes, output.name)
        else:
            with (
                atomic_folder(output, overwrite=overwrite, expected_bytes=plan.size_bytes) as folder,
                progress(f"Writing {output.name}", plan.size_bytes) as advance,
            ):
                write_hf_folder(plan, folder, advance)
    warnings = list(plan.warnings)
    if model.projector is not None:
        warnings.append("The projector for pictures or sound was left out: the folder is the text model.")
    return ExportedFolder(
        output=output,
        files=plan.filenames,
        family=plan.family.name,
        dtype=plan.dtype,
        dtypes=plan.dtypes,
        parameters=plan.n_parameters,
        size_bytes=plan.size_bytes,
        seconds=time.monotonic() - started,
        dry_run=dry_run,
        warnings=tuple(warnings),
    )


def _require_one_gguf(ref: str, model: ResolvedModel) -> Path:
    if model.gguf_path is None:
        raise UsageError(f"{ref!r} is a Hugging Face folder already", next=f"Copy it: cp -r {ref} DIR")
    if model.adapters:
        adapters = " ".join(f"base-adapter-{number}.gguf" for number in range(1, len(model.adapters) + 1))
        raise UsageError(
            f"{ref!r} has {len(model.adapters)} adapter layer{'s' if len(model.adapters) > 1 else ''}",
            why="A Hugging Face folder holds one set of weights; without its adapter it would be another model.",
            next=f"ollama-forge export {ref} -o base.gguf; ollama-forge merge base.gguf {adapters} -o merged.gguf; "
            "ollama-forge export ./merged.gguf --format hf -o DIR",
        )
    return model.gguf_path
