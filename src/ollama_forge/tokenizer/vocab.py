"""The vocabulary of a Hugging Face folder, as GGUF states it.

In: the tokenizer's files and `config.json`. Out: a frozen `Vocabulary`, and its GGUF fields with the keys, types,
values and order of llama.cpp's converter (`conversion/base.py`: _set_vocab_gpt2, _set_vocab_sentencepiece,
_set_vocab_llama_hf, and the overrides of the families). We differ from it, on purpose, in these points:

- SentencePiece-like BPE without `tokenizer.model`: scores follow from the merges. The converter writes -1000 for every
  token, after which llama.cpp merges from left to right and gives other ids than the model was trained with.
- `add_space_prefix` is written as false whenever the tokenizer puts no space in front, not for Gemma alone.
- `add_bos_token` is written as false where llama.cpp would otherwise add a token that the tokenizer does not have.
- Unigram without `tokenizer.model` becomes llama.cpp's `t5` tokenizer, which is Unigram; the converter refuses it.
- A SentencePiece tokenizer shorter than the embedding is padded also when it comes from `tokenizer.json`.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ollama_forge.errors import TokenizerError
from ollama_forge.gguf.types import ValueType
from ollama_forge.gguf.writer import Field, array, boolean, string, uint32
from ollama_forge.tokenizer.byte_level import decode_byte_level
from ollama_forge.tokenizer.entries import Entries, TokenType, looks_special
from ollama_forge.tokenizer.folder import TokenizerFolder, is_token_id, read_tokenizer_folder
from ollama_forge.tokenizer.listed import (
    ADDED_SCORE,
    MAX_TOKENS,
    components,
    listed_in_settings,
    listed_in_tokenizer,
    model_of,
    named_special,
    put_added,
    puts_space_in_front,
    vocabulary_ids,
)
from ollama_forge.tokenizer.merges import merge_lines, scores_from_merges
from ollama_forge.tokenizer.pretokenizer import detect_pretokenizer, find_pretokenizer, is_sentencepiece_like
from ollama_forge.tokenizer.special import SpecialTokens, read_special_tokens
from ollama_forge.tokenizer.spm_model import SentencePieceModel, read_sentencepiece

_ROLE_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
_LLAMA_FAMILIES = frozenset({"llama", "mistral", "mixtral"})
_GEMMA_FAMILIES = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text"})


@dataclass(frozen=True)
class Vocabulary:
    """Everything that a GGUF says about text.

    Attributes:
        model: llama.cpp's kind: `gpt2` (byte-level BPE), `llama` (SentencePiece, merged by score), `t5` (Unigram).
        pre: the pre-tokenizer's name; `default` except for `gpt2`.
        tokens, types: one of each for every id.
        scores: one for every id; None for `gpt2`.
        merges: `"left right"` in order of rank; empty except for `gpt2`.
        special: special ids, flags, templates.
        add_space_prefix: None when the converter does not write the key.
        is_prefix_first: the Llama converter writes that key before the tokens, Gemma's after everything.
        remove_extra_whitespaces, charsmap: Unigram's normaliser.
        n_dropped: tokens of the tokenizer that the model has no row for.
        late_ids: special ids that a family's converter writes after everything else.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...]
    special: SpecialTokens
    add_space_prefix: bool | None = None
    is_prefix_first: bool = False
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    n_dropped: int = 0
    late_ids: tuple[tuple[str, int], ...] = ()

    def text_of(self, role: str) -> str | None:
        """The text of the token of a role (`bos`, `eos`, ...), None when there is none."""
        token_id = self.special.id_of(role)
        return self.tokens[token_id] if token_id is not None and token_id < len(self.tokens) else None

    @property
    def chat_template(self) -> str | None:
        """The main template."""
        return dict(self.special.templates).get("default")


def read_vocabulary(folder: Path, config: Mapping[str, Any], padded_size: int | None = None) -> Vocabulary:
    """Read the tokenizer of a folder.

    Args:
        folder: a Hugging Face folder.
        config: its `config.json`.
        padded_size: rows of the embedding; None takes `vocab_size` from the config. Missing tokens become `[PADi]`.

    Raises:
        NotFoundError: the folder has no tokenizer.
        TokenizerError: a file is broken, GGUF cannot express the tokenizer, or it does not fit the model.
    """
    files = read_tokenizer_folder(folder)
    inner = config.get("text_config")
    text_config = inner if isinstance(inner, Mapping) else config
    size = padded_size or text_config.get("vocab_size") or config.get("vocab_size")
    if size is not None and (not is_token_id(size) or size > MAX_TOKENS):
        raise TokenizerError(
            f"The model says that it has {size!r} tokens",
            why=f"1 to {MAX_TOKENS:,} are allowed.",
            next="Mend vocab_size in config.json.",
        )
    family = str(text_config.get("model_type") or config.get("model_type") or "")
    if family == "gemma3n":
        size = text_config.get("vocab_size_per_layer_input", size)
    vocabulary = _read_by_kind(files, config, family, size)
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        raise _repeated(vocabulary.tokens)
    return _finish_for_family(vocabulary, files, config, family)


