"""From what a person typed to what lies on this disk: an Ollama model, a GGUF file or a Hugging Face folder.

In: the text of a model argument and the store. Out: `ResolvedModel`. It looks only at names and headers.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from ollama_forge.errors import (
    NameInvalidError,
    NotFoundError,
    StoreError,
    UnsafeFileError,
    UnsupportedError,
    UsageError,
)
from ollama_forge.source.ref import ModelRef, RefKind, parse_ref
from ollama_forge.store.catalog import open_store
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.modelfile import Modelfile

STORED = "ollama://"
"""Before the name of an Ollama model where others expect a name on the Hub: in adapters that were trained on it."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this disk; exactly one of `gguf_path` and `folder` is set.

    Attributes:
        text: as typed.
        gguf_path: its weights as GGUF (the first file of a split set).
        folder: its weights as a Hugging Face folder.
        installed: the Ollama model, when it was named so.
        adapters: LoRA GGUFs that belong to it, in order.
        modelfile: what else the Ollama model says (template, system prompt, parameters, messages).
    """

    text: str
    gguf_path: Path | None = None
    folder: Path | None = None
    installed: InstalledModel | None = None
    adapters: tuple[Path, ...] = ()
    modelfile: Modelfile = field(default_factory=Modelfile)

    @property
    def projector(self) -> Path | None:
        """The mmproj of an Ollama model that sees or hears."""
        return self.installed.projector if self.installed is not None else None


def resolve(text: str, store_path: Path | None = None) -> ResolvedModel:
    """Find the model that `text` names; one of the Hub is downloaded into the Hugging Face cache first.

    Raises:
        NotFoundError: nothing of that name or path is here.
        UnsafeFileError: a pickle file.
        UnsupportedError: a model that runs in Ollama's cloud.
        HubError, DiskError: as `source.hub`.
        UsageError: the text means nothing.
    """
    ref = parse_ref(text)
    if ref.kind is RefKind.HUB:
        path = _fetched(text)
        return ResolvedModel(text, folder=path) if path.is_dir() else ResolvedModel(text, gguf_path=path)
    if ref.kind is RefKind.PATH:
        return _resolve_path(ref)
    try:
        return _resolve_installed(ref.text, store_path)
    except (NotFoundError, NameInvalidError):  # a path of several parts is no name of Ollama's
        if Path(ref.text).exists():
            return _resolve_path(ModelRef(RefKind.PATH, ref.text, path=Path(ref.text)))
        raise


def resolve_stored(text: str, store_path: Path | None = None) -> ResolvedModel | None:
    """The model that an adapter's `ollama://NAME` means; None for any other text.

    Raises:
        NotFoundError: the store has no such model.
    """
    return _resolve_installed(text.removeprefix(STORED), store_path) if text.startswith(STORED) else None


def resolve_gguf(text: str, store_path: Path | None = None) -> Path:
    """The GGUF file that `text` names.

    Raises:
        UsageError: it is a Hugging Face folder.
    """
    model = resolve(text, store_path)
    if model.gguf_path is None:
        raise UsageError(
            f"{text!r} is a Hugging Face folder, not a GGUF",
            next=f"Convert it first: ollama-forge convert {text} -o model.gguf --quant Q4_K_M",
        )
    return model.gguf_path


def resolve_folder(text: str) -> Path:
    """The Hugging Face folder that `text` names.

    Raises:
        UsageError: it is a GGUF or an Ollama name.
    """
    ref = parse_ref(text)
    path = ref.path if ref.kind is RefKind.PATH else Path(text)
    if ref.kind is RefKind.HUB:
        path = _fetched(text)
    assert path is not None
    found = _resolve_dir(text, path).gguf_path if path.is_dir() else path
    if found is None:
        return path
    if found.is_file() and found.suffix.lower() == ".gguf":
        shown = shlex.quote(str(found))
        raise UsageError(
            f"{text!r} is a GGUF file already" if found == path else f"The folder {text!r} holds a GGUF file",
            next=f"ollama-forge quantize {shown} -o OUT.gguf --type Q4_K_M, or "
            f"ollama-forge convert --gguf {shown} --name NAME",
        )
    raise NotFoundError(
        f"There is no folder {text!r}",
        why="A Hugging Face model is a folder with config.json and safetensors files.",
        next="See the models that are here: ollama-forge list",
    )


def _fetched(text: str) -> Path:
    """The folder or file of a model of the Hub, in the Hugging Face cache."""
    from ollama_forge.jobs.hub_local import fetch_model_path
    from ollama_forge.source.hub_files import parse_repo

    return fetch_model_path(parse_repo(text))


def _resolve_installed(text: str, store_path: Path | None) -> ResolvedModel:
    model = open_store(store_path).find(text)
    path = model.model_path
    if path is None:
        raise UnsupportedError(
            f"{model.name.display!r} has no GGUF in the store",
            why="It runs in Ollama's cloud, or is an MLX model.",
            next="Choose another model: ollama-forge list",
        )
    if not path.exists():
        raise StoreError(
            f"The weights of {model.name.display!r} are missing: {str(path)!r}",
            next=f"Get them again with `ollama pull {model.name.display}`, or run `ollama-forge verify`.",
        )
    return ResolvedModel(text, gguf_path=path, installed=model, adapters=model.adapters, modelfile=model.modelfile())


def _resolve_path(ref: ModelRef) -> ResolvedModel:
    path = ref.path
    assert path is not None
    if not path.exists():
        raise NotFoundError(
            f"There is no file or folder {ref.text!r}",
            next="Check the path; for an Ollama model type its name alone (ollama-forge list).",
        )
    if path.is_dir():
        return _resolve_dir(ref.text, path)
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return _resolve_dir(ref.text, path.parent)
    if suffix in _PICKLES:
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UnsafeFileError(
                    f"{ref.text!r} is a PyTorch pickle",
                    why="Reading one runs whatever code it holds.",
                    next="Use the model's .safetensors files; most repos have them, or a converted copy of them.",
                )
    return ResolvedModel(ref.text, gguf_path=path)


def _resolve_dir(text: str, folder: Path) -> ResolvedModel:
    if (folder / "config.json").exists():
        return ResolvedModel(text, folder=folder)
    ggufs = sorted(p for p in folder.glob("*.gguf") if "mmproj" not in p.name.lower())
    firsts = [p for p in ggufs if "-of-" not in p.stem or "-00001-of-" in p.stem]
    if len(firsts) == 1:
        return ResolvedModel(text, gguf_path=firsts[0])
    if firsts:
        raise UsageError(
            f"The folder {text!r} holds {len(firsts)} GGUF models",
            next="Name one of them: " + ", ".join(str(p) for p in firsts[:5]),
        )
    if (folder / "adapter_config.json").exists():
        raise UsageError(
            f"The folder {text!r} holds an adapter, not a model",
            next=f"Put it on its base: ollama-forge retrain --base BASE --adapter {shlex.quote(text)} --name NAME",
        )
    # as a download leaves it: models--org--name/snapshots/COMMIT
    below = sorted(path.parent for pattern in ("*/config.json", "*/*/config.json") for path in folder.glob(pattern))
    raise NotFoundError(
        f"The folder {text!r} holds no model: neither config.json nor a .gguf file",
        why="A Hugging Face model is a folder with config.json and safetensors files.",
        next="Name the folder that does: " + ", ".join(shlex.quote(str(found)) for found in below[:5])
        if below
        else "See the models that are here: ollama-forge list",
    )
