"""SentencePiece as llama.cpp runs it: the best-scored neighbours are joined first, the leftmost where scores are equal.

In: text, and where special tokens stand in it. Out: token ids with the characters that they stand for. It is the exact
form, in Python, of what `encode.py` leaves to `tokenizers` wherever an order of merges says the same. Facts:
llama.cpp's `src/llama-vocab.cpp`, llm_tokenizer_spm_session.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence

SPACE = "▁"


class ScoreMerger:
    """A SentencePiece vocabulary, encoded as llama.cpp does.

    Args:
        ids, scores: by piece.
        special_ids: tokens that are found before anything is merged.
        has_prefix: a space goes in front of a text, and after each special token.
    """

    def __init__(
        self, ids: Mapping[str, int], scores: Mapping[str, float], special_ids: frozenset[int], has_prefix: bool
    ) -> None:
        self._ids = ids
        self._scores = scores
        self._special_ids = special_ids
        self._has_prefix = has_prefix

    def split_gaps(self, text: str, placed: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        """Keep the special tokens of `placed` and encode what lies between them."""
        special = [entry for entry in placed if entry[0] in self._special_ids]
        position = 0
        for entry in special:
            yield from self._encode(text, position, entry[1])
            yield entry
            position = entry[2]
        yield from self._encode(text, position, len(text))

    def _encode(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        if start >= stop:
            return
        n_prefix = 1 if self._has_prefix else 0
        symbols = list(SPACE * n_prefix + text[start:stop].replace(" ", SPACE))
        for index, symbol, n_chars in self._merge(symbols):
            first = start + max(0, index - n_prefix)
            last = start + max(1, index + n_chars - n_prefix)
            if symbol in self._ids:
                yield self._ids[symbol], first, last
                continue
            for byte in symbol.encode("utf-8", "surrogateescape"):
                token_id = self._ids.get(f"<0x{byte:02X}>")
                if token_id is not None:
                    yield token_id, first, last

    def _merge(self, symbols: list[str]) -> Iterator[tuple[int, str, int]]:
        n_symbols = len(symbols)
        following = list(range(1, n_symbols + 1))
        before = list(range(-1, n_symbols - 1))
        waiting: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < n_symbols:
                joined = symbols[left] + symbols[right]
                if joined in self._scores:
                    heapq.heappush(waiting, (-self._scores[joined], left, right, joined))

        for left in range(n_symbols - 1):
            offer(left, left + 1)
        while waiting:
            _, left, right, joined = heapq.heappop(waiting)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
                continue
            symbols[left], symbols[right] = joined, ""
            following[left] = following[right]
            if following[right] < n_symbols:
                before[following[right]] = left
            offer(before[left], left)
            offer(left, following[left])
        for index, symbol in enumerate(symbols):
            if symbol:
                yield index, symbol, len(symbol)
