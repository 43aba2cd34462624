"""Where a model's file says that it came from, once the model was changed.

The standard keys, as gguf-py's constants.py has them: `general.source.*` is the place of this very model,
`general.base_model.N.*` what it was made from. An edited model is no longer the one at its source: that is its base.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence

from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.writer import Field, from_reader, string, uint32

HUB = "https://huggingface.co"
_SOURCE = "general.source."
_BASE_MODEL = "general.base_model."
_REPO_KEYS = ("general.source.huggingface.repository", "general.source.repo_url", "general.source.url")
_REPO = re.compile(r"(?:https?://huggingface\.co/)?(?P<name>[^/\s]+/[^/\s]+)(?:/tree/\S+)?")


def fields_of(source: GGUFFile) -> list[Field]:
    """All fields of an open file, verbatim."""
    return [from_reader(entry) for entry in source.fields.values()]


def edited_fields(source: Sequence[Field], without: Container[str] = ()) -> list[Field]:
    """The fields of a file that is made by changing weights of one that has `source`; all but the origin's stay."""
    name = source_repo({entry.key: entry.value for entry in source})
    kept = [entry for entry in source if entry.key not in without]
    if not name:
        return kept
    kept = [field for field in kept if not field.key.startswith((_SOURCE, _BASE_MODEL))]
    return [*kept, *base_model_fields([name])]


def source_repo(metadata: Mapping[str, object]) -> str:
    """`organization/repository` on the Hub of this very model, or empty."""
    for key in _REPO_KEYS:
        value = metadata.get(key)
        match = _REPO.fullmatch(value) if isinstance(value, str) else None
        if match:
            return match["name"]
    return ""


def hub_names(names: Sequence[str]) -> tuple[str, ...]:
    """Those that are names on the Hub; a path on somebody's disk says nothing to anybody else."""
    return tuple(name for name in names if name.count("/") == 1 and not name.startswith((".", "/", "~")))


def base_model_fields(names: Sequence[str]) -> list[Field]:
    """`general.base_model.*` for names on the Hub."""
    if not names:
        return []
    fields = [uint32(f"{_BASE_MODEL}count", len(names))]
    for number, name in enumerate(names):
        organization, _, own = name.partition("/")
        words = {"name": own, "organization": organization, "repo_url": f"{HUB}/{name}"}
        fields += [string(f"{_BASE_MODEL}{number}.{key}", value) for key, value in words.items()]
    return fields
