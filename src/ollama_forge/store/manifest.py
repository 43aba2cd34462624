"""A manifest and its config blob: bytes in, frozen values out, and back. Nothing here touches the disk.

Read as tolerantly as the server does (unknown fields, other spellings of a digest, a missing config), written in one
way only: compact, Go's field order, canonical digests, and no newline at the end, because only then is the manifest's
digest always the SHA-256 of its file (manifest/manifest.go:136 of Ollama v0.33 hashes what Go's decoder consumed).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ollama_forge.errors import DigestError, FormatError, ManifestError
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import file_type_name
from ollama_forge.store.digest import Digest, parse_digest
from ollama_forge.store.go_json import parse_json_object, render_go_json

MANIFEST_MEDIA_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_MEDIA_TYPE = "application/vnd.docker.container.image.v1+json"
_IMAGE = "application/vnd.ollama.image."
MODEL = _IMAGE + "model"
ADAPTER = _IMAGE + "adapter"
PROJECTOR = _IMAGE + "projector"
DRAFT = _IMAGE + "draft"
TEMPLATE = _IMAGE + "template"
PROMPT = _IMAGE + "prompt"  # the template's name before 2024
SYSTEM = _IMAGE + "system"
PARAMS = _IMAGE + "params"
MESSAGES = _IMAGE + "messages"
LICENSE = _IMAGE + "license"
GGUF_MEDIA_TYPES = frozenset({MODEL, ADAPTER, PROJECTOR, DRAFT})

MANIFEST_LIMIT_BYTES = 32 << 20
CONFIG_LIMIT_BYTES = 4 << 20
_MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True)
class Layer:
    """One blob of a model and what it is for.

    Attributes:
        from_name: the model or file that it came from; only for display.
        name: the tensor or file name of a layer of an MLX model.
    """

    media_type: str
    digest: Digest
    size_bytes: int
    from_name: str = ""
    name: str = ""


@dataclass(frozen=True)
class Manifest:
    """What a model consists of. `config` is None where the file names none, which Ollama allows."""

    config: Layer | None
    layers: tuple[Layer, ...]

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        return (*self.layers, self.config) if self.config else self.layers

    @property
    def size_bytes(self) -> int:
        """The sum that `ollama list` shows: what the layers claim, config included."""
        return sum(layer.size_bytes for layer in self.all_layers)

    def of_type(self, *media_types: str) -> tuple[Layer, ...]:
        """The layers of some kinds, in order."""
        return tuple(layer for layer in self.layers if layer.media_type in media_types)


def parse_manifest(raw: bytes) -> Manifest:
    """Read a manifest.

    Raises:
        ManifestError: not a JSON object, too large, or a layer whose digest or size is impossible.
    """
    try:
        document = _fold_keys(parse_json_object(raw, limit_bytes=MANIFEST_LIMIT_BYTES, what="The manifest"))
    except FormatError as exc:
        raise ManifestError(exc.what, why=exc.why, next="Run `ollama-forge verify`.") from exc
    layers = document.get("layers")
    if layers is None:
        layers = []
    if not isinstance(layers, list):
        raise _broken("its layers are not a list")
    config = document.get("config")
    return Manifest(
        _parse_layer(config, "config") if isinstance(config, dict) and _fold_keys(config).get("digest") else None,
        tuple(_parse_layer(layer, f"layer {number}") for number, layer in enumerate(layers, 1)),
    )


def render_manifest(manifest: Manifest) -> bytes:
    """The one spelling of a manifest: same value, same bytes."""
    config = _layer_members(manifest.config) if manifest.config else {"mediaType": "", "digest": "", "size": 0}
    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_MEDIA_TYPE,
        "config": config,
        "layers": [_layer_members(layer) for layer in manifest.layers],
    }
    return render_go_json(document).encode()


def _parse_layer(value: object, where: str) -> Layer:
    if not isinstance(value, dict):
        raise _broken(f"its {where} is not an object")
    members = _fold_keys(value)
    size = 0 if members.get("size") is None else members["size"]
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE:
        raise _broken(f"its {where} has the size {_shown(size)}")
    texts = {key: "" if members.get(key) is None else members[key] for key in ("mediatype", "digest", "from", "name")}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise _broken(f"its {where} has the {key} {_shown(text)}")
    try:
        digest = parse_digest(str(texts["digest"]))
    except DigestError as exc:
        raise _broken(f"its {where} has a digest that is none: {exc.what}") from exc
    return Layer(str(texts["mediatype"]), digest, size, str(texts["from"]), str(texts["name"]))


def _layer_members(layer: Layer) -> dict[str, object]:
    members: dict[str, object] = {
        "mediaType": layer.media_type,
        "digest": str(layer.digest),
        "size": layer.size_bytes,
    }
    if layer.from_name:
        members["from"] = layer.from_name
    if layer.name:
        members["name"] = layer.name
    return members


def _fold_keys(members: Mapping[str, object]) -> dict[str, object]:
    """Go matches the names of JSON members without regard to case, and the last one wins."""
    return {key.lower(): value for key, value in members.items()}


def _broken(why: str) -> ManifestError:
    return ManifestError(f"The manifest is broken: {why}", next="Run `ollama-forge verify`.")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 100 else shown[:97] + "..."


@dataclass(frozen=True)
class ConfigBlob:
    """What the config blob says about a model (types/model/config.go of Ollama v0.33).

    Attributes:
        model_type: the number of parameters in Ollama's words, such as `7.6B`.
        file_type: the quantization's name, such as `Q4_K_M`.
        draft_json, extra_json: JSON objects kept as text: the draft's description, and every field this version does
            not
            know, so that rewriting a config loses nothing.
    """

    model_format: str = "gguf"
    model_family: str = ""
    model_families: tuple[str, ...] = ()
    model_type: str = ""
    file_type: str = ""
    renderer: str = ""
    parser: str = ""
    requires: str = ""
    remote_host: str = ""
    remote_model: str = ""
    capabilities: tuple[str, ...] = ()
    context_length: int = 0
    embedding_length: int = 0
    base_name: str = ""
    draft_json: str = ""
    architecture: str = "amd64"
    os: str = "linux"
    extra_json: str = ""

    @property
    def is_remote(self) -> bool:
        """Whether this is only a pointer to a model in Ollama's cloud."""
        return bool(self.remote_model)


