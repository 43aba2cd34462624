"""The `general.*` fields: what the model card, the folder's name and generation_config.json say about a model.

In: a model folder. Out: GGUF fields with the keys, types and values of llama.cpp's converter
(gguf-py/gguf/metadata.py), except for a model in a Hugging Face cache: it has its repository's name, and says where it
is from (`general.source.*`), so that its origin survives outside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field, array, float32, int32, string, uint32
from ollama_forge.weights.safetensors import resolve_member

_MAX_CARD_BYTES = 1 << 20

# GGUF key (after `general.`) and the keys of a model card that fill it; the first that is there counts.
CARD_KEYS = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename", "model_type"),
    "description": ("description", "model_description"),
    "quantized_by": (),
    "size_label": ("size_label", "model_size_label"),
    "license": ("license",),
    "license.name": ("license_name",),
    "license.link": ("license_link",),
    "source.url": ("url", "model_url"),
    "source.doi": ("doi", "model_doi"),
    "source.uuid": ("uuid", "model_uuid"),
    "source.repo_url": ("repo_url", "model_repo_url"),
}

LISTS = {"tags": ("tags", "pipeline_tag"), "languages": ("languages", "language")}
LINEAGE = {
    "base_model": ("base_model", "base_models", "base_model_sources"),
    "dataset": ("datasets", "dataset", "dataset_sources"),
}
LINEAGE_KEYS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")

SAMPLING: dict[str, tuple[str, ValueType]] = {
    "sequence": ("sequence", ValueType.STRING),
    "top_k": ("top_k", ValueType.INT32),
    "top_p": ("top_p", ValueType.FLOAT32),
    "min_p": ("min_p", ValueType.FLOAT32),
    "xtc_probability": ("xtc_probability", ValueType.FLOAT32),
    "xtc_threshold": ("xtc_threshold", ValueType.FLOAT32),
    "temp": ("temperature", ValueType.FLOAT32),
    "penalty_last_n": ("penalty_last_n", ValueType.INT32),
    "penalty_repeat": ("penalty_repeat", ValueType.FLOAT32),
    "mirostat": ("mirostat", ValueType.INT32),
    "mirostat_tau": ("mirostat_tau", ValueType.FLOAT32),
    "mirostat_eta": ("mirostat_eta", ValueType.FLOAT32),
}

_VERSION = re.compile(r"(v|iter)?\d+([.]\d+)*", re.IGNORECASE)
_QUANTIZATION = re.compile(r"i?q\d(_\w)*|b?fp?(16|32)", re.IGNORECASE)
_SIZE = re.compile(r"(([A]|\d+[x])?\d+([._]\d+)?[KMBT][\d]?|small|mini|medium|large|x?xl)", re.IGNORECASE)
_TUNING = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_KEPT_WORD = re.compile(r"(v\d+(?:\.\d+)*|\d.*)")
HUB = "https://huggingface.co"
HUB_URL = re.compile(r"https?://huggingface.co/([^/]+/[^/]+)")


@dataclass(frozen=True)
class NameParts:
    """What the parts of a repository's name say: `<organization>/<basename>-<size>-<finetune>-<version>`."""

    full_name: str | None = None
    organization: str | None = None
    basename: str | None = None
    finetune: str | None = None
    version: str | None = None
    size_label: str | None = None


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters: all, those that every token uses, those of one expert of each layer, and the experts."""

    total: int
    shared: int
    per_expert: int
    n_experts: int


@dataclass
class _Card:
    """The fields so far; a value that is there is never replaced."""

    values: dict[str, Any] = field(default_factory=dict)

    def offer(self, key: str, value: Any) -> None:
        if value is not None and self.values.get(key) is None:
            self.values[key] = value


def general_fields(
    folder: Path, config: Mapping[str, Any], parameters: ParameterCount, name: str | None = None
) -> tuple[list[Field], tuple[str, ...]]:
    """The fields that describe a model, and warnings about what could not be read.

    Args:
        folder: of the model; its name is the last resort for the model's name.
        config: config.json as it is.
        parameters: of the GGUF tensors.
        name: takes the place of `general.name`.
    """
    front, warnings = read_front_matter(folder)
    card = _Card()
    for key, sources in CARD_KEYS.items():
        for source in sources:
            card.offer(key, front.get(source))
    own_name = config.get("_name_or_path")
    if isinstance(own_name, str) and own_name.count("/") <= 1:
        _offer_parts(card, parse_model_name(own_name, parameters.total))
    _offer_parts(card, parse_model_name(model_id_of(folder), parameters.total))
    card.offer("name", folder.resolve().name)
    repo, commit = snapshot_of(folder)
    if repo:
        card.offer("source.url", f"{HUB}/{repo}/tree/{commit}")
        card.offer("source.repo_url", f"{HUB}/{repo}")
    if name is not None:
        card.values["name"] = name
    if parameters.total > 0:
        card.offer("size_label", size_label(parameters))
    fields = [string("general.type", "model"), *_sampling_fields(folder)]
    fields += [
        string(f"general.{key}", _text(card.values[key])) for key in CARD_KEYS if card.values.get(key) is not None
    ]
    for kind, sources in LINEAGE.items():
        fields += _lineage_fields(kind, sources, front, parameters.total)
    for key, sources in LISTS.items():
        words = [word for source in sources for word in _words(front.get(source))]
        if words:
            fields.append(array(f"general.{key}", ValueType.STRING, words))
    return fields, warnings


def model_id_of(folder: Path) -> str:
    """What a folder is called: its name, or `organization/repository` for a snapshot in a Hugging Face cache.

    llama.cpp's converter names such a model by the snapshot's revision, 40 hexadecimal digits that say nothing.
    """
    return snapshot_of(folder)[0] or folder.resolve().name


def snapshot_of(folder: Path) -> tuple[str, str]:
    """(`organization/repository`, commit) of a snapshot in a Hugging Face cache; two empty texts for other folders."""
    folder = folder.resolve()
    parts = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and parts[0] == "models" and len(parts) > 1:
        return "/".join(parts[1:]), folder.name
    return "", ""


def read_front_matter(folder: Path) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The YAML at the top of README.md, and a warning where it cannot be read."""
    if not (folder / "README.md").is_file():
        return {}, ()
    with resolve_member(folder, "README.md").open("rb") as stream:
        lines = stream.read(_MAX_CARD_BYTES).decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "---":
        return {}, ()
    end = next((number for number, line in enumerate(lines[1:], 1) if line == "---"), len(lines))
    text = "\n".join(lines[1:end]) + "\n"
    # Norwegian is not a refusal, and YAML has no tabs (both as the reference reads cards).
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")
    import yaml  # only folders have cards

    try:
        parsed = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        return {}, (f"The model card README.md was left out, because its YAML cannot be read: {str(exc)[:120]}",)
    return (parsed, ()) if isinstance(parsed, dict) else ({}, ())


