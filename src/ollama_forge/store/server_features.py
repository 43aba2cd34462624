"""What a running Ollama can do, by its version. Text in, frozen value out.

Each row of the table says from which version on, and before which, `/api/create` and `/api/show` do something; found by
comparing Ollama's stable tags, and for 0.34.1 in ollama#14969.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, int, int]

_ALWAYS: Version = (0, 0, 0)
_NOT_YET: Version = (1 << 30, 0, 0)
_VERSION = re.compile(r"v?([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})(?:[-+].*)?")

_TABLE: dict[str, tuple[Version, Version]] = {
    "creates_from_blobs": ((0, 5, 5), _NOT_YET),
    "creates_adapters": ((0, 5, 5), (0, 34, 1)),
    "quantizes": ((0, 5, 5), (0, 34, 1)),
    "converts": ((0, 5, 5), (0, 34, 1)),
    "reports_capabilities": ((0, 6, 4), _NOT_YET),
    "takes_renderer": ((0, 12, 0), _NOT_YET),
    "takes_requires": ((0, 14, 0), _NOT_YET),
    "uses_native_templates": ((0, 30, 0), _NOT_YET),
    "takes_split_gguf": ((0, 30, 0), _NOT_YET),
}


@dataclass(frozen=True)
class ServerFeatures:
    """What a version of Ollama does.

    Attributes:
        version: as the server says it.
        is_known: False for a build that does not know its version (`0.0.0`): it is taken for the newest.
        creates_from_blobs: `/api/create` takes `files` and `adapters` by digest.
        creates_adapters: it takes a LoRA adapter.
        quantizes: it quantizes while creating.
        converts: it makes GGUF of safetensors.
        reports_capabilities: `/api/show` says whether a model completes, embeds, sees, calls tools.
        takes_renderer: RENDERER and PARSER.
        takes_requires: REQUIRES.
        uses_native_templates: the GGUF's own Jinja template writes the prompt.
        takes_split_gguf: a model in several files is merged.
    """

    version: str
    is_known: bool
    creates_from_blobs: bool
    creates_adapters: bool
    quantizes: bool
    converts: bool
    reports_capabilities: bool
    takes_renderer: bool
    takes_requires: bool
    uses_native_templates: bool
    takes_split_gguf: bool


def features_of(version: str) -> ServerFeatures:
    """What a server of that version does. Of a pre-release the release's features are expected."""
    match = _VERSION.fullmatch(version.strip())
    number = (int(match[1]), int(match[2]), int(match[3])) if match else _ALWAYS
    is_known = number != _ALWAYS
    if not is_known:
        number = (_NOT_YET[0] - 1, 0, 0)
    return ServerFeatures(
        version=version, is_known=is_known, **{name: start <= number < end for name, (start, end) in _TABLE.items()}
    )
