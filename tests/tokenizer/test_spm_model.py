"""Our reader of tokenizer.model against SentencePiece's own, and against broken files."""

import random
from pathlib import Path

import pytest
import sentencepiece
import tiny_tokenizers

from ollama_forge.errors import NotFoundError, TokenizerError
from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.spm_model import parse_sentencepiece, read_sentencepiece


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama2-spm", "tokenizer.model"), ("gemma-spm", "tokenizer.model"), ("t5-unigram", "spiece.model")],
)
def test_pieces_equal_sentencepieces_own(tmp_path: Path, kind: str, name: str) -> None:
    tiny_tokenizers.build_tokenizer(kind, tmp_path)
    ours = read_sentencepiece(tmp_path / name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / name))

    assert [piece.text for piece in ours.pieces] == [theirs.id_to_piece(n) for n in range(len(theirs))]
    assert [piece.score for piece in ours.pieces] == [theirs.get_score(n) for n in range(len(theirs))]
    for number, piece in enumerate(ours.pieces):
        assert (piece.type == TokenType.UNKNOWN) == theirs.is_unknown(number)
        assert (piece.type == TokenType.CONTROL) == theirs.is_control(number)
        assert (piece.type == TokenType.BYTE) == theirs.is_byte(number)
    assert ours.is_unigram == (kind == "t5-unigram")
    assert ours.adds_dummy_prefix == (kind != "gemma-spm")
    assert bool(ours.charsmap) == (kind == "t5-unigram")


def test_mutated_files_are_read_or_refused_never_worse(tmp_path: Path) -> None:
    tiny_tokenizers.build_tokenizer("llama2-spm", tmp_path)
    content = (tmp_path / "tokenizer.model").read_bytes()
    choose = random.Random(0)
    n_refused = 0
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(choose.randrange(1, 4)):
            mutated[choose.randrange(len(mutated))] = choose.randrange(256)
        del mutated[choose.choice([len(mutated), choose.randrange(len(mutated))]) :]
        try:
            parse_sentencepiece(bytes(mutated))
        except TokenizerError:
            n_refused += 1
    assert n_refused > 100


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x0a",
        b"\x0a\xff\xff\xff\xff\x0f",
        b"\xff" * 40,
        b"\x0a\x02\x0a\x05",
        b"\x0b",
        b"\x0a\x04\x0a\x02\xff\xfe",
        b"\x0a\x02\x18\x09",
    ],
)
def test_lies_about_lengths_are_refused(content: bytes) -> None:
    with pytest.raises(TokenizerError):
        parse_sentencepiece(content)


def test_file_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        read_sentencepiece(tmp_path / "tokenizer.model")
    with pytest.raises(NotFoundError):
        read_sentencepiece(tmp_path / "nothing")