_ALWAYS = ("model_format", "model_family", "model_families", "model_type", "file_type")
_WHEN_SET = (
    "renderer",
    "parser",
    "requires",
    "remote_host",
    "remote_model",
    "capabilities",
    "context_length",
    "embedding_length",
    "base_name",
)
_LISTS = ("model_families", "capabilities")
_NUMBERS = ("context_length", "embedding_length")
_KNOWN = frozenset((*_ALWAYS, *_WHEN_SET, "draft", "architecture", "os"))
_STALE = frozenset({"rootfs"})  # lists the layers of the manifest it came with; no version reads it


def parse_config(raw: bytes) -> ConfigBlob:
    """Read a config blob.

    Raises:
        ManifestError: not a JSON object, or a field of another type than Ollama's.
    """
    try:
        document = parse_json_object(raw, limit_bytes=CONFIG_LIMIT_BYTES, what="The config blob")
    except FormatError as exc:
        raise ManifestError(exc.what, why=exc.why, next="Run `ollama-forge verify`.") from exc
    known = {key.lower(): value for key, value in document.items() if key.lower() in _KNOWN}
    texts: dict[str, str] = {}
    for key in (*_ALWAYS, *_WHEN_SET, "architecture", "os"):
        if key not in _LISTS and key not in _NUMBERS:
            texts[key] = _config_text(known.get(key), key)
    draft = known.get("draft")
    extra = {key: value for key, value in document.items() if key.lower() not in _KNOWN | _STALE}
    return ConfigBlob(
        **texts,
        model_families=_config_list(known.get("model_families"), "model_families"),
        capabilities=_config_list(known.get("capabilities"), "capabilities"),
        context_length=_config_number(known.get("context_length"), "context_length"),
        embedding_length=_config_number(known.get("embedding_length"), "embedding_length"),
        draft_json=render_go_json(draft) if isinstance(draft, dict) else "",
        extra_json=render_go_json(extra) if extra else "",
    )


def render_config(config: ConfigBlob) -> bytes:
    """The config blob as Ollama writes it (Go's order, a newline at the end), then the fields it does not know."""
    members: dict[str, object] = {key: getattr(config, key) for key in _ALWAYS}
    members["model_families"] = list(config.model_families) or None
    members |= {key: getattr(config, key) for key in _WHEN_SET if getattr(config, key)}
    if config.draft_json:
        members["draft"] = parse_json_object(config.draft_json, limit_bytes=CONFIG_LIMIT_BYTES, what="The draft")
    members |= {"architecture": config.architecture, "os": config.os}
    if config.extra_json:
        members |= parse_json_object(config.extra_json, limit_bytes=CONFIG_LIMIT_BYTES, what="The config blob")
    return render_go_json(members).encode() + b"\n"


def config_from_gguf(gguf: GGUFFile) -> ConfigBlob:
    """What a GGUF file's header says, in the words of a config blob."""
    file_type = gguf.metadata.get("general.file_type")
    return ConfigBlob(
        model_family=gguf.architecture,
        model_families=(gguf.architecture,),
        model_type=human_number(sum(tensor.n_elements for tensor in gguf.tensors.values())),
        file_type=file_type_name(file_type) if isinstance(file_type, int) else "unknown",
    )


def inherit_config(base: ConfigBlob, *, renderer: str | None, parser: str | None, requires: str | None) -> ConfigBlob:
    """The config of a model made from another: what is None stays as the base has it."""
    return replace(
        base,
        renderer=base.renderer if renderer is None else renderer,
        parser=base.parser if parser is None else parser,
        requires=base.requires if requires is None else requires,
    )


def human_number(count: int) -> str:
    """A number of parameters in Ollama's words: `7.6B`, `494.03M`, `12K`, `999` (format/format.go:15)."""
    for unit, letter, decimals in ((1_000_000_000, "B", 1), (1_000_000, "M", 2)):
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else decimals}f}{letter}"
    return f"{count / 1000:.0f}K" if count >= 1000 else str(count)


def _config_text(value: object, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ManifestError(f"The config blob's {key} is {_shown(value)}, not text", next="Run `ollama-forge verify`.")
    return value


def _config_list(value: object, key: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ManifestError(
            f"The config blob's {key} is {_shown(value)}, not a list of texts", next="Run `ollama-forge verify`."
        )
    return tuple(value)


def _config_number(value: object, key: str) -> int:
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise ManifestError(
            f"The config blob's {key} is {_shown(value)}, not a number", next="Run `ollama-forge verify`."
        )
    return value