def parse_model_name(model_id: str, n_parameters: int) -> NameParts:
    """Take a repository's or folder's name apart, as far as it can be told.

    Args:
        model_id: `organization/name` or `name`.
        n_parameters: a number in the name that is far from it is not taken for the model's size.
    """
    if " " in model_id:
        return NameParts(full_name=model_id)
    organization, slash, full_name = model_id.partition("/")
    if not slash:
        organization, full_name = "", model_id
    parts = [part for part in full_name.split("-") if part]
    kinds = [_classify(parts, number, n_parameters) for number in range(len(parts))]
    if any(
        character.isdecimal() for part, kind in zip(parts, kinds, strict=True) if "size" in kind for character in part
    ):
        for part, kind in zip(parts, kinds, strict=True):
            if part.isalpha():
                kind.discard("size")
    _mark_basename(parts, kinds)

    def joined(wanted: str, *, unless: str = "") -> str | None:
        chosen = [part for part, kind in zip(parts, kinds, strict=True) if wanted in kind and unless not in kind]
        return "-".join(dict.fromkeys(chosen) if wanted == "size" else chosen) or None

    size, finetune = joined("size"), joined("finetune")
    version = joined("version", unless="basename")
    basename = joined("basename") if size or finetune or version else None
    owner = organization if organization and not organization.startswith(".") else None
    if organization == "" and slash:
        owner = ""
    return NameParts(full_name, owner, basename, finetune, version, size)


def title(name: str) -> str:
    """`my-model-v2-7b` -> `My Model v2 7b`: words get capitals, versions and numbers stay."""
    words = name.strip().replace("-", " ").split()
    return " ".join(word.title() if word.islower() and not _KEPT_WORD.fullmatch(word) else word for word in words)


def size_label(parameters: ParameterCount) -> str:
    """`1.1B`, or `8x7B` for a model with experts."""
    if parameters.n_experts > 0:
        return f"{parameters.n_experts}x{_rounded(parameters.shared + parameters.per_expert)}"
    return _rounded(parameters.total)


def _rounded(count: int) -> str:
    for limit, scale, suffix in ((1e12, 1e-12, "T"), (1e9, 1e-9, "B"), (1e6, 1e-6, "M"), (0, 1e-3, "K")):
        if count > limit or suffix == "K":
            scaled = count * scale
            break
    digits = max(2 - len(str(round(scaled)).lstrip("0")), 0)
    return f"{scaled:.{digits}f}{suffix}"


