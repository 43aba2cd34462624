"""What a model's own files say of it: architecture, quantization, a hash of the header, what it can do.

In: paths of blobs and texts of templates. Out: frozen values. The name of a model is not asked. Which key means which
capability: server/images.go:125 of Ollama v0.33.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import file_type_name
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.peek import peek_metadata

_GO_TOOLS = re.compile(r"\.Tools\b|\.ToolCalls\b")
_GO_INSERT = re.compile(r"\.Suffix\b")
_GO_THINKING = re.compile(r"\.Think(ing)?\b|\.IsThinkSet\b")
_JINJA_TOOLS = re.compile(r"\btools\b")
_JINJA_THINKING = re.compile(r"\benable_thinking\b|\breasoning_content\b|<think>")


@dataclass(frozen=True)
class WeightFacts:
    """What the header of one GGUF file says; empty where the file is missing or is none.

    Attributes:
        quantization: lower case, from `general.file_type`; None where the header has none.
        metadata_hash: SHA-256 over the plain values up to the vocabulary, as sorted JSON.
        chat_template: the Jinja template.
    """

    architecture: str = ""
    quantization: str | None = None
    metadata_hash: str = ""
    chat_template: str = ""
    is_embedding: bool = False
    has_vision: bool = False
    has_audio: bool = False


def read_weight_facts(path: Path) -> WeightFacts:
    """The facts of a GGUF file, from its header alone; never raises, because a missing file is a fact too."""
    head = peek_metadata(path)
    if not head:
        return WeightFacts()
    architecture = str(head.get("general.architecture", ""))
    template, file_type = "", head.get("general.file_type")
    try:
        with open_gguf(path) as gguf:
            found = gguf.metadata.get("tokenizer.chat_template")
            template = found if isinstance(found, str) else ""
            file_type = gguf.metadata.get("general.file_type", file_type)
    except ForgeError:
        pass  # `verify` says what is wrong with it; what its start says still holds
    name = file_type_name(file_type) if isinstance(file_type, int) else "unknown"
    return WeightFacts(
        architecture=architecture,
        quantization=None if name == "unknown" else name.lower(),
        metadata_hash=_hash(head),
        chat_template=template,
        is_embedding=f"{architecture}.pooling_type" in head,
        has_vision=f"{architecture}.vision.block_count" in head or head.get("clip.has_vision_encoder") is True,
        has_audio=f"{architecture}.audio.block_count" in head or head.get("clip.has_audio_encoder") is True,
    )


def find_capabilities(model: InstalledModel, weights: WeightFacts, projector: WeightFacts | None) -> tuple[str, ...]:
    """What a model can do, in Ollama's words, sorted."""
    words = set(model.config.capabilities)
    words.add("embedding" if weights.is_embedding else "completion")
    if weights.has_vision or (projector is not None and (projector.has_vision or not projector.has_audio)):
        words.add("vision")
    if weights.has_audio or (projector is not None and projector.has_audio):
        words.add("audio")
    go = _text(model)
    if _GO_TOOLS.search(go) or (not go and _JINJA_TOOLS.search(weights.chat_template)):
        words.add("tools")
    if _GO_THINKING.search(go) or (not go and _JINJA_THINKING.search(weights.chat_template)):
        words.add("thinking")
    if _GO_INSERT.search(go):
        words.add("insert")
    return tuple(sorted(words))


def _text(model: InstalledModel) -> str:
    try:
        return model.template or ""
    except ForgeError:
        return ""


def _hash(head: Mapping[str, object]) -> str:
    plain = json.dumps({key: head[key] for key in sorted(head)}, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()
