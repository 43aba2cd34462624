"""A digest: the SHA-256 that is a blob's name. Text in, frozen value out; nothing here touches the disk.

Ollama reads `sha256:` and `sha256-`, and hexadecimal digits of either case, but its garbage collection compares
strings: a spelling other than `sha256:` and lower case makes a blob look unused (manifest/paths.go:42 and
server/images.go:874 of v0.33). So every spelling is read, and only one is ever written.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from ollama_forge.errors import DigestError

_SPELLING = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_HEX = re.compile(r"[0-9a-f]{64}")
_MENTION = re.compile(rb"sha256[:-]([0-9a-fA-F]{64})(?![0-9a-fA-F])")


@dataclass(frozen=True, order=True)
class Digest:
    """The SHA-256 of some bytes.

    Attributes:
        hex: 64 lowercase hexadecimal digits.

    Raises:
        DigestError: `hex` is anything else.
    """

    hex: str

    def __post_init__(self) -> None:
        if not isinstance(self.hex, str) or not _HEX.fullmatch(self.hex):
            raise DigestError(
                f"{_shown(self.hex)} is not a SHA-256",
                why="It must be 64 lowercase hexadecimal digits.",
                next="Copy the digest again, whole.",
            )

    def __str__(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def blob_filename(self) -> str:
        """The name of the blob inside `blobs/`."""
        return f"sha256-{self.hex}"

    @property
    def short(self) -> str:
        """The 12 digits that `ollama list` shows."""
        return self.hex[:12]


def parse_digest(text: str) -> Digest:
    """Read a digest in any spelling that Ollama reads.

    Raises:
        DigestError: it is not `sha256:` or `sha256-` and 64 hexadecimal digits, and nothing else.
    """
    match = _SPELLING.fullmatch(text) if isinstance(text, str) else None
    if not match:
        raise DigestError(
            f"{_shown(text)} is not a digest",
            why="A digest is sha256: and 64 hexadecimal digits.",
            next="Copy the digest again, whole.",
        )
    return Digest(match[1].lower())


def digest_of(content: bytes) -> Digest:
    """The digest of bytes in memory."""
    return Digest(hashlib.sha256(content).hexdigest())


def find_mentions(raw: bytes) -> frozenset[Digest]:
    """Every digest that is spelled anywhere in `raw`, parsable or not.

    Whoever deletes blobs asks this rather than the parsed manifest, so that a damaged manifest, or one of a newer kind,
    still protects what it names.
    """
    return frozenset(Digest(match[1].decode().lower()) for match in _MENTION.finditer(raw))


def _shown(text: object) -> str:
    shown = repr(text)
    return shown if len(shown) <= 100 else shown[:97] + "..."
