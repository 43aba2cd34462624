r"""Which of llama.cpp's BPE pre-tokenizers a `tokenizer.json` describes, and how each of them splits text.

In: the parsed `tokenizer.json`. Out: the name for `tokenizer.ggml.pre`, read from the regexes and flags that the file
states, so a fine-tune with added tokens keeps its name. Facts: the switch over pre-tokenizer types in llama.cpp's
`src/llama-vocab.cpp`, and the `tokenizer.json` files of the models that its converter's table names.

Several of llama.cpp's names mean the same splits and the same defaults. One of each group is canonical and is the only
one detected: `llama-bpe` (also llama3, falcon3, falcon-h1, pixtral, midm-2.0, lfm2, jina-v5-nano), `dbrx` (smaug-bpe),
`qwen2` (stablelm2, deepseek-r1-qwen, megrez, hunyuan, grok-2, solar-open, kormo, f2llmv2), `deepseek-v3`
(hunyuan-dense, joyai-llm), `gpt-2` (olmo, mpt, phi-2, jais, gigachat, exaone4, modern-bert, trillion, granite-docling),
`smollm` (exaone, minerva-7b, mellum2, codeshell), `starcoder` (refact), `gpt-4o` (llama4, kanana2, talkie,
minimax-m2), `bloom` (poro-chat, gpt3-finnish), `bailingmoe` (bailingmoe2, llada-moe), `tiny_aya` (cohere2moe),
`roberta-bpe` (jina-v1-en, jina-v2-code). They may differ in how llama.cpp tidies spaces when it writes text, never in
the token ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import TokenizerError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ASCII_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_BLANKS = r"\s+(?!\S)|\s+"
_SYMBOLS_AND_BLANKS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_BLANKS}"

GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|{_BLANKS}"
"""The split that `ByteLevel` with `use_regex` does by itself."""
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS_AND_BLANKS}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_BLANKS}"
)
_JAIS2_BLANKS = "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
_JAIS2 = _LLAMA3.removesuffix(_BLANKS) + _JAIS2_BLANKS
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_SLASHED_TAIL = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_BLANKS}"
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED_TAIL}"
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_SLASHED_TAIL}"
)
_YOUTU = _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}")
_YOUTU_SCRIPTS = "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
# llama.cpp has no case categories: a letter outside ASCII counts as upper and as lower case, a mark as neither
_ANY_UPPER = r"(?:(?=\p{L})[^a-z])"
_ANY_LOWER = r"(?:(?=\p{L})[^A-Z])"
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|\s*[\r\n]+|{_BLANKS}"
)
_DEEPSEEK_LETTERS = (
    # written as escapes: some of them are lost when a text is normalised
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_HAN_AND_HANGUL = "[一-龥ࠀ-一가-퟿]+"
# llama.cpp sees every space outside ASCII as a vertical tab, so ranges of characters leave them out
_LLAMA_HAN_AND_HANGUL = r"[一-龥ࠀ-一가-퟿&&[^\s]]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~！-／：-～‘-‟　-。]+"
_DIGIT = r"\p{N}"
_DIGITS = r"\p{N}+"
_PUNCTUATION = "punctuation:contiguous"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_SEED_CODER = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_BLANKS}"
_BAILING = _QWEN2.replace(r"|\s*[\r\n]+|", r"|\s*[\r\n]|")
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_BLANKS}"
)
_MINICPM5 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
_AYA_DIGITS = r"\d{1,3}(?=(?:\d{3})*\b)"
# llama.cpp keeps what stands before a number together with its first digits until the next split
_LLAMA_AYA_DIGITS = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


@dataclass(frozen=True)
class TokenizerFacts:
    """What a `tokenizer.json` says beside its regexes, where that decides between two names."""

    ignores_merges: bool
    added: frozenset[str]
    normalizers: frozenset[str]
    post_processors: frozenset[str]


@dataclass(frozen=True)
class Pretokenizer:
    """One of llama.cpp's BPE pre-tokenizers.

    Attributes:
        name: the value of `tokenizer.ggml.pre`.
        splits: regexes in the order in which `tokenizer.json` applies them, in `canonical_pattern` form; each isolates
            its matches inside the pieces that the one before left.
        llama_splits: the same as llama.cpp applies them, where that differs.
        ignores_merges: a piece that is a token as a whole is taken before any merge.
        adds_bos: llama.cpp puts BOS in front when the GGUF does not say.
        applies: what else must be true of the file for this name.
    """

    name: str
    splits: tuple[str, ...]
    llama_splits: tuple[str, ...] | None = None
    ignores_merges: bool = False
    adds_bos: bool = False
    applies: Callable[[TokenizerFacts], bool] | None = None


def _has_added(*tokens: str) -> Callable[[TokenizerFacts], bool]:
    return lambda facts: facts.added.issuperset(tokens)


# the first row whose splits are equal and whose condition holds gives the name
PRETOKENIZERS: tuple[Pretokenizer, ...] = (
    Pretokenizer("roberta-bpe", (GPT2,), applies=lambda facts: "RobertaProcessing" in facts.post_processors),
    Pretokenizer("gpt-2", (GPT2,)),
    Pretokenizer("glm4", (_LLAMA3,), applies=_has_added("[gMASK]", "<sop>")),
    Pretokenizer(
        "llama-bpe", (_LLAMA3,), ignores_merges=True, adds_bos=True, applies=lambda facts: facts.ignores_merges
    ),
    Pretokenizer("dbrx", (_LLAMA3,)),
    Pretokenizer("qwen2", (_QWEN2,)),
    Pretokenizer("qwen35", (_QWEN35,)),
    Pretokenizer("jais-2", (_JAIS2,)),
    Pretokenizer("command-r", (_DIGIT, GPT2), applies=lambda facts: "NFC" in facts.normalizers),
    Pretokenizer("starcoder", (_DIGIT, GPT2), applies=_has_added("<fim_prefix>")),
    Pretokenizer("smollm", (_DIGIT, GPT2)),
    Pretokenizer(
        "falcon",
        (_PUNCTUATION, GPT2, _DIGITS, "[0-9][0-9][0-9]"),
        (r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"),
    ),
    Pretokenizer(
        "deepseek-llm",
        (r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_MARKS, r"\s+$", _HAN_AND_HANGUL, _DIGIT),
        (
            *(r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", _DEEPSEEK_MARKS.replace("　-。", "、。"), r"\s+$"),
            *(_LLAMA_HAN_AND_HANGUL, _DIGITS),
        ),
    ),
    Pretokenizer(
        "deepseek-coder",
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, _DIGIT),
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _LLAMA_HAN_AND_HANGUL, _DIGIT),
    ),
    Pretokenizer("deepseek-v3", (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)),
    Pretokenizer(
        "tekken",
        (_TEKKEN,),
        (_TEKKEN.replace(_UPPER, _ANY_UPPER).replace(_LOWER, _ANY_LOWER),),
        ignores_merges=True,
        adds_bos=True,
    ),
    Pretokenizer("gpt-4o", (_GPT4O,), (_GPT4O.replace(_UPPER, _ANY_UPPER).replace(_LOWER, _ANY_LOWER),)),
    Pretokenizer("youtu", (_YOUTU_SCRIPTS, _YOUTU), ignores_merges=True),
    Pretokenizer("tiny_aya", (_AYA_DIGITS, _GPT4O), (_LLAMA_AYA_DIGITS, _GPT4O)),
    Pretokenizer("viking", (_BLOOM, _DIGIT)),
    Pretokenizer("bloom", (_BLOOM,)),
    Pretokenizer("superbpe", (_DIGITS, r"(?=(\d{3})+(?!\d))")),
    Pretokenizer("seed-coder", (_SEED_CODER,)),
    Pretokenizer("bailingmoe", (_BAILING,)),
    Pretokenizer("exaone-moe", (_EXAONE_MOE,)),
    Pretokenizer("minicpm5", (r"\p{N}{1,3}", _MINICPM5), ignores_merges=True),
    Pretokenizer("laguna", (r"[^\n]+|[\n]+", _QWEN2)),
)

_SAME_AS = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "dbrx": ("smaug-bpe",),
    "glm4": ("chatglm-bpe",),
    "qwen2": (
        *("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "grok-2"),
        *("solar-open", "kormo", "f2llmv2"),
    ),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm"),
    "gpt-2": (
        *("olmo", "mpt", "phi-2", "jais", "gigachat", "exaone4", "modern-bert", "trillion", "granite-docling"),
        *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum"),
    ),
    "roberta-bpe": ("jina-v1-en", "jina-v2-code"),
    "smollm": ("exaone", "minerva-7b", "mellum2", "codeshell"),
    "starcoder": ("refact",),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "bloom": ("poro-chat", "gpt3-finnish"),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "tiny_aya": ("cohere2moe",),
}
_DEFAULT = Pretokenizer("default", (r"[\p{P}$+<=>^~|]+", GPT2, _DIGITS, "[0-9][0-9][0-9]"))
_BY_NAME = {row.name: row for row in (*PRETOKENIZERS, _DEFAULT)}
_BY_NAME |= {alias: _BY_NAME[name] for name, aliases in _SAME_AS.items() for alias in aliases}

_SPELLINGS = (
    ("\r", r"\r"),
    ("\n", r"\n"),
    ("\t", r"\t"),
    ("[\\n\\r", "[\\r\\n"),
    (_ASCII_CONTRACTIONS, _CONTRACTIONS),
    ("'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    ("(?i:'s|'t|'re|'ve|'m|'d|'ll)", _CONTRACTIONS),
    (r"[^(\s|[.,!?…。，、।۔،])]", r"[^(\s|.,!?…。，、।۔،)]"),
)
_POSSESSIVE = re.compile(r"(\\.|\[(?:\\.|[^\]\\])*\])|([?+*])\+")


def find_pretokenizer(name: str) -> Pretokenizer | None:
    """The row of a `tokenizer.ggml.pre` name, aliases included; None when we do not know how it splits."""
    return _BY_NAME.get(name or "default")


def llama_patterns(row: Pretokenizer) -> tuple[str, ...]:
    """The regexes (Oniguruma) that isolate what llama.cpp isolates, in order.

    llama.cpp knows no case categories and folds contractions for ASCII letters only (its `unicode.cpp`).
    """
    splits = row.llama_splits or row.splits
    return tuple(
        re.sub(r"\\p\{L[ultmo]\}", r"\\p{L}", split).replace(_CONTRACTIONS, _ASCII_CONTRACTIONS) for split in splits
    )


def canonical_pattern(pattern: str) -> str:
    """One spelling for regexes that mean the same: escaped line ends, one form of contractions, no possessives."""
    for spelling, canonical in _SPELLINGS:
        pattern = pattern.replace(spelling, canonical)
    pattern = _POSSESSIVE.sub(lambda match: match[1] or match[2], pattern)
    return pattern.replace("{1}", "")


def detect_pretokenizer(tokenizer_json: Mapping[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed `tokenizer.json`.

    A SentencePiece-like tokenizer (byte fallback or Unigram, spaces as U+2581) has none; its name is `"default"`.

    Raises:
        TokenizerError: the splits are none that llama.cpp implements; the message shows them.
    """
    if is_sentencepiece_like(tokenizer_json):
        return "default"
    steps, has_bytes = _read_steps(tokenizer_json.get("pre_tokenizer"))
    has_bytes = has_bytes or "ByteLevel" in _types(tokenizer_json.get("normalizer"), "normalizers")
    facts = TokenizerFacts(
        ignores_merges=bool(_mapping(tokenizer_json.get("model")).get("ignore_merges")),
        added=frozenset(str(token.get("content")) for token in _mappings(tokenizer_json.get("added_tokens"))),
        normalizers=frozenset(_types(tokenizer_json.get("normalizer"), "normalizers")),
        post_processors=frozenset(_types(tokenizer_json.get("post_processor"), "processors")),
    )
    if has_bytes:
        for row in PRETOKENIZERS:
            if row.splits == steps and (row.applies is None or row.applies(facts)):
                return row.name
    shown = "\n".join(f"  {step!r}" for step in steps) or "  (none)"
    raise TokenizerError(
        f"This tokenizer splits text in a way that llama.cpp does not implement:\n{shown}",
        why="GGUF stores only the name of a splitting rule; a wrong one gives wrong token ids without an error."
        if has_bytes
        else "The pre-tokenizer is not byte-level, and the model is neither SentencePiece-like nor Unigram.",
        next="Convert a model of a family that llama.cpp runs, or a ready-made GGUF of this one.",
    )


