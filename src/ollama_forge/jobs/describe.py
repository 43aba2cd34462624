"""What a model is, from its headers alone: the facts behind `show`, for any form a model may have.

In: a `ResolvedModel`. Out: `ModelDescription`. No tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import file_type_name
from ollama_forge.jobs.conversion import TypeShare, type_shares
from ollama_forge.jobs.counterpart import name_origin
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.store.modelfile import Modelfile, render_modelfile

if TYPE_CHECKING:
    from ollama_forge.convert.plan import Conversion

_DIMENSIONS = {
    "context_length": "context_length",
    "embedding_length": "embedding_length",
    "block_count": "blocks",
    "feed_forward_length": "feed_forward_length",
    "attention.head_count": "attention_heads",
    "attention.head_count_kv": "key_value_heads",
    "expert_count": "experts",
    "expert_used_count": "experts_used",
}


@dataclass(frozen=True)
class LayerLine:
    """One layer of an Ollama model: its kind, digest and size."""

    kind: str
    digest: str
    size_bytes: int


@dataclass(frozen=True)
class ModelDescription:
    """A model in facts.

    Attributes:
        parameters: number of weights, the adapters' not counted.
        dimensions: `context_length`, `embedding_length`, `blocks` ... where the header says them.
        types: the quantization mix, the largest share first.
        chat_template: the Jinja template in the GGUF or folder.
        tokenizer: its kind and pre-tokenizer, and how many tokens.
    """

    text: str
    name: str
    path: str
    family: str
    parameters: int
    size_bytes: int
    quantization: str
    dimensions: Mapping[str, Any]
    types: tuple[TypeShare, ...]
    chat_template: str | None
    tokenizer: Mapping[str, Any]
    modelfile: Modelfile
    digest: str = ""
    layers: tuple[LayerLine, ...] = ()
    origin: Mapping[str, str] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "path": self.path,
            "digest": self.digest,
            "family": self.family,
            "parameters": self.parameters,
            "size": self.size_bytes,
            "quantization": self.quantization,
            **{key: self.dimensions.get(key) for key in _DIMENSIONS.values()},
            "types": {
                share.type: {
                    "tensors": share.tensors,
                    "bytes": share.size_bytes,
                    "bits_per_weight": round(share.bits_per_weight, 4),
                }
                for share in self.types
            },
            "chat_template": self.chat_template,
            "tokenizer": dict(self.tokenizer),
            "origin": dict(self.origin),
            "template": self.modelfile.template,
            "system": self.modelfile.system,
            "modelfile_parameters": dict(self.modelfile.parameters),
            "messages": [{"role": turn.role, "content": turn.content} for turn in self.modelfile.messages],
            "licenses": list(self.modelfile.licenses),
            "modelfile": render_modelfile(self.modelfile) if self.modelfile.sources else None,
            "layers": [{"kind": x.kind, "digest": x.digest, "size": x.size_bytes} for x in self.layers],
        }


def describe(model: ResolvedModel) -> ModelDescription:
    """The facts of a resolved model.

    Raises:
        FormatError: a header that does not hold together.
        UnsupportedError: a Hugging Face folder of a family that is not known.
    """
    if model.folder is not None:
        return _describe_folder(model)
    assert model.gguf_path is not None
    with open_gguf(model.gguf_path) as gguf:
        return _describe_gguf(model, gguf)


def _describe_gguf(model: ResolvedModel, gguf: GGUFFile) -> ModelDescription:
    installed = model.installed
    shares = type_shares([(tensor.type, tensor.shape) for tensor in gguf.tensors.values()])
    dimensions = {}
    for suffix, key in _DIMENSIONS.items():
        value = gguf.arch_value(suffix)
        if value is not None:
            dimensions[key] = value if isinstance(value, int) else list(value)
    file_type = gguf.metadata.get("general.file_type")
    return ModelDescription(
        text=model.text,
        name=installed.name.display if installed else str(gguf.metadata.get("general.name", gguf.path.stem)),
        path=str(gguf.path),
        family=gguf.architecture,
        parameters=sum(math.prod(tensor.shape) for tensor in gguf.tensors.values()),
        size_bytes=installed.size_bytes if installed else gguf.size_bytes,
        quantization=file_type_name(file_type) if isinstance(file_type, int) else "unknown",
        dimensions=dimensions,
        types=shares,
        chat_template=_text(gguf.metadata.get("tokenizer.chat_template")),
        tokenizer=_tokenizer(gguf),
        modelfile=model.modelfile,
        digest=installed.digest if installed else "",
        layers=tuple(
            LayerLine(layer.media_type.rsplit(".", 1)[-1], str(layer.digest), layer.size_bytes)
            for layer in installed.manifest.layers
        )
        if installed
        else (),
        origin={**_origin(gguf), **name_origin(gguf.metadata)},
    )


def _tokenizer(gguf: GGUFFile) -> dict[str, Any]:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    return {
        "model": _text(gguf.metadata.get("tokenizer.ggml.model")),
        "pre": _text(gguf.metadata.get("tokenizer.ggml.pre")),
        "tokens": len(tokens) if tokens is not None else 0,
    }


def _origin(gguf: GGUFFile) -> dict[str, str]:
    prefixes = ("general.base_model.", "general.source.", "general.license", "general.author", "general.organization")
    return {key: value for key, value in gguf.metadata.items() if key.startswith(prefixes) and isinstance(value, str)}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _describe_folder(model: ResolvedModel) -> ModelDescription:
    from ollama_forge.convert.plan import plan_conversion

    assert model.folder is not None
    with plan_conversion(model.folder) as conversion:
        return _describe_conversion(model, conversion)


def _describe_conversion(model: ResolvedModel, conversion: Conversion) -> ModelDescription:
    assert model.folder is not None
    values = {entry.key: entry.value for entry in conversion.fields}
    family = str(values.get("general.architecture", ""))
    shares = type_shares([(entry.type, entry.shape) for entry in conversion.entries])
    tokens = values.get("tokenizer.ggml.tokens")
    return ModelDescription(
        text=model.text,
        name=str(values.get("general.name", model.folder.name)),
        path=str(model.folder),
        family=family,
        parameters=sum(math.prod(entry.shape) for entry in conversion.entries),
        size_bytes=conversion.size_bytes,
        quantization=file_type_name(values["general.file_type"]),
        dimensions={
            key: values[f"{family}.{suffix}"] for suffix, key in _DIMENSIONS.items() if f"{family}.{suffix}" in values
        },
        types=shares,
        chat_template=_text(values.get("tokenizer.chat_template")),
        tokenizer={
            "model": values.get("tokenizer.ggml.model"),
            "pre": values.get("tokenizer.ggml.pre"),
            "tokens": len(tokens) if tokens is not None else 0,
        },
        modelfile=model.modelfile,
    )
