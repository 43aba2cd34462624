"""A model's name: `[scheme://][host/][namespace/]model[:tag]`. Text in, frozen value out; nothing here touches the
disk.

Rules and defaults: types/model/name.go of Ollama v0.33. Only a parsed name ever becomes a path, and no part of one
can be empty, start with a dot, or hold a separator.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from ollama_forge.errors import NameInvalidError

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MANIFEST_DEPTH = 4

_MISSING = "!MISSING!"
_WORD = r"[A-Za-z0-9_]"
_PARTS = {
    "host": (re.compile(_WORD + r"[A-Za-z0-9_.:-]*"), 350, "letters, digits, _ - . :"),
    "namespace": (re.compile(_WORD + r"[A-Za-z0-9_-]*"), 80, "letters, digits, _ -"),
    "model": (re.compile(_WORD + r"[A-Za-z0-9_.-]*"), 80, "letters, digits, _ - ."),
    "tag": (re.compile(_WORD + r"[A-Za-z0-9_.-]*"), 80, "letters, digits, _ - ."),
}
_RESERVED_ON_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class ModelName:
    """A full name, each part valid.

    Raises:
        NameInvalidError: a part breaks Ollama's rules.
    """

    host: str
    namespace: str
    model: str
    tag: str

    def __post_init__(self) -> None:
        for part, value in zip(_PARTS, self.manifest_parts, strict=True):
            pattern, longest, allowed = _PARTS[part]
            if not isinstance(value, str) or not value or value == _MISSING:
                raise _invalid(self._typed(), f"Its {part} is empty.")
            if len(value.encode("utf-8", "surrogatepass")) > longest:
                raise _invalid(self._typed(), f"Its {part} is longer than {longest} bytes.")
            if not pattern.fullmatch(value):
                raise _invalid(
                    self._typed(),
                    f"Its {part} {_shown(value)} must start with a letter, a digit or _, and hold only {allowed}.",
                )

    def __str__(self) -> str:
        return self.display

    @property
    def manifest_parts(self) -> tuple[str, str, str, str]:
        """Folder, folder, folder and file of the manifest below `manifests/`."""
        return (self.host, self.namespace, self.model, self.tag)

    @property
    def display(self) -> str:
        """The shortest spelling, as `ollama list` shows it; the tag is always there."""
        short = f"{self.model}:{self.tag}"
        if self.host.lower() != DEFAULT_HOST:
            return f"{self.host}/{self.namespace}/{short}"
        if self.namespace.lower() != DEFAULT_NAMESPACE:
            return f"{self.namespace}/{short}"
        return short

    @property
    def folded(self) -> tuple[str, str, str, str]:
        """What two names share when Ollama takes them for the same."""
        return (self.host.lower(), self.namespace.lower(), self.model.lower(), self.tag.lower())

    def _typed(self) -> str:
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"


def parse_name(text: str) -> ModelName:
    """Read a name as Ollama does, with its defaults filled in.

    Raises:
        NameInvalidError: Ollama would refuse it.
    """
    if not isinstance(text, str):
        raise _invalid(str(text), "A name is text.")
    rest, tag = text, ""
    if rest.rfind(":") > rest.rfind("/"):
        rest, tag = _cut_promised(rest, ":")
    host = namespace = ""
    if "/" in rest:
        rest, model = _cut_promised(rest, "/")
        if "/" in rest:
            rest, namespace = _cut_promised(rest, "/")
            scheme, separator, after = rest.partition("://")
            host = after if separator else scheme
        else:
            namespace = rest
    else:
        model = rest
    try:
        return ModelName(host or DEFAULT_HOST, namespace or DEFAULT_NAMESPACE, model, tag or DEFAULT_TAG)
    except NameInvalidError as exc:
        raise _invalid(text, exc.why) from None


def name_from_parts(parts: tuple[str, ...]) -> ModelName:
    """The name of a manifest from where it lies below `manifests/`.

    Raises:
        NameInvalidError: the path has another depth, or a part that no name can have.
    """
    if len(parts) != MANIFEST_DEPTH:
        raise _invalid("/".join(parts), "A manifest lies at host/namespace/model/tag.")
    return ModelName(*parts)


def validate_writable(name: ModelName) -> None:
    """Refuse names that Ollama would store and then never find again, or that some disk cannot hold.

    Ollama strips the tags `cloud`, `local` and `*-cloud` when it looks a model up (internal/modelref/modelref.go:99).
    Windows cannot hold `con`, `nul` and their like, nor a name that ends in a dot.

    Raises:
        NameInvalidError: with a name that would do.
    """
    tag = name.tag.lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        raise NameInvalidError(
            f"{name.display!r} cannot be used for a model of your own",
            why="Ollama takes the tags cloud, local and *-cloud for the place where a model runs.",
            next=f"Choose another tag, for example {name.model}:{DEFAULT_TAG}",
        )
    for part, value in zip(_PARTS, name.manifest_parts, strict=True):
        if _RESERVED_ON_WINDOWS.fullmatch(value) or value.endswith("."):
            raise NameInvalidError(
                f"The {part} {value!r} in {name.display!r} cannot be used",
                why="Windows cannot hold a file of that name, and a store may be moved there.",
                next=f"Choose another {part}, for example my-{value.rstrip('.')}",
            )
    if sys.platform == "win32" and ":" in name.host:
        raise NameInvalidError(
            f"The host {name.host!r} cannot be used on Windows",
            why="Its port would need a colon in a folder's name.",
            next="Use a host without a port.",
        )


def _cut_promised(text: str, separator: str) -> tuple[str, str]:
    before, _, after = text.rpartition(separator)
    return before or _MISSING, after or _MISSING


def _invalid(text: str, why: str) -> NameInvalidError:
    return NameInvalidError(
        f"{_shown(text)} is not a model name",
        why=why,
        next="A name looks like my-model, my-model:q4 or user/my-model:q4.",
    )


def _shown(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 120 else shown[:117] + "..."
