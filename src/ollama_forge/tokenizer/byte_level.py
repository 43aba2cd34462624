"""The printable alphabet in which byte-level BPE spells bytes (GPT-2's).

In: text. Out: text. Every byte has one character; bytes that print as themselves keep theirs, the others take
U+0100 and on, in order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@functools.cache
def byte_characters() -> Mapping[int, str]:
    """The character of each of the 256 bytes."""
    others = [byte for byte in range(256) if byte not in _PRINTABLE]
    return {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@functools.cache
def _bytes_by_character() -> Mapping[str, int]:
    return {character: byte for byte, character in byte_characters().items()}


def encode_byte_level(text: str) -> str:
    """The spelling of a text's UTF-8 bytes."""
    characters = byte_characters()
    return "".join(characters[byte] for byte in text.encode("utf-8"))


def decode_byte_level(spelling: str) -> str:
    """The text that a token spells; a token with a character outside the alphabet stands for itself."""
    table = _bytes_by_character()
    if any(character not in table for character in spelling):
        return spelling
    return bytes(table[character] for character in spelling).decode("utf-8", "replace")
