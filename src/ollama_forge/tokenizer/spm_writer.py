"""Write a SentencePiece `tokenizer.model` for a vocabulary that is merged by score.

In: pieces with their scores and types. Out: the file's bytes. It holds the scores as they are, tokenizer.json cannot.
Facts: `sentencepiece_model.proto` (ModelProto: 1 pieces, 2 trainer_spec, 3 normalizer_spec).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence

from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.spm_model import Piece

_BPE = 2
_ROLE_FIELDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_NO_TOKEN = (1 << 64) - 1  # protobuf's spelling of -1
_N_BYTES = 256


def render_sentencepiece(pieces: Sequence[Piece], role_ids: Mapping[str, int], *, adds_dummy_prefix: bool) -> bytes:
    """The bytes of a `tokenizer.model`.

    Args:
        pieces: one for each id, in order.
        role_ids: ids of `unk`, `bos`, `eos`, `pad` where there are such tokens.
        adds_dummy_prefix: a space goes in front of a text.
    """
    n_byte_pieces = sum(piece.type is TokenType.BYTE for piece in pieces)
    roles = [(field, role_ids.get(role, _NO_TOKEN)) for role, field in _ROLE_FIELDS.items()]
    trainer = [(3, _BPE), (4, len(pieces)), (35, int(n_byte_pieces == _N_BYTES)), *roles]
    blanks = [(3, int(adds_dummy_prefix)), (4, 0), (5, 1)]
    return b"".join(
        (
            *(_message(1, _piece(piece)) for piece in pieces),
            _message(2, _numbers(trainer)),
            _message(3, _message(1, b"identity") + _numbers(blanks)),
        )
    )


def _piece(piece: Piece) -> bytes:
    content = _message(1, piece.text.encode("utf-8")) + b"\x15" + struct.pack("<f", piece.score)
    return content if piece.type is TokenType.NORMAL else content + _numbers([(3, int(piece.type))])


def _numbers(fields: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(_varint(number << 3) + _varint(value) for number, value in fields)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