def is_sentencepiece_like(tokenizer_json: Mapping[str, Any]) -> bool:
    """Whether the model works on text with U+2581 for spaces (BPE with byte fallback, or Unigram)."""
    model = _mapping(tokenizer_json.get("model"))
    if model.get("type") == "Unigram":
        return True
    return bool(model.get("byte_fallback")) and "ByteLevel" not in _types(
        tokenizer_json.get("pre_tokenizer"), "pretokenizers"
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _types(node: Any, children: str) -> Iterable[str]:
    """The `type` of a component and of what its `Sequence` holds."""
    node = _mapping(node)
    members = _mappings(node.get(children))
    return {str(node.get("type")), *(str(member.get("type")) for member in members)}


def _read_steps(pre_tokenizer: Any) -> tuple[tuple[str, ...], bool]:
    """The splits in order (canonical), and whether a `ByteLevel` step is among them."""
    node = _mapping(pre_tokenizer)
    members = _mappings(node.get("pretokenizers")) if node.get("type") == "Sequence" else [node]
    steps: list[str] = []
    has_bytes = False
    for member in members:
        kind = member.get("type")
        if kind == "ByteLevel":
            has_bytes = True
            if member.get("use_regex", True):
                steps.append(GPT2)
        elif kind == "Digits":
            steps.append(_DIGIT if member.get("individual_digits") else _DIGITS)
        elif kind == "Punctuation":
            steps.append(f"punctuation:{str(member.get('behavior')).lower()}")
        elif kind == "Split":
            steps.append(_read_split(member))
        elif kind is not None:
            steps.append(str(kind))
    return tuple(steps), has_bytes


def _read_split(member: Mapping[str, Any]) -> str:
    pattern = _mapping(member.get("pattern"))
    text = pattern.get("Regex")
    text = canonical_pattern(str(text)) if text is not None else re.escape(str(pattern.get("String")))
    behavior = str(member.get("behavior"))
    # to keep the matches and drop what is between them is the same when the regex leaves nothing between them
    if behavior == "Isolated" or (behavior == "Removed" and member.get("invert") and text.endswith(r"|\s+")):
        return text
    return f"{text} ({behavior}{', inverted' if member.get('invert') else ''})"
