"""Token ids back to text, from a GGUF's own spelling of its tokens.

In: a `GGUFTokenizer` and ids. Out: text; bytes that are no UTF-8 (a character cut in two) become U+FFFD. Control tokens
show as they are spelled, so that a person sees them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

from ollama_forge.tokenizer.byte_level import byte_characters
from ollama_forge.tokenizer.encode import GGUFTokenizer
from ollama_forge.tokenizer.score_merge import SPACE

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def decode_tokens(tokenizer: GGUFTokenizer, ids: Iterable[int]) -> str:
    """The text that some tokens spell; ids that the vocabulary does not have are left out."""
    return b"".join(token_bytes(tokenizer, token_id) for token_id in ids).decode("utf-8", "replace")


def token_bytes(tokenizer: GGUFTokenizer, token_id: int) -> bytes:
    """The bytes that one token spells, perhaps a part of a character; none for an id that the vocabulary lacks."""
    if not 0 <= token_id < tokenizer.n_tokens:
        return b""
    spell = _spell_byte_level if tokenizer.kind == "gpt2" else _spell_piece
    return spell(tokenizer.tokens[token_id])


@functools.cache
def _bytes_by_character() -> Mapping[str, int]:
    return {character: byte for byte, character in byte_characters().items()}


def _spell_byte_level(token: str) -> bytes:
    table = _bytes_by_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8", "replace")


def _spell_piece(token: str) -> bytes:
    match = _BYTE.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(SPACE, " ").encode("utf-8", "replace")