def vocabulary_fields(vocabulary: Vocabulary) -> list[Field]:
    """The `tokenizer.*` keys, in the converter's order."""
    fields: list[Field] = []
    prefix = vocabulary.add_space_prefix
    prefix_fields = [boolean("tokenizer.ggml.add_space_prefix", prefix)] if prefix is not None else []
    if vocabulary.is_prefix_first:
        fields += prefix_fields
    fields.append(string("tokenizer.ggml.model", vocabulary.model))
    fields.append(string("tokenizer.ggml.pre", vocabulary.pre))
    fields.append(array("tokenizer.ggml.tokens", ValueType.STRING, vocabulary.tokens))
    if vocabulary.scores is not None:
        fields.append(array("tokenizer.ggml.scores", ValueType.FLOAT32, vocabulary.scores))
    fields.append(array("tokenizer.ggml.token_type", ValueType.INT32, [int(kind) for kind in vocabulary.types]))
    if vocabulary.model == "t5":
        fields += prefix_fields
        if vocabulary.remove_extra_whitespaces is not None:
            fields.append(boolean("tokenizer.ggml.remove_extra_whitespaces", vocabulary.remove_extra_whitespaces))
        if vocabulary.charsmap:
            fields.append(array("tokenizer.ggml.precompiled_charsmap", ValueType.UINT8, vocabulary.charsmap))
    if vocabulary.merges:
        fields.append(array("tokenizer.ggml.merges", ValueType.STRING, vocabulary.merges))
    special = vocabulary.special
    fields += _id_fields(special.ids)
    fields += [boolean(f"tokenizer.ggml.add_{role}_token", value) for role, value in special.adds]
    fields += template_fields(special.templates)
    if special.lowercase is not None:
        fields.append(boolean("tokenizer.ggml.normalizer.lowercase", special.lowercase))
    if special.strip_accents is not None:
        fields.append(boolean("tokenizer.ggml.normalizer.strip_accents", special.strip_accents))
    fields += _id_fields(vocabulary.late_ids)
    if not vocabulary.is_prefix_first and vocabulary.model != "t5":
        fields += prefix_fields
    return fields


def _id_fields(ids: tuple[tuple[str, int], ...]) -> list[Field]:
    return [uint32(f"tokenizer.ggml.{_ROLE_KEYS[role]}_token_id", token_id) for role, token_id in ids]


def template_fields(templates: tuple[tuple[str, str], ...]) -> list[Field]:
    """`tokenizer.chat_template`, and the keys of templates with other names."""
    named = {re.sub(r"[^0-9A-Za-z]", "_", name): text for name, text in templates}
    main = named.pop("default", None)
    fields = [string(f"tokenizer.chat_template.{name}", text) for name, text in named.items()]
    if named:
        fields.append(array("tokenizer.chat_templates", ValueType.STRING, list(named)))
    if main is not None:
        fields.append(string("tokenizer.chat_template", main))
    return fields


