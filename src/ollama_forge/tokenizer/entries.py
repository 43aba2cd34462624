"""A vocabulary while it is being filled: three lists of one length, padded from the start.

In: token after token, later ones over earlier ones. Out: the lists that a GGUF holds.
"""

from __future__ import annotations

from enum import IntEnum

PAD_SCORE = -10000.0
_SPECIAL_WORDS = frozenset({"<pad>", "<mask>", "<2mass>", "[@BOS@]"})


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`; the numbers are SentencePiece's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Entries:
    """Tokens, scores and types of a vocabulary of fixed size; slots that nothing fills are unused `[PADi]`."""

    def __init__(self, n_tokens: int) -> None:
        self.tokens = [f"[PAD{token_id}]" for token_id in range(n_tokens)]
        self.scores = [PAD_SCORE] * n_tokens
        self.types = [TokenType.UNUSED] * n_tokens
        self.n_dropped = 0

    def put(self, token_id: int, text: str, score: float, kind: TokenType) -> None:
        """Fill a slot; a token beyond the last slot is counted in `n_dropped` and left out."""
        if token_id >= len(self.tokens):
            self.n_dropped += 1
            return
        self.tokens[token_id] = text
        self.scores[token_id] = score
        self.types[token_id] = kind

    def type_of(self, token_id: int) -> TokenType | None:
        return self.types[token_id] if token_id < len(self.types) else None

    def is_padding(self, token_id: int) -> bool:
        return token_id < len(self.tokens) and self.tokens[token_id] == f"[PAD{token_id}]"


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its looks (`does_token_look_special`).

    Some models list their control tokens as not special: Command-R, DeepSeek-Coder, Gemma.
    """
    if text in _SPECIAL_WORDS:
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(left) and text.endswith(right) for left, right in brackets)
