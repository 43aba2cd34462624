"""Whether two models read text as the same tokens, so that their predictions can be compared word by word.

In: the GGUF metadata of both. Out: how many words they share from the first on, or why they cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

_UNUSED = 5  # llama.h, LLAMA_TOKEN_TYPE_UNUSED: what fills a vocabulary up
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True)
class VocabularyMatch:
    """The outcome. `n_words` is 0 where the two differ, and `difference` says how in a few words."""

    n_words: int
    difference: str = ""

    @property
    def is_same(self) -> bool:
        return self.n_words > 0


def match_vocabularies(one: Mapping[str, Any], other: Mapping[str, Any]) -> VocabularyMatch:
    """Compare kind, words, their order and what decides how text is split; unused words at the end do not count."""
    for key in ("model", "pre"):
        kinds = [str(metadata.get(_PREFIX + key, "default")) for metadata in (one, other)]
        if kinds[0] != kinds[1]:
            return VocabularyMatch(0, f"their tokenizers are {kinds[0]!r} and {kinds[1]!r}")
    tokens, others = (list(metadata.get(_PREFIX + "tokens") or ()) for metadata in (one, other))
    n_shared = min(len(tokens), len(others))
    for place, (token, wanted) in enumerate(zip(tokens, others, strict=False)):
        if token != wanted:
            return VocabularyMatch(0, f"word {place} is {token!r} in one and {wanted!r} in the other")
    longer = one if len(tokens) > len(others) else other
    types = list(longer.get(_PREFIX + "token_type") or ())[n_shared:]
    if len(tokens) != len(others) and (not types or any(kind != _UNUSED for kind in types)):
        return VocabularyMatch(0, f"they have {len(tokens):,} and {len(others):,} words")
    merges = [metadata.get(_PREFIX + "merges") or () for metadata in (one, other)]
    if any(a != b for a, b in zip_longest(*merges)):
        return VocabularyMatch(0, "they join letters to words in another order")
    return VocabularyMatch(n_shared) if n_shared else VocabularyMatch(0, "one of them has no words")
