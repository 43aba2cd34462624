"""What a person may type for a model, as a value. Pure: text in, `ModelRef` out; the disk is not asked.

llama3.2, user/model:tag, hf.co/org/repo:Q4_K_M   an Ollama name
./model.gguf, model.gguf, /models/folder          a path
hf:org/repo[@revision][:file.gguf]                a Hugging Face repo
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ollama_forge.errors import UsageError

_PATH_STARTS = ("./", "../", "/", "~/", ".\\", "..\\", "\\\\")
_PATH_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_WINDOWS_DRIVE = re.compile(r"^[A-Za-z]:[\\/]")
_HUB = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?(?::(?P<file>[^:\0]{1,500}))?"
)


class RefKind(Enum):
    """Where a model lies."""

    OLLAMA = "ollama"
    PATH = "path"
    HUB = "hub"


@dataclass(frozen=True)
class ModelRef:
    """A model argument, understood.

    Attributes:
        kind: where to look.
        text: as typed.
        path: for `PATH`, with `~` expanded.
        repo, revision, file: for `HUB`.
    """

    kind: RefKind
    text: str
    path: Path | None = None
    repo: str = ""
    revision: str = ""
    file: str = ""


def parse_ref(text: str) -> ModelRef:
    """Understand a model argument.

    Raises:
        UsageError: empty, or an `hf:` reference that is not `hf:org/repo[@revision][:file]`.
    """
    stripped = text.strip()
    if not stripped or "\0" in stripped:
        raise UsageError(
            f"{text!r} is not a model", next="Name an Ollama model, a .gguf file, a folder, or hf:org/repo."
        )
    if stripped.startswith("hf:"):
        match = _HUB.fullmatch(stripped)
        if not match or ".." in (match["file"] or "").split("/") or ".." in (match["revision"] or "").split("/"):
            raise UsageError(
                f"{text!r} is not a Hugging Face reference",
                why="The form is hf:org/repo, hf:org/repo@revision or hf:org/repo:file.gguf.",
                next="Example: hf:Qwen/Qwen3-0.6B",
            )
        return ModelRef(
            RefKind.HUB, stripped, repo=match["repo"], revision=match["revision"] or "", file=match["file"] or ""
        )
    if looks_like_path(stripped):
        return ModelRef(RefKind.PATH, stripped, path=Path(stripped).expanduser())
    return ModelRef(RefKind.OLLAMA, stripped)


def looks_like_path(text: str) -> bool:
    """Whether `text` can only mean a file or a folder, not an Ollama name."""
    return (
        text in (".", "..", "~")
        or text.startswith(_PATH_STARTS)
        or text.lower().endswith(_PATH_ENDINGS)
        or text.endswith(("/", "\\"))
        or bool(_WINDOWS_DRIVE.match(text))
    )