def _classify(parts: list[str], number: int, n_parameters: int) -> set[str]:
    """What a part of a name is; the part is rewritten in its usual spelling."""
    part = parts[number]
    if _VERSION.fullmatch(part):
        return {"version"}
    if _QUANTIZATION.fullmatch(part):
        parts[number] = part.upper()
        return {"type"}
    if number == 0:
        return set()
    if _SIZE.fullmatch(part):
        return _classify_size(parts, number, n_parameters)
    return {"finetune"} if _TUNING.fullmatch(part) else set()


def _classify_size(parts: list[str], number: int, n_parameters: int) -> set[str]:
    part = parts[number].replace("_", ".")
    if part[-1].isdecimal():  # bloom-7b1
        part = part[:-2] + "." + part[-1] + part[-2]
    if len(part) > 1 and part[-2].isdecimal() and part[-1] in "kmbt":
        part = part[:-1] + part[-1].upper()
    kind = "size"
    try:
        announced = float(part[:-1]) * pow(1000, " KMBT".find(part[-1]))
    except ValueError:  # `small`, `8x7B`
        pass
    else:
        if n_parameters > 0 and abs(announced - n_parameters) > 7 * n_parameters // 8:
            kind = "finetune"  # more likely the length of the context
            part = part[:-1] + part[-1].lower()
    parts[number] = part
    return {kind}


def _mark_basename(parts: list[str], kinds: list[set[str]]) -> None:
    """The words at the start are the name itself; a version at its end is a version only."""
    at_start = True
    for part, kind in zip(parts, kinds, strict=True):
        if at_start and ((not kind and part[0].isalpha()) or "version" in kind):
            kind.add("basename")
            continue
        at_start = False
        if not kind:
            kind.add("finetune")
    for kind in reversed(kinds):
        if "basename" not in kind or len(kind) == 1:
            break
        kind.discard("basename")


def _offer_parts(card: _Card, parts: NameParts) -> None:
    card.offer("name", None if parts.full_name is None else title(parts.full_name))
    card.offer("organization", None if parts.organization is None else title(parts.organization))
    card.offer("basename", parts.basename)
    card.offer("finetune", parts.finetune)
    card.offer("version", parts.version)
    card.offer("size_label", parts.size_label)


def _sampling_fields(folder: Path) -> Iterable[Field]:
    if not (folder / "generation_config.json").is_file():
        return
    try:
        raw = resolve_member(folder, "generation_config.json").read_bytes()[:_MAX_CARD_BYTES]
        values = json.loads(raw)
    except ValueError:
        return
    for key, (source, value_type) in SAMPLING.items():
        value = values.get(source) if isinstance(values, dict) else None
        if value is None or isinstance(value, bool):
            continue
        if value_type is ValueType.STRING and isinstance(value, str):
            yield string(f"general.sampling.{key}", value)
        elif value_type is ValueType.INT32 and isinstance(value, (int, float)) and abs(value) < 1 << 31:
            yield int32(f"general.sampling.{key}", int(value))
        elif value_type is ValueType.FLOAT32 and isinstance(value, (int, float)) and abs(value) < 3.4e38:
            yield float32(f"general.sampling.{key}", value)


def _lineage_fields(kind: str, sources: Sequence[str], front: Mapping[str, Any], n_parameters: int) -> Iterable[Field]:
    """Base models or data sets; an empty list is still counted, as the reference does."""
    source = next((source for source in sources if source in front), None)
    if source is None:
        return
    value = front[source]
    entries = [parse_lineage(item, n_parameters) for item in ([value] if isinstance(value, str) else value or [])]
    yield uint32(f"general.{kind}.count", len(entries))
    for number, entry in enumerate(entries):
        for key in LINEAGE_KEYS:
            if entry.get(key) is not None:
                yield string(f"general.{kind}.{number}.{key}", _text(entry[key]))


def parse_lineage(item: Any, n_parameters: int) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if not isinstance(item, str):
        return {}
    entry: dict[str, Any] = {}
    is_url = item.startswith(("http://", "https://", "ssh://"))
    if is_url:
        entry["repo_url"] = item
        found = HUB_URL.fullmatch(item)
        if not found:
            return entry
        item = found[1]
    parts = parse_model_name(item, n_parameters)
    if parts.full_name is not None:
        entry["name"] = title(parts.full_name)
    if parts.organization is not None:
        entry["organization"] = title(parts.organization)
        if not is_url:
            entry["repo_url"] = f"https://huggingface.co/{parts.organization}/{parts.full_name}"
    if parts.version is not None:
        entry["version"] = parts.version
    return entry


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return str(value)


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, list) else []