def _read_by_kind(files: TokenizerFolder, config: Mapping[str, Any], family: str, size: int | None) -> Vocabulary:
    wants_bpe = family == "phi3" and files.settings.get("tokenizer_class") == "GPT2Tokenizer"
    if files.has_sentencepiece and not wants_bpe:
        try:
            model = read_sentencepiece(files.sentencepiece_path)
        except TokenizerError:
            # Llama 3 mirrors carry a tiktoken file under this name beside their tokenizer.json
            if files.tokenizer is None:
                raise
        else:
            return _from_sentencepiece(files, config, model, family, size)
    if files.tokenizer is None:
        raise TokenizerError(
            f"{str(files.folder)!r} has neither tokenizer.json nor tokenizer.model",
            why="One of them is needed; vocab.json and merges.txt alone do not say how text is split.",
            next=(
                'Download the missing file, or write it: python -c "from transformers import AutoTokenizer as T; '
                "T.from_pretrained('FOLDER').save_pretrained('FOLDER')\""
            ),
        )
    kind = model_of(files)["type"]
    if kind == "Unigram":
        return _from_unigram(files, config, size)
    if kind == "BPE" and is_sentencepiece_like(files.tokenizer):
        return _from_sentencepiece_like_bpe(files, config, size)
    if kind == "BPE":
        return _from_byte_level_bpe(files, config, size)
    raise TokenizerError(
        f"The tokenizer of {str(files.folder)!r} is of the type {kind!r}",
        why="BPE, Unigram and SentencePiece are known.",
        next="Convert a model with one of them.",
    )


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _from_sentencepiece(
    files: TokenizerFolder, config: Mapping[str, Any], model: SentencePieceModel, family: str, size: int | None
) -> Vocabulary:
    entries = Entries(size or len(model.pieces))
    for token_id, piece in enumerate(model.pieces):
        # SentencePiece's user-defined symbols are ordinary tokens until a configuration file names them
        kind = TokenType.NORMAL if piece.type == TokenType.USER_DEFINED else TokenType(piece.type)
        entries.put(token_id, piece.text, piece.score, kind)
    for text, token_id in files.added.items():
        entries.put(token_id, text, ADDED_SCORE, TokenType.USER_DEFINED)
    listed = listed_in_settings(files)
    for token_id, entry in listed.items():
        put_added(entries, token_id, entry, keeps_text=family == "phi3")
    for token_id, entry in listed_in_tokenizer(files).items():
        if family == "phi3" or (not listed and entries.is_padding(token_id)):
            put_added(entries, token_id, entry, keeps_text=family == "phi3")
    prefix = None if model.adds_dummy_prefix else False
    return _sentencepiece_vocabulary(files, config, entries, prefix)


def _from_sentencepiece_like_bpe(files: TokenizerFolder, config: Mapping[str, Any], size: int | None) -> Vocabulary:
    model = model_of(files)
    ids = vocabulary_ids(files, model)
    added = listed_in_tokenizer(files) | listed_in_settings(files)
    plain = {text: token_id for text, token_id in ids.items() if token_id not in added}
    scores = scores_from_merges(plain, merge_lines(files.folder, model.get("merges")), str(files.folder))
    entries = Entries(size or max([*ids.values(), *added], default=-1) + 1)
    unknown = model.get("unk_token")
    for text, token_id in ids.items():
        kind = TokenType.UNKNOWN if text == unknown else TokenType.NORMAL
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text):
            kind = TokenType.BYTE
        entries.put(token_id, text, scores.get(text, 0.0), kind)
    for token_id, entry in added.items():
        put_added(entries, token_id, entry)
    for token_id, text in named_special(files, ids).items():
        if token_id not in added and text != unknown:
            entries.put(token_id, text, ADDED_SCORE, TokenType.CONTROL)
    prefix = None if puts_space_in_front(files.tokenizer or {}) else False
    return _sentencepiece_vocabulary(files, config, entries, prefix)


def _sentencepiece_vocabulary(
    files: TokenizerFolder, config: Mapping[str, Any], entries: Entries, prefix: bool | None
) -> Vocabulary:
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tuple(entries.tokens),
        types=tuple(entries.types),
        scores=tuple(entries.scores),
        merges=(),
        special=read_special_tokens(files, config, len(entries.tokens)),
        add_space_prefix=prefix,
        n_dropped=entries.n_dropped,
    )


