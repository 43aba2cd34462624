"""Which layers a model will have: a GGUF file or a base model, plus what a Modelfile asks for.

In: opened headers, a base, a `Modelfile`. Out: a `Draft`: a config and parts in the order in which Ollama writes
layers. It writes nothing; whether the blobs are there, and putting them there, is `land`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ollama_forge.errors import AdapterError, GGUFError, UnsupportedError
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.gguf.types import file_type_name, is_quantized
from ollama_forge.store.digest import Digest, digest_of
from ollama_forge.store.go_json import render_go_json
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.manifest import (
    ADAPTER,
    CONFIG_MEDIA_TYPE,
    DRAFT,
    LICENSE,
    MESSAGES,
    MODEL,
    PARAMS,
    PROJECTOR,
    PROMPT,
    SYSTEM,
    TEMPLATE,
    ConfigBlob,
    Layer,
    Manifest,
    config_from_gguf,
    inherit_config,
    render_config,
)
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.parameters import ParameterValue, merge_parameters, render_params_blob

_QUANTIZATION_IN_NAME = re.compile(r"(?<![A-Za-z0-9])I?Q[1-8]_[A-Z0-9]+(?:_[A-Z]+)?(?![A-Za-z0-9])", re.IGNORECASE)
_SMALLEST_BLOCK = 32

# What Ollama chooses for these architectures by itself (server/create.go:795 of v0.33): renderer, parser, stops.
_NATIVE_RENDERERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gemma4": ("gemma4", "gemma4", ("<turn|>",)),
    "laguna": ("laguna", "laguna", ()),
    "nemotron_h": ("nemotron-3-nano", "nemotron-3-nano", ()),
    "nemotron_h_moe": ("nemotron-3-nano", "nemotron-3-nano", ()),
    "nemotron_h_omni": ("nemotron-3-nano", "nemotron-3-nano", ()),
}


@dataclass(frozen=True)
class Part:
    """One layer to be, with its content when that is small text."""

    layer: Layer
    content: bytes | None = None


@dataclass(frozen=True)
class Composition:
    """All parts of a model, the config last."""

    parts: tuple[Part, ...]
    config: ConfigBlob

    @property
    def manifest(self) -> Manifest:
        return Manifest(self.parts[-1].layer, tuple(part.layer for part in self.parts[:-1]))


@dataclass(frozen=True)
class GGUFLayer:
    """A GGUF file that will be a layer: where to read it now, and what it will be called."""

    path: Path
    digest: Digest
    size_bytes: int

    def layer(self, media_type: str) -> Layer:
        return Layer(media_type, self.digest, self.size_bytes)


@dataclass(frozen=True)
class Additions:
    """GGUF files that go beside the weights."""

    adapters: tuple[GGUFLayer, ...] = ()
    projector: GGUFLayer | None = None
    draft: GGUFLayer | None = None


def compose_from_file(model: GGUFLayer, additions: Additions, modelfile: Modelfile) -> Composition:
    """A new model from a GGUF file.

    Raises:
        GGUFError, AdapterError: a file is of another kind than its place, or does not fit.
        UnsupportedError: one shard of a split model.
    """
    with open_gguf(model.path) as gguf:
        validate_model(gguf)
        config = config_from_gguf(gguf)
    layers = [Part(model.layer(MODEL))]
    if additions.projector:
        layers.append(Part(additions.projector.layer(PROJECTOR)))
    return _finish(layers, config, additions, modelfile, model.path)


def compose_from_base(
    base: InstalledModel, additions: Additions, modelfile: Modelfile, *, keeps_adapters: bool = True
) -> Composition:
    """A model that shares the layers of another; an empty template or system text takes the base's away.

    Raises:
        GGUFError, AdapterError: a file is of another kind than its place, or does not fit.
        StoreError: a blob of the base is missing.
    """
    dropped = set()
    if not keeps_adapters:
        dropped.add(ADAPTER)
    if additions.projector:
        dropped.add(PROJECTOR)
    if additions.draft:
        dropped.add(DRAFT)
    parts = [
        Part(replace(layer, from_name=base.name.display, size_bytes=base.blobs.size_bytes(layer.digest)))
        for layer in base.manifest.layers
        if layer.media_type not in dropped
    ]
    if additions.projector:
        parts.append(Part(additions.projector.layer(PROJECTOR)))
    return _finish(parts, base.config, additions, modelfile, base.model_path, base)


def _finish(
    parts: list[Part],
    config: ConfigBlob,
    additions: Additions,
    modelfile: Modelfile,
    model_path: Path | None,
    base: InstalledModel | None = None,
) -> Composition:
    if additions.adapters and model_path is None:
        raise AdapterError("An adapter needs weights to stand on, and this model has none on this machine")
    for adapter in additions.adapters:
        if model_path is not None:
            validate_adapter(adapter.path, model_path)
        parts.append(Part(adapter.layer(ADAPTER)))
    if additions.projector:
        validate_projector(additions.projector.path)
    if additions.draft:
        parts.append(Part(additions.draft.layer(DRAFT)))
        config = _with_draft(config, additions.draft.path)
    config = inherit_config(config, renderer=modelfile.renderer, parser=modelfile.parser, requires=modelfile.requires)
    config, native_stops = _with_native_renderer(config)
    parts = _with_texts(parts, modelfile)
    parts = _with_parameters(parts, base.parameters if base else (), modelfile.parameters, native_stops)
    if modelfile.messages:
        turns = [{"role": turn.role, "content": turn.content} for turn in modelfile.messages]
        parts = _replaced(parts, (MESSAGES,), render_go_json(turns).encode() + b"\n")
    parts.append(_text_part(CONFIG_MEDIA_TYPE, render_config(config)))
    return Composition(tuple(parts), config)


def _with_texts(parts: list[Part], modelfile: Modelfile) -> list[Part]:
    for media_types, text in (((TEMPLATE, PROMPT), modelfile.template), ((SYSTEM,), modelfile.system)):
        if text is not None:
            parts = _replaced(parts, media_types, text.encode())
    present = {part.layer.digest for part in parts if part.layer.media_type == LICENSE}
    for text in modelfile.licenses:
        part = _text_part(LICENSE, text.encode())
        if part.layer.digest not in present:
            present.add(part.layer.digest)
            parts.append(part)
    return parts


def _with_parameters(
    parts: list[Part],
    inherited: Iterable[tuple[str, ParameterValue]],
    asked: tuple[tuple[str, ParameterValue], ...],
    native_stops: tuple[str, ...],
) -> list[Part]:
    merged = dict(merge_parameters(inherited, asked))
    if native_stops and "stop" not in merged:
        merged["stop"] = native_stops
    elif not asked:
        return parts
    kept = tuple((name, value) for name, value in merged.items() if value != ())
    return _replaced(parts, (PARAMS,), render_params_blob(kept) if kept else b"")


def _with_native_renderer(config: ConfigBlob) -> tuple[ConfigBlob, tuple[str, ...]]:
    row = _NATIVE_RENDERERS.get(config.model_family)
    if row is None or (config.renderer and config.parser):
        return config, ()
    return replace(config, renderer=config.renderer or row[0], parser=config.parser or row[1]), row[2]


def _with_draft(config: ConfigBlob, path: Path) -> ConfigBlob:
    with open_gguf(path) as gguf:
        validate_model(gguf)
        return replace(config, draft_json=json.dumps({"model_format": "gguf", "architecture": gguf.architecture}))


def _replaced(parts: list[Part], media_types: tuple[str, ...], content: bytes) -> list[Part]:
    kept = [part for part in parts if part.layer.media_type not in media_types]
    return [*kept, _text_part(media_types[0], content)] if content else kept


def _text_part(media_type: str, content: bytes) -> Part:
    return Part(Layer(media_type, digest_of(content), len(content)), content)


def validate_model(gguf: GGUFFile) -> None:
    """Refuse a GGUF file that Ollama would not take for a model (server/create.go:1264 of v0.33).

    Raises:
        GGUFError: an adapter or a projector.
        UnsupportedError: a part of a split model.
    """
    kind = gguf.metadata.get("general.type", "model")
    if kind == "adapter":
        raise GGUFError(
            f"{str(gguf.path)!r} is an adapter, not a model",
            why="Its general.type says so.",
            next="Give it with --adapter, and name its base model.",
        )
    if kind in ("projector", "mmproj") or gguf.architecture == "clip":
        raise GGUFError(
            f"{str(gguf.path)!r} is a projector for images or sound, not a model",
            next="Name the model's own GGUF file.",
        )
    if len(gguf.paths) > 1:
        raise UnsupportedError(
            f"{str(gguf.path)!r} is one of {len(gguf.paths)} shards, and Ollama's store holds a model as one file",
            next=f"Join them first: llama-gguf-split --merge {gguf.path} whole.gguf",
        )
    _validate_quantization(gguf)


def _validate_quantization(gguf: GGUFFile) -> None:
    """Refuse a file that calls itself quantized, by its header or its name, and is not: it would take the room and the
    time of another model than the one that was asked for.
    """
    announced = gguf.metadata.get("general.file_type")
    header = file_type_name(announced) if isinstance(announced, int) else ""
    spelled = _QUANTIZATION_IN_NAME.search(gguf.path.name)
    named = spelled[0].upper() if spelled else ""
    claims = [claim for claim in (header, named) if _QUANTIZATION_IN_NAME.fullmatch(claim)]
    matrices = [tensor for tensor in gguf.tensors.values() if len(tensor.shape) > 1]
    # Rows that no block type divides stay as they are in a truly quantized file.
    divisible = [tensor for tensor in matrices if tensor.shape[-1] % _SMALLEST_BLOCK == 0]
    if not claims or not divisible or any(is_quantized(tensor.type) for tensor in matrices):
        return
    held = "/".join(sorted({tensor.type.name for tensor in matrices}))
    raise GGUFError(
        f"{str(gguf.path)!r} is called {claims[0]}, and its tensors are {held}",
        why="Its header says so." if claims[0] == header else "Its name says so.",
        next=f"Quantize it: ollama-forge quantize {gguf.path} -o quantized.gguf --type {claims[0]}"
        + ("" if claims[0] == header else ", or rename it."),
    )


def validate_projector(path: Path) -> None:
    """Refuse a file that is no projector.

    Raises:
        GGUFError: it is something else.
    """
    with open_gguf(path) as gguf:
        kind = gguf.metadata.get("general.type", "")
        if kind not in ("projector", "mmproj") and gguf.architecture != "clip":
            raise GGUFError(
                f"{str(path)!r} is not a projector",
                why=f"Its general.type is {kind!r} and its architecture {gguf.architecture!r}.",
                next="Name the model's mmproj GGUF file.",
            )


def validate_adapter(path: Path, model_path: Path) -> None:
    """Refuse a LoRA file that llama.cpp would not load on this model (src/llama-adapter.cpp of llama.cpp).

    Raises:
        AdapterError: not a LoRA GGUF, of another architecture, or with a tensor that finds no home.
    """
    with open_gguf(path) as adapter, open_gguf(model_path) as model:
        kinds = (adapter.metadata.get("general.type"), adapter.metadata.get("adapter.type"))
        if kinds != ("adapter", "lora"):
            raise AdapterError(
                f"{str(path)!r} is not a LoRA adapter",
                why=f"Its general.type and adapter.type are {kinds[0]!r} and {kinds[1]!r}.",
                next="Give a GGUF file of a LoRA, or convert the adapter's folder first.",
            )
        if adapter.architecture != model.architecture:
            raise AdapterError(
                f"{str(path)!r} is for {adapter.architecture!r} models, and the base is {model.architecture!r}",
                next="Use the base model that the adapter was trained on.",
            )
        for name, tensor in adapter.tensors.items():
            _validate_adapter_tensor(path, name, tensor.shape, model)


def _validate_adapter_tensor(path: Path, name: str, shape: tuple[int, ...], model: GGUFFile) -> None:
    home, separator, half = name.rpartition(".lora_")
    if not separator and name.endswith("_norm.weight"):
        return
    target = model.tensors.get(home) if half in ("a", "b") else None
    if target is None:
        raise AdapterError(
            f"The adapter's tensor {name!r} finds no home in the base model",
            why=f"{str(path)!r} was made for another model.",
            next="Use the base model that the adapter was trained on.",
        )
    # The pair of an embedding is stored the other way round; llama.cpp checks it when it loads.
    side = -1 if half == "a" else -2
    fits = home == "token_embd.weight" or (len(shape) == len(target.shape) >= 2 and shape[side] == target.shape[side])
    if not fits:
        raise AdapterError(
            f"The adapter's tensor {name!r} has the shape {shape}, and the base model's has {target.shape}",
            why=f"{str(path)!r} was made for a model of another size.",
            next="Use the base model that the adapter was trained on.",
        )
