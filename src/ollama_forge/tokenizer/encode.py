"""Text to token ids as llama.cpp does it, from a GGUF's metadata alone, at the speed of `tokenizers`.

In: the `tokenizer.*` keys of a GGUF. Out: a `GGUFTokenizer`, whose ids equal those of the engine that will run the
model; an Ollama model has no other tokenizer to train with. Byte-level BPE becomes `tokenizers`' BPE behind the
splits of its pre-tokenizer. SentencePiece, which llama.cpp merges by score, becomes a BPE whose merges follow from
the scores; where scores repeat, so that no order of merges says the same, a merger of our own does the work. Facts:
llama.cpp's `src/llama-vocab.cpp` (llm_tokenizer_spm_session, llm_tokenizer_bpe_session, tokenizer_st_partition).

Known to differ: special tokens that overlap in a text are taken from left to right, the longest first; llama.cpp takes
the longest of the whole text first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.merges import merges_from_scores
from ollama_forge.tokenizer.pretokenizer import find_pretokenizer, llama_patterns
from ollama_forge.tokenizer.score_merge import SPACE, ScoreMerger

_SPECIAL_TYPES = frozenset({TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED})
# llama.cpp takes these for control tokens whatever the file says of them
_CONTROL_BY_TEXT = frozenset(
    (
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
            "<EOT>",
            "_<EOT>",
        ),
        *("[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>", "<|return|>", "<|call|>"),
        *("<|flush|>", "<|calls|>", "</s>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>"),
    )
)
_ALWAYS_PARSED = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer of a GGUF.

    Attributes:
        kind: `tokenizer.ggml.model`, `gpt2` or `llama`.
        pre: `tokenizer.ggml.pre`.
        tokens: the text of each id, as the file spells it.
        bos_id, eos_id: None when there is none.
        adds_bos, adds_eos: whether the engine puts them around a text.
        tokenizer: special tokens are found in it; for SentencePiece with repeated scores it does nothing else.
    """

    kind: str
    pre: str
    tokens: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    adds_eos: bool
    tokenizer: Tokenizer = field(repr=False)
    _merger: ScoreMerger | None = field(default=None, repr=False)

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids.

        Args:
            text: any text.
            add_special: put BOS and EOS around it where the model says so.
            parse_special: take the text of a control token for that token; otherwise it is text like any other.
        """
        ids = [token_id for token_id, _, _ in self.encode_offsets(text, parse_special=parse_special)]
        if add_special and self.adds_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if add_special and self.adds_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_offsets(self, text: str, *, parse_special: bool = True) -> list[tuple[int, int, int]]:
        """(token id, start, end) with the characters of `text` that each token stands for; nothing is added.

        A token that is part of a character has the whole character; the space that SentencePiece puts in front has
        the first character.
        """
        self.tokenizer.encode_special_tokens = not parse_special
        encoding = self.tokenizer.encode(_without_surrogates(text), add_special_tokens=False)
        placed = [(token_id, start, end) for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)]
        if self._merger is None:
            return placed
        return list(self._merger.split_gaps(text, placed))


def build_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """The tokenizer that a GGUF's metadata describes.

    Raises:
        TokenizerError: the keys are missing or disagree, or the tokenizer is neither byte-level BPE nor SentencePiece.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _read_list(metadata, "tokenizer.ggml.tokens")
    types = _read_list(metadata, "tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    if not tokens or len(types) < len(tokens):
        raise TokenizerError(
            f"The GGUF has {len(tokens)} tokens and {len(types)} token types",
            why="Without them text cannot become tokens.",
            next="Use a GGUF that was converted with its vocabulary.",
        )
    texts = tuple(_token_spelling(token, token_id) for token_id, token in enumerate(tokens))
    added = _added_tokens(metadata, texts, types)
    pre = str(metadata.get("tokenizer.ggml.pre", ""))
    merger: ScoreMerger | None = None
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, texts, pre)
    elif kind == "llama":
        ids = {text: token_id for token_id, text in enumerate(texts)}
        tokenizer, merger = _sentencepiece(metadata, ids, frozenset(ids[token.content] for token in added))
        adds_bos = True
    else:
        raise TokenizerError(
            f"The GGUF has a tokenizer of the kind {kind!r}",
            why="Text can be prepared for 'gpt2' (byte-level BPE) and 'llama' (SentencePiece).",
            next="Train from the Hugging Face folder of the model.",
        )
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    bos_id = _special_id(metadata, "bos", len(texts), {"gpt2": 11, "llama": 1}[kind])
    eos_id = _special_id(metadata, "eos", len(texts), {"gpt2": 11, "llama": 2}[kind])
    return GGUFTokenizer(
        kind=kind,
        pre=pre,
        tokens=texts,
        bos_id=bos_id,
        eos_id=eos_id,
        adds_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)),
        adds_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
        tokenizer=tokenizer,
        _merger=merger,
    )


