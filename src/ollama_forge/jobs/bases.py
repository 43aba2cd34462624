"""What a fine-tune would start from: the file behind a name, whether this tool can train it, and where it comes from.

In: a model argument. Out: `ResolvedBase`: the path, or the command that gets one. Only headers and small vectors are
read; no server and no network is asked.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.arch.families import find_family, find_family_by_gguf
from ollama_forge.errors import NotFoundError, StoreError, TrainingError, UnsupportedError
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import file_type_name
from ollama_forge.jobs.counterpart import Counterpart, find_counterpart
from ollama_forge.jobs.hf_cache import CachedModel, read_hf_cache
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.source.ref import RefKind, parse_ref
from ollama_forge.store.catalog import open_store
from ollama_forge.store.manifest import MODEL
from ollama_forge.store.name import parse_name

_TOKENIZERS = ("gpt2", "llama")


@dataclass(frozen=True)
class ResolvedBase:
    """What `train-resolve-base` tells.

    Attributes:
        form: `gguf`, `folder`, or empty when nothing is here.
        path: the GGUF, or the Hugging Face folder.
        is_single: one file holds all weights.
        is_trainable: this tool can train it as it is; `reasons` say why not.
        command: what to type next: to get it, or to train it.
        counterpart: of a GGUF.
    """

    text: str
    name: str
    form: str = ""
    path: Path | None = None
    digest: str = ""
    is_single: bool = False
    family: str = ""
    quantization: str = ""
    parameters: int = 0
    size_bytes: int = 0
    is_trainable: bool = False
    reasons: tuple[str, ...] = ()
    command: str = ""
    counterpart: Counterpart | None = None

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "found": self.path is not None,
            "form": self.form or None,
            "path": str(self.path) if self.path else None,
            "digest": self.digest or None,
            "single_file": self.is_single,
            "family": self.family or None,
            "quantization": self.quantization or None,
            "parameters": self.parameters,
            "size": self.size_bytes,
            "trainable": self.is_trainable,
            "reasons": list(self.reasons),
            "next": self.command,
            "hf": self.counterpart.document() if self.counterpart else None,
        }


def resolve_base(text: str, store_path: Path | None = None, hf_cache: Path | None = None) -> ResolvedBase:
    """Find what `text` names, and say what training would make of it.

    Args:
        text: an Ollama name, a path, or `hf:organization/name`.
        hf_cache: another Hugging Face cache than this machine's.

    Raises:
        UsageError: the text means nothing.
        NameInvalidError: it is no name that Ollama allows.
        NotFoundError: a path where nothing is.
        FormatError: the file is broken.
    """
    ref = parse_ref(text)
    cached = read_hf_cache(hf_cache)
    if ref.kind is RefKind.HUB:
        return _resolve_hub(text, ref.repo, ref.revision, cached)
    try:
        model = resolve(text, store_path)
    except NotFoundError:
        if ref.kind is RefKind.PATH:
            raise
        name = parse_name(text).display
        return ResolvedBase(text, name, reasons=("It is not in Ollama's store.",), command=f"ollama pull {name}")
    except StoreError as error:
        name = parse_name(text).display
        return ResolvedBase(text, name, reasons=(error.what,), command=f"ollama pull {name}")
    except UnsupportedError as error:
        found = open_store(store_path).find(text)
        return ResolvedBase(
            text,
            found.name.display,
            digest=found.digest,
            family=found.family,
            quantization=found.quantization,
            reasons=(f"{error.what}: {_why_without_gguf(found.config.is_remote)}",),
            command="ollama-forge list",
        )
    if model.folder is not None:
        return _describe_folder(text, model.folder)
    assert model.gguf_path is not None
    with open_gguf(model.gguf_path) as gguf:
        return _describe_gguf(text, model, gguf, cached)


def find_obstacles(model: ResolvedModel, gguf: GGUFFile) -> tuple[str, ...]:
    """Why this tool cannot train a model on its packed blocks; empty when it can."""
    from ollama_forge.gguf.native import can_dequantize
    from ollama_forge.jobs.finetune_setup import require_trainable

    reasons = []
    if model.adapters:
        reasons.append(
            f"It has {len(model.adapters)} adapter layer{'s' if len(model.adapters) > 1 else ''}; training starts from "
            "plain weights. Train on its base, or merge the adapter first."
        )
    if model.installed is not None and len(model.installed.manifest.of_type(MODEL)) > 1:
        reasons.append("Its manifest has several layers of weights.")
    try:
        require_trainable(gguf, model.text)
    except TrainingError as error:
        reasons.append(f"{error.what}. {error.why}")
    else:
        try:
            find_family_by_gguf(gguf.architecture)
        except UnsupportedError as error:
            reasons.append(f"{error.what}. {error.why}")
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if kind not in _TOKENIZERS:
        reasons.append(f"Its tokenizer is of the kind {kind!r}; text can be prepared for {' and '.join(_TOKENIZERS)}.")
    unreadable = sorted({tensor.type.name for tensor in gguf.tensors.values() if not can_dequantize(tensor.type)})
    if unreadable:
        reasons.append(f"Some tensors are {', '.join(unreadable)}, which cannot be decoded here.")
    return tuple(reasons)


def _describe_gguf(text: str, model: ResolvedModel, gguf: GGUFFile, cached: list[CachedModel]) -> ResolvedBase:
    installed = model.installed
    file_type = gguf.metadata.get("general.file_type")
    name = installed.name.display if installed else str(gguf.path)
    reasons = find_obstacles(model, gguf)
    return ResolvedBase(
        text=text,
        name=name,
        form="gguf",
        path=gguf.path,
        digest=installed.digest if installed else "",
        is_single=len(gguf.paths) == 1,
        family=gguf.architecture,
        quantization=file_type_name(file_type) if isinstance(file_type, int) else "unknown",
        parameters=sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()),
        size_bytes=gguf.size_bytes,
        is_trainable=not reasons,
        reasons=reasons,
        command=_next_command(name, reasons),
        counterpart=find_counterpart(gguf, cached),
    )


def _describe_folder(text: str, folder: Path) -> ResolvedBase:
    from ollama_forge.weights.folder import read_config
    from ollama_forge.weights.safetensors import open_safetensors

    reasons: tuple[str, ...] = ()
    family = ""
    try:
        family = find_family(read_config(folder)).name
    except UnsupportedError as error:
        reasons = (f"{error.what}. {error.why}",)
    with open_safetensors(folder) as opened:
        dtypes = sorted({tensor.dtype for tensor in opened.tensors.values()})
        parameters = sum(math.prod(tensor.shape) for tensor in opened.tensors.values())
        size_bytes, n_files = opened.size_bytes, len(opened.files)
    return ResolvedBase(
        text=text,
        name=text,
        form="folder",
        path=folder,
        is_single=n_files == 1,
        family=family,
        quantization="/".join(dtypes),
        parameters=parameters,
        size_bytes=size_bytes,
        is_trainable=not reasons,
        reasons=reasons,
        command=_next_command(str(folder), reasons),
    )


def _resolve_hub(text: str, repo: str, revision: str, cached: list[CachedModel]) -> ResolvedBase:
    """A repository of the Hub: in the cache, or the command that downloads it."""
    wanted = [model for model in cached if model.repo == repo and model.is_at(revision)]
    pinned = f" --revision {revision}" if revision else ""
    command = f"hf download {repo}{pinned}"
    if not wanted:
        return ResolvedBase(text, repo, reasons=("It is not in the Hugging Face cache.",), command=command)
    missing = wanted[0].missing()
    if missing:
        return ResolvedBase(
            text, repo, reasons=tuple(f"The copy in the cache lacks {part}" for part in missing), command=command
        )
    return _describe_folder(text, wanted[0].folder)


def _next_command(base: str, reasons: Sequence[str]) -> str:
    if reasons:
        return "ollama-forge list"
    return f"ollama-forge finetune --data DATA --base {shlex.quote(base)} --name NEW"


def _why_without_gguf(is_remote: bool) -> str:
    return "it runs in Ollama's cloud." if is_remote else "its weights are of another form (MLX), or missing."
