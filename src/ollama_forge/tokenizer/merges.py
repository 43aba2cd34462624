"""BPE merges: as files spell them, and as the scores that say the same to a merger that looks at scores.

In: the merges of `tokenizer.json` (two spellings) or `merges.txt`. Out: pairs; scores by piece; pairs by score.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.folder import read_limited

_MAX_MERGES_BYTES = 64 << 20
_ESCAPED_SPACE = chr(ord(" ") + 256)


def merge_lines(folder: Path, merges: Any) -> list[tuple[str, str]]:
    """The merges of a `tokenizer.json` (`"a b"` or `["a", "b"]`), else those of `merges.txt`, in order of rank.

    A space inside a part is written as `Ġ`, as llama.cpp's converter does.

    Raises:
        TokenizerError: an entry is neither of the two spellings.
    """
    if isinstance(merges, list) and merges:
        return [_parse_merge(merge) for merge in merges]
    path = folder / "merges.txt"
    if not path.is_file():
        return []
    lines = read_limited(path, _MAX_MERGES_BYTES).decode("utf-8", "replace").split("\n")
    if lines and lines[0].strip().startswith("#"):
        del lines[0]
    pairs = [line.split() for line in lines]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]


def _parse_merge(merge: Any) -> tuple[str, str]:
    if isinstance(merge, str):
        cut = merge.find(" ", 1)
        if cut > 0:
            return merge[:cut], merge[cut + 1 :]
    elif isinstance(merge, list) and len(merge) == 2:
        left, right = merge  # no generators here: a vocabulary has 150,000 of these
        if isinstance(left, str) and isinstance(right, str):
            return left.replace(" ", _ESCAPED_SPACE), right.replace(" ", _ESCAPED_SPACE)
    raise TokenizerError(
        f"The merge {merge!r} is not a pair of tokens", why="tokenizer.json is broken.", next="Download it again."
    )


def scores_from_merges(ids: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str) -> dict[str, float]:
    """The scores with which merging the best-scored neighbours gives what the merges give.

    A SentencePiece BPE scores a piece by minus its rank; `tokenizer.json` lists, in that order, every pair that joins
    into a piece. So the rank is the piece's place among the results of the merges; what no merge makes (single
    characters, bytes) follows in the order of ids.

    Args:
        ids: the pieces without added tokens.
        merges: in order of rank.
        where: the folder, for the message.

    Raises:
        TokenizerError: two neighbours that join into a piece have no merge. Scores cannot say that.
    """
    scores: dict[str, float] = {}
    known = set(merges)
    for left, right in merges:
        if left + right in ids:
            scores.setdefault(left + right, -float(len(scores)))
    for piece in list(scores):
        for left, right in splits_of(piece, ids):
            if (left, right) not in known:
                raise TokenizerError(
                    f"The tokenizer of {where!r} joins {left!r} and {right!r} never, although {piece!r} is a token",
                    why="llama.cpp merges SentencePiece tokens by score alone, so it would join them.",
                    next="Convert a folder that has tokenizer.model, or a model with a byte-level tokenizer.",
                )
    for piece in sorted(ids.keys() - scores.keys(), key=lambda piece: ids[piece]):
        if len(piece) == 1:
            scores[piece] = -float(len(scores))
    return scores


def merges_from_scores(scores: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that joins into a piece, the best-scored piece first."""
    order = {piece: index for index, piece in enumerate(scores)}
    for piece in sorted(scores, key=lambda piece: (-scores[piece], order[piece])):
        yield from reversed(splits_of(piece, order))


def splits_of(piece: str, pieces: Container[str]) -> list[tuple[str, str]]:
    """The ways to cut a piece into two pieces."""
    cuts = range(1, len(piece))
    return [(piece[:cut], piece[cut:]) for cut in cuts if piece[:cut] in pieces and piece[cut:] in pieces]
