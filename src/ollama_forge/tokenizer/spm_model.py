"""Read a SentencePiece `tokenizer.model`: its pieces, scores and the normaliser's flags.

In: the file's bytes, untrusted. Out: frozen values. It is one protobuf message, read here field by field with every
length checked against what is left, so no foreign parser sees an untrusted file. Facts: `sentencepiece_model.proto`
(ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec; SentencePiece: 1 piece, 2 score, 3 type).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.folder import read_limited

MAX_MODEL_BYTES = 128 << 20
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_UNIGRAM = 1
_NORMAL = TokenType.NORMAL


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; `score` is a log probability (Unigram) or minus the merge's rank (BPE)."""

    text: str
    score: float
    type: TokenType


@dataclass(frozen=True)
class SentencePieceModel:
    """A `tokenizer.model`, read."""

    pieces: tuple[Piece, ...]
    is_unigram: bool
    adds_dummy_prefix: bool
    removes_extra_whitespaces: bool
    charsmap: bytes


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        NotFoundError: no such file.
        TokenizerError: it is not a SentencePiece model, or one of its lengths is a lie.
    """
    content = read_limited(path, MAX_MODEL_BYTES)
    try:
        return parse_sentencepiece(content)
    except TokenizerError as exc:
        raise TokenizerError(
            f"{str(path)!r} is not a SentencePiece model: {exc.what}",
            why=exc.why,
            next="Download the file again, or remove it if the folder also has a tokenizer.json.",
        ) from exc


def parse_sentencepiece(content: bytes) -> SentencePieceModel:
    """The same from bytes.

    Raises:
        TokenizerError: as `read_sentencepiece`, without a path.
    """
    pieces: list[Piece] = []
    is_unigram = True
    adds_prefix = removes_blanks = True
    charsmap = b""
    for number, wire, value in _fields(content):
        if wire != _BYTES or not isinstance(value, bytes):
            continue
        if number == 1:
            pieces.append(_parse_piece(value))
        elif number == 2:
            kinds = [v for n, w, v in _fields(value) if n == 3 and w == _VARINT]
            is_unigram = not kinds or kinds[-1] == _UNIGRAM
        elif number == 3:
            for inner, inner_wire, inner_value in _fields(value):
                if inner == 2 and inner_wire == _BYTES and isinstance(inner_value, bytes):
                    charsmap = inner_value
                elif inner == 3 and inner_wire == _VARINT:
                    adds_prefix = bool(inner_value)
                elif inner == 4 and inner_wire == _VARINT:
                    removes_blanks = bool(inner_value)
    if not pieces:
        raise TokenizerError("it holds no pieces", why="A vocabulary cannot be empty.")
    return SentencePieceModel(tuple(pieces), is_unigram, adds_prefix, removes_blanks, charsmap)


def _parse_piece(message: bytes) -> Piece:
    # what SentencePiece writes, nearly always: a short text, a score, and nothing for an ordinary piece
    if len(message) > 6 and message[0] == 0x0A and message[-5] == 0x15 and message[1] == len(message) - 7 < 0x80:
        with contextlib.suppress(UnicodeDecodeError):
            return Piece(message[2:-5].decode("utf-8"), struct.unpack_from("<f", message, len(message) - 4)[0], _NORMAL)
    text, score, kind = "", 0.0, TokenType.NORMAL
    for number, wire, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            try:
                text = value.decode("utf-8")
            except UnicodeDecodeError as exc:
                raise TokenizerError(f"the piece {value!r} is not UTF-8", why=str(exc)) from exc
        elif number == 2 and wire == _FIXED32 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            try:
                kind = TokenType(value)
            except ValueError as exc:
                raise TokenizerError(f"the piece {text!r} has the unknown type {value}") from exc
    return Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Each field of a protobuf message: number, wire type, and its integer or its bytes."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, wire, value
            continue
        if wire == _BYTES:
            length, position = _varint(message, position)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise TokenizerError(f"the wire type {wire} at byte {position} is not protobuf's")
        if length > end - position:
            raise TokenizerError(
                f"a field at byte {position} says it has {length} bytes, and {end - position} are left",
                why="The file is cut short, or it is something else.",
            )
        yield number, wire, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise TokenizerError(f"it ends inside a number at byte {position}", why="The file is cut short.")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise TokenizerError(f"the number before byte {position} has more than ten bytes")
