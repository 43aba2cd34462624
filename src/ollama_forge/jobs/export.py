"""A model leaves the store as files: the GGUF shared or copied, its adapters, and a Modelfile that makes it again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.files import place_copy, refuse_existing, require_free_space, write_bytes
from ollama_forge.jobs.resolve import resolve, resolve_gguf
from ollama_forge.store.modelfile import render_modelfile


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
