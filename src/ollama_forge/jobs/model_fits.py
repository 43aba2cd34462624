"""Every model of a store with its true size in parameters and its fit lights: what the wizard lists.

In: a store, or a model argument. Out: `ModelFits`, from headers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import file_type_name
from ollama_forge.jobs.fit import Fit, Machine, fit_model, look_at_machine
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.source.hub_files import parse_repo
from ollama_forge.source.ref import RefKind, parse_ref
from ollama_forge.store.catalog import open_store
from ollama_forge.store.installed import InstalledModel


@dataclass(frozen=True)
class ModelFits:
    """A model in a few numbers.

    Attributes:
        fits: by job; empty where its header could not be read, and `problem` says why.
        suggestion: a name for what is made of it.
        is_gguf: it is one; else a folder, or a repo of the Hub that nobody has looked into.
        has_adapter: it has adapter layers, so that it must be merged before it can be trained.
    """

    name: str
    parameters: int
    quantization: str
    size_bytes: int
    fits: Mapping[str, Fit] = field(default_factory=dict)
    problem: str = ""
    suggestion: str = ""
    is_gguf: bool = True
    has_adapter: bool = False

    def why_not(self, job: str) -> str:
        """Why a job has no light, in words."""
        if self.has_adapter and job == "finetune":
            return f"only once its adapter is merged: ollama-forge merge {self.name} -o merged.gguf"
        return "not for this family" if self.is_gguf else "not known before it is looked into"

    @property
    def is_quantized(self) -> bool:
        """Whether it has fewer than 16 bits a weight already."""
        return self.is_gguf and self.quantization not in ("F32", "F16", "BF16", "")


def fits_of_store(store_path: Path | None, machine: Machine | None = None) -> list[ModelFits]:
    """The models of a store, newest first.

    Raises:
        DiskError: it may not be read.
    """
    machine = machine or look_at_machine()
    rows = []
    for model in open_store(store_path).models():
        name = model.name.display
        if model.model_path is None:
            rows.append(ModelFits(name, 0, model.quantization, model.size_bytes, problem="runs in Ollama's cloud"))
            continue
        try:
            rows.append(_installed(model, machine))
        except ForgeError as error:
            rows.append(ModelFits(name, 0, model.quantization, model.size_bytes, problem=error.what))
    return rows


def fit_ref(text: str, store_path: Path | None, machine: Machine | None = None) -> ModelFits:
    """One model that somebody named. A repo of the Hub is not downloaded for it, so that its lights stay unknown.

    Raises:
        ForgeError: as `jobs.resolve`.
    """
    if parse_ref(text).kind is RefKind.HUB:
        return ModelFits(text, 0, "", 0, suggestion=_suggest(parse_repo(text).repo), is_gguf=False)
    model = resolve(text, store_path)
    if model.gguf_path is None:
        return _folder(model)
    machine = machine or look_at_machine()
    if model.installed is not None:
        return replace(_installed(model.installed, machine), name=text, suggestion=_suggest(text))
    return _read(text, model.gguf_path, machine, 0)


def _installed(model: InstalledModel, machine: Machine) -> ModelFits:
    """All of an Ollama model: its adapters' bytes too, and the context that it asks for."""
    assert model.model_path is not None
    context = dict(model.parameters).get("num_ctx", 0)
    found = _read(model.name.display, model.model_path, machine, context if isinstance(context, int) else 0)
    fits = dict(found.fits)
    if model.adapters:
        fits.pop("finetune", None)
    return replace(found, size_bytes=model.size_bytes, fits=fits, has_adapter=bool(model.adapters))


def _read(name: str, path: Path, machine: Machine, context: int) -> ModelFits:
    with open_gguf(path) as gguf:
        file_type = gguf.metadata.get("general.file_type")
        return ModelFits(
            name=name,
            parameters=sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()),
            quantization=file_type_name(file_type) if isinstance(file_type, int) else "",
            size_bytes=gguf.size_bytes,
            fits=fit_model(gguf, machine, context=context),
            suggestion=_suggest(name),
        )


def _folder(model: ResolvedModel) -> ModelFits:
    assert model.folder is not None
    weights = sum(path.stat().st_size for path in model.folder.glob("*.safetensors"))
    return ModelFits(model.text, 0, "", weights, suggestion=_suggest(model.folder.name), is_gguf=False)


def _suggest(name: str) -> str:
    """`user/llama3.2:1b` -> `llama3.2-mine`."""
    last = name.rstrip("/").rsplit("/", 1)[-1].partition(":")[0].removesuffix(".gguf")
    return f"{last}-mine".lower()