def _byte_level(metadata: Mapping[str, Any], texts: Sequence[str], pre: str) -> tuple[Tokenizer, bool]:
    row = find_pretokenizer(pre)
    if row is None:
        raise TokenizerError(
            f"The GGUF names the pre-tokenizer {pre!r}, which is not known here",
            why="How it splits text decides which tokens come out.",
            next="Train from the Hugging Face folder of the model.",
        )
    ids = {text: token_id for token_id, text in enumerate(texts)}
    merges: dict[tuple[str, str], None] = {}
    for line in _read_list(metadata, "tokenizer.ggml.merges"):
        cut = str(line).find(" ", 1)
        left, right = str(line)[:cut], str(line)[cut + 1 :]
        if cut > 0 and left in ids and right in ids and left + right in ids:
            merges[left, right] = None
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=list(merges), ignore_merges=row.ignores_merges))
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in llama_patterns(row)]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return tokenizer, row.adds_bos


def _sentencepiece(
    metadata: Mapping[str, Any], ids: Mapping[str, int], special_ids: frozenset[int]
) -> tuple[Tokenizer, ScoreMerger | None]:
    values = _read_list(metadata, "tokenizer.ggml.scores") or [0.0] * len(ids)
    if len(values) <= max(ids.values()):
        raise TokenizerError(
            f"The GGUF has {max(ids.values()) + 1} tokens and {len(values)} scores", next="Use a GGUF that is whole."
        )
    has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    scores = {text: float(values[token_id]) for text, token_id in ids.items()}
    merges = list(merges_from_scores(scores))
    if _has_repeated_scores(merges, scores):
        # a model without merges: all that it has to do is to find the special tokens
        merger = ScoreMerger(ids, scores, special_ids, has_prefix)
        return Tokenizer(models.BPE(vocab=dict(ids), merges=[], byte_fallback=True)), merger
    tokenizer = Tokenizer(models.BPE(vocab=dict(ids), merges=merges, byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if has_prefix else replace
    return tokenizer, None


def _has_repeated_scores(merges: Sequence[tuple[str, str]], scores: Mapping[str, float]) -> bool:
    joined = list(dict.fromkeys(left + right for left, right in merges))
    return any(scores[first] == scores[second] for first, second in pairwise(joined))


def _added_tokens(metadata: Mapping[str, Any], texts: Sequence[str], types: Sequence[Any]) -> list[AddedToken]:
    is_phi3 = any(word in str(metadata.get("general.name", "")).lower() for word in ("phi-3", "phi3"))
    found = []
    for text, number in zip(texts, types, strict=False):
        is_control = number in (TokenType.CONTROL, TokenType.UNKNOWN) or text in _CONTROL_BY_TEXT
        if not text or not (is_control or number in _SPECIAL_TYPES):
            continue
        # llama.cpp knows Phi-3 by the model's name and lets its tokens swallow blanks on their right
        rstrip = is_phi3 and text not in ("<unk>", "<s>", "<|endoftext|>")
        special = is_control and text not in _ALWAYS_PARSED
        found.append(AddedToken(text, special=special, normalized=False, rstrip=rstrip))
    return found


def _read_list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    if value is None:
        return []
    if isinstance(value, (str, bytes, int, float)):
        raise TokenizerError(f"The GGUF's {key!r} is not an array", next="Use a GGUF that is whole.")
    return list(value)


def _token_spelling(token: Any, token_id: int) -> str:
    """llama.cpp names empty tokens by their id; a token that is no valid text gets a name that no text has."""
    text = token if isinstance(token, str) else bytes(token).decode("utf-8", "surrogateescape")
    if not text:
        return f"[EMPTY_{token_id}]"
    return text if _is_text(text) else f"\x00{token_id}\x00"


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _without_surrogates(text: str) -> str:
    return text if _is_text(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _special_id(metadata: Mapping[str, Any], role: str, n_tokens: int, default: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{role}_token_id", default)
    if isinstance(value, int) and 0 <= value < n_tokens:
        return value
    return default if default < n_tokens else None