def _from_unigram(files: TokenizerFolder, config: Mapping[str, Any], size: int | None) -> Vocabulary:
    model = model_of(files)
    pairs = model.get("vocab")
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise TokenizerError(
            f"The vocabulary in {str(files.folder / 'tokenizer.json')!r} is not a list of pieces and scores",
            next="Download the file again.",
        )
    added = listed_in_tokenizer(files) | listed_in_settings(files)
    entries = Entries(size or max(len(pairs), *(token_id + 1 for token_id in added), 0))
    for token_id, (text, score) in enumerate(pairs):
        kind = TokenType.UNKNOWN if token_id == model.get("unk_id") else TokenType.NORMAL
        if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", str(text)):
            kind = TokenType.BYTE
        entries.put(token_id, str(text), float(score), kind)
    for token_id, entry in added.items():
        if entries.type_of(token_id) != TokenType.UNKNOWN:
            put_added(entries, token_id, entry)
    document = files.tokenizer or {}
    normalizers = list(components(document.get("normalizer"), "normalizers"))
    charsmap = next((node["precompiled_charsmap"] for node in normalizers if node.get("precompiled_charsmap")), "")
    try:
        table = base64.b64decode(charsmap, validate=True)
    except (binascii.Error, TypeError, ValueError) as exc:
        raise TokenizerError(
            "The normaliser's 'precompiled_charsmap' is not base64", why=str(exc), next="Download the file again."
        ) from exc
    # a Precompiled map of SentencePiece comes with its removal of extra spaces unless the file replaces it by steps
    squeezes = any(node.get("type") == "Replace" and "{2,}" in str(node.get("pattern")) for node in normalizers)
    return dataclasses.replace(
        _sentencepiece_vocabulary(files, config, entries, puts_space_in_front(document)),
        model="t5",
        remove_extra_whitespaces=squeezes or bool(table),
        charsmap=table,
    )


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def _from_byte_level_bpe(files: TokenizerFolder, config: Mapping[str, Any], size: int | None) -> Vocabulary:
    model = model_of(files)
    ids = vocabulary_ids(files, model)
    texts = {token_id: text for text, token_id in ids.items()}
    added = listed_in_tokenizer(files)
    known = set(ids) | {str(entry["content"]) for entry in added.values()}
    for token_id, entry in listed_in_settings(files).items():
        if entry["content"] not in known or ids.get(str(entry["content"])) == token_id:
            added.setdefault(token_id, entry)
    for token_id, text in named_special(files, ids).items():
        added.setdefault(token_id, {"content": text, "special": True, "normalized": False})
    n_known = max([*texts, *added], default=-1) + 1
    n_tokens = size or n_known
    if n_known > n_tokens:
        raise TokenizerError(
            f"The tokenizer of {str(files.folder)!r} has {n_known} tokens, and the model has {n_tokens} rows for them",
            why="Tokens were added without resizing the embedding, or the files belong to different models.",
            next="Use the tokenizer that the model was trained with.",
        )
    entries = Entries(n_tokens)
    for token_id, text in texts.items():
        entries.put(token_id, text, 0.0, TokenType.NORMAL)
    for token_id, entry in added.items():
        text = str(entry["content"])
        if not entry.get("normalized", not entry.get("special")):
            text = decode_byte_level(text)
        is_control = bool(entry.get("special")) or looks_special(text)
        kind = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
        entries.put(token_id, text if is_control else text.replace("▁", " "), 0.0, kind)
    return Vocabulary(
        model="gpt2",
        pre=detect_pretokenizer(files.tokenizer or {}),
        tokens=tuple(entries.tokens),
        types=tuple(entries.types),
        scores=None,
        merges=tuple(" ".join(pair) for pair in merge_lines(files.folder, model.get("merges"))),
        special=read_special_tokens(files, config),
    )


def _repeated(tokens: tuple[str, ...]) -> TokenizerError:
    seen: dict[str, int] = {}
    for token_id, text in enumerate(tokens):
        if text in seen:
            return TokenizerError(
                f"The token {text!r} has two ids, {seen[text]} and {token_id}",
                why="llama.cpp refuses a vocabulary in which two tokens have the same text.",
                next="Rename one of them in tokenizer.json.",
            )
        seen[text] = token_id
    return TokenizerError("A token has two ids", next="Check tokenizer.json.")


def _finish_for_family(
    vocabulary: Vocabulary, files: TokenizerFolder, config: Mapping[str, Any], family: str
) -> Vocabulary:
    """What the converter's classes for single families add."""
    special = vocabulary.special
    prefix = vocabulary.add_space_prefix
    late: tuple[tuple[str, int], ...] = ()
    if family in _LLAMA_FAMILIES:
        stated = files.settings.get("add_prefix_space")
        if isinstance(stated, bool):
            prefix = stated
        if config.get("vocab_size") == 32016:  # Code Llama; its fill-in-the-middle ids have no key any more
            late = (("eot", 32010),)
        if config.get("vocab_size") == 49152:  # Granite's small models
            special = _with_flag(special, "bos", False)
    elif family in _GEMMA_FAMILIES and vocabulary.model == "llama":
        prefix = False
        if family == "gemma" and special.id_of("eot") is None and len(vocabulary.tokens) > 107:
            late = (("eot", 107),)
    if vocabulary.model == "gpt2":
        row = find_pretokenizer(vocabulary.pre)
        if row is not None and row.adds_bos and special.id_of("bos") is None and "bos" not in dict(special.adds):
            special = _with_flag(special, "bos", False)
    return dataclasses.replace(
        vocabulary,
        special=special,
        add_space_prefix=prefix,
        is_prefix_first=family in _LLAMA_FAMILIES and vocabulary.model != "t5",
        late_ids=late,
    )


def _with_flag(special: SpecialTokens, role: str, value: bool) -> SpecialTokens:
    return dataclasses.replace(special, adds=tuple((dict(special.adds) | {role: value}).items()))
