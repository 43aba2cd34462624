"""Names of entries, after Strategy A: what an Ollama name says about family and quantization, and nothing more.

Given `base[:tag]`: a tag that is a quantization makes `family = base`, any other `family = base-tag`; the entry is
called `<family>-ollama-gguf[-<quantization>]`. Today's names are a superset of the strategy's own: more quantizations,
and tags that end in one (`8b-instruct-q4_K_M`). The one list of quantization names of the package is here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass

STRATEGY_A_QUANTIZATION = re.compile(r"^(q\d(?:_k(?:_m)?)?|int4|int8|fp16|f16)$", re.IGNORECASE)
"""The strategy's own expression; `parse_quantization` knows all of these and more."""

_QUANTIZATION = re.compile(
    r"q\d(?:_k(?:_(?:xxs|xs|s|m|l|xl))?|_[01](?:_[48]_[48])?)?"
    r"|iq\d_(?:xxs|xs|s|m|nl|xl)"
    r"|tq[12]_0"
    r"|(?:mx|nv)fp[468](?:_moe)?"
    r"|int[48]|fp8|fp16|f16|bf16|fp32|f32",
    re.IGNORECASE,
)
_NOT_A_SLUG = re.compile(r"[^a-z0-9._-]+")
_ENGINE = "-ollama-gguf"
_SUFFIX_DIGITS = 6


@dataclass(frozen=True)
class Variant:
    """What a name says.

    Attributes:
        family: lower case; what separates host, namespace and model is a dash.
        quantization: lower case (`q4_k_m`), or None when the tag is none and ends in none.
    """

    family: str
    quantization: str | None

    @property
    def name(self) -> str:
        """`<family>-ollama-gguf[-<quantization>]`."""
        return self.family + _ENGINE + (f"-{self.quantization}" if self.quantization else "")


def parse_quantization(token: str) -> str | None:
    """A quantization's name in lower case, or None when the whole token is not one."""
    return token.lower() if _QUANTIZATION.fullmatch(token) else None


def derive_variant(identifier: str) -> Variant:
    """Family and quantization of an Ollama name, as it is written: `base[:tag]`, with host and namespace or without."""
    base, tag = split_tag(identifier)
    if not tag:
        return Variant(_slug(base), None)
    if whole := parse_quantization(tag):
        return Variant(_slug(base), whole)
    kept, dash, last = tag.rpartition("-")
    if dash and kept and (ending := parse_quantization(last)):
        return Variant(_slug(f"{base}-{kept}"), ending)
    return Variant(_slug(f"{base}-{tag}"), None)


def split_tag(identifier: str) -> tuple[str, str]:
    """`host:5000/user/model:tag` -> (`host:5000/user/model`, `tag`); the tag is empty when there is none."""
    if identifier.rfind(":") > identifier.rfind("/"):
        base, _, tag = identifier.rpartition(":")
        return base, tag
    return identifier, ""


def free_name(wanted: str, key: str, taken: Collection[str]) -> str:
    """`wanted`, or with the first digits of the hash of `key` behind it when another entry has that name.

    Args:
        key: what tells this model from the one that has the name; the same key gives the same suffix.
    """
    if wanted not in taken:
        return wanted
    digits = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
    for length in range(_SUFFIX_DIGITS, len(digits) + 1):
        name = f"{wanted}-{digits[:length]}"
        if name not in taken:
            return name
    raise ValueError(f"{wanted!r} is taken under every suffix")


def agrees(said: str, found: str) -> bool:
    """Whether a name's quantization and a header's can mean the same file: `q4` and `q4_k_m` can, `q4_0` cannot."""
    said, found = (_ALIASES.get(word.lower(), word.lower()) for word in (said, found))
    if said == found:
        return True
    if said in ("int4", "int8"):
        return re.match(rf"i?q{said[-1]}(_|$)|(mx|nv)fp{said[-1]}", found) is not None
    if re.fullmatch(r"q\d|q\d_k", said):
        return found.startswith(f"{said}_")
    # Mixes that Hugging Face publishers name themselves; llama.cpp has no number for them.
    mix = re.fullmatch(r"(q\d_k)_(xl|l|xs|xxs)|(iq\d)_xl", said)
    return mix is not None and found.startswith(f"{mix[1] or mix[3]}_")


_ALIASES = {"fp16": "f16", "fp32": "f32", "mxfp4_moe": "mxfp4", "q6_k_m": "q6_k"}


def _slug(text: str) -> str:
    return _NOT_A_SLUG.sub("-", text.lower())
