"""The tokenizer of a GGUF as the files of a Hugging Face folder.

In: the `tokenizer.*` keys of a GGUF. Out: `tokenizer.json`, `tokenizer_config.json`, chat templates, and for
SentencePiece a `tokenizer.model`, as bytes by file name. transformers reads them without any code of the model, gives
the ids that the engine gives for the GGUF, and `tokenizer.vocab` reads the same vocabulary back.

A GGUF does not say how a text was normalized before; llama.cpp does not normalize, so neither does the tokenizer here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.byte_level import decode_byte_level
from ollama_forge.tokenizer.encode import GGUFTokenizer, build_tokenizer
from ollama_forge.tokenizer.entries import TokenType
from ollama_forge.tokenizer.listed import ADDED_SCORE
from ollama_forge.tokenizer.merges import merges_from_scores
from ollama_forge.tokenizer.pretokenizer import detect_pretokenizer, find_pretokenizer, llama_patterns
from ollama_forge.tokenizer.score_merge import SPACE
from ollama_forge.tokenizer.spm_model import Piece
from ollama_forge.tokenizer.spm_writer import render_sentencepiece

ROLE_KEYS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",
    "pad": "padding",
    "mask": "mask",
}
_TEMPLATE_KEY = "tokenizer.chat_template"
_SAFE_NAME = re.compile(r"[0-9A-Za-z_]{1,64}")
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class TokenizerFiles:
    """What goes into the folder.

    Attributes:
        files: content by name (with a folder in front for templates that have a name of their own).
        warnings: what a Hugging Face tokenizer cannot say; one sentence each.
    """

    files: Mapping[str, bytes]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """The keys of a GGUF's tokenizer, read."""

    metadata: Mapping[str, Any]
    built: GGUFTokenizer
    types: tuple[int, ...]

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.built.tokens

    @property
    def has_prefix(self) -> bool:
        """Whether SentencePiece puts a space in front."""
        return bool(self.metadata.get("tokenizer.ggml.add_space_prefix", True))

    def role_id(self, role: str) -> int | None:
        found = self.metadata.get(f"tokenizer.ggml.{ROLE_KEYS[role]}_token_id")
        return found if isinstance(found, int) and 0 <= found < len(self.tokens) else None

    def is_padding(self, token_id: int) -> bool:
        """Whether the slot is only there because the embedding has more rows than the tokenizer has tokens."""
        return self.types[token_id] == TokenType.UNUSED and self.tokens[token_id] == f"[PAD{token_id}]"


def plan_tokenizer_files(metadata: Mapping[str, Any], context_length: int | None = None) -> TokenizerFiles:
    """Make the files.

    Args:
        metadata: of an open GGUF, or fields by key.
        context_length: tokens; what `model_max_length` says.

    Raises:
        TokenizerError: the keys are missing or disagree, or the tokenizer is neither byte-level BPE nor SentencePiece.
    """
    built = build_tokenizer(metadata)
    types = tuple(int(kind) for kind in metadata.get("tokenizer.ggml.token_type") or ())
    source = _Source(metadata, built, types or (int(TokenType.NORMAL),) * len(built.tokens))
    document = _tokenizer_document(source)
    warnings = _set_splits(document, source) if built.kind == "gpt2" else _set_merges(document, source)
    files = {"tokenizer.json": _render(document)}
    settings = _settings(source, document, context_length)
    templates, template_warnings = _template_files(metadata, settings)
    files |= {"tokenizer_config.json": _render(settings)}
    if built.kind == "llama":
        files["tokenizer.model"] = _sentencepiece(source)
    return TokenizerFiles(files | templates, (*warnings, *template_warnings))


def _tokenizer_document(source: _Source) -> dict[str, Any]:
    built = source.built
    document: dict[str, Any] = json.loads(built.tokenizer.to_str())
    vocabulary = document["model"]["vocab"]
    for token_id, text in enumerate(source.tokens):
        if source.is_padding(token_id):
            del vocabulary[text]
    for token in document["added_tokens"]:
        kind = source.types[token["id"]]
        if kind == TokenType.USER_DEFINED:
            token["special"] = False
        # a reader of the file takes a token that is not normalized for its bytes' spelling where it can
        token["normalized"] = built.kind == "gpt2" and decode_byte_level(token["content"]) != token["content"]
    unknown = source.role_id("unk")
    if built.kind == "llama" and unknown is not None:
        document["model"]["unk_token"] = source.tokens[unknown]
    document["decoder"] = _decoder(source)
    document["post_processor"] = _post_processor(source)
    return document


def _decoder(source: _Source) -> dict[str, Any]:
    if source.built.kind == "gpt2":
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    steps: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if source.has_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(source: _Source) -> dict[str, Any] | None:
    """The tokens that go around a text. The pair form is the plainest, from which readers conclude nothing more."""
    built = source.built
    first = built.bos_id if built.adds_bos else None
    last = built.eos_id if built.adds_eos else None
    template = None
    if first is not None or last is not None:
        before = [] if first is None else [_special_part(built.tokens[first])]
        after = [] if last is None else [_special_part(built.tokens[last])]
        text, other = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        names = {built.tokens[token_id]: token_id for token_id in (first, last) if token_id is not None}
        template = {
            "type": "TemplateProcessing",
            "single": [*before, text, *after],
            "pair": [*before, text, other, *after],
            "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in names.items()},
        }
    if built.kind != "gpt2":
        return template
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return bytes_step if template is None else {"type": "Sequence", "processors": [bytes_step, template]}


def _special_part(text: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": text, "type_id": 0}}


def _set_splits(document: dict[str, Any], source: _Source) -> list[str]:
    """Write the pre-tokenizer so that its name can be read back, with llama.cpp's own splits where that works."""
    row = find_pretokenizer(source.built.pre)
    assert row is not None  # the tokenizer was built with it
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    for splits in (llama_patterns(row), row.splits):
        steps = [_split_step(split) for split in splits]
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, bytes_step]}
        if _detected(document) == row.name:
            break
    else:
        steps = [_split_step(split) for split in llama_patterns(row)]
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, bytes_step]}
        return [f"The pre-tokenizer {row.name!r} cannot be told from the folder, so it does not convert back to GGUF."]
    if row.llama_splits is not None:
        return [f"llama.cpp splits text for {row.name!r} a little differently than the model's own tokenizer does."]
    return []


def _set_merges(document: dict[str, Any], source: _Source) -> list[str]:
    """Scores as merges; where scores repeat, no order of merges says quite the same."""
    document["normalizer"] = _replace(" ", SPACE)
    if source.has_prefix:
        steps = [{"type": "Prepend", "prepend": SPACE}, document["normalizer"]]
        document["normalizer"] = {"type": "Sequence", "normalizers": steps}
    model = document["model"]
    merges = [(str(left), str(right)) for left, right in model["merges"]]
    warnings = []
    if not merges:
        values = list(source.metadata.get("tokenizer.ggml.scores") or ()) or [0.0] * len(source.tokens)
        added = {token["content"] for token in document["added_tokens"]}
        # text is cut at added tokens before anything is merged, so no merge ever makes one
        scores = {text: score for text, score in zip(source.tokens, values, strict=False) if text not in added}
        merges = list(merges_from_scores(scores))
        order = [scores[piece] for piece in dict.fromkeys(left + right for left, right in merges)]
        if any(first == second for first, second in pairwise(order)):
            warnings.append(
                "Several tokens have the same score. llama.cpp joins the leftmost of them first, which tokenizer.json "
                "cannot say: some texts get other ids there. tokenizer.model holds the scores themselves."
            )
    # one string for each is what all versions of the tokenizers library read
    has_blanks = any(" " in part for pair in merges for part in pair)
    model["merges"] = merges if has_blanks else [" ".join(pair) for pair in merges]
    model |= {"byte_fallback": True, "fuse_unk": True}
    return warnings


def _replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def _split_step(split: str) -> dict[str, Any]:
    kind, _, behavior = split.partition(":")
    if kind == "punctuation":
        return {"type": "Punctuation", "behavior": behavior.capitalize()}
    return {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}


def _detected(document: Mapping[str, Any]) -> str | None:
    try:
        return detect_pretokenizer(document)
    except TokenizerError:
        return None


def _settings(source: _Source, document: Mapping[str, Any], context_length: int | None) -> dict[str, Any]:
    """tokenizer_config.json. Tokens are named for a role only where they are special already."""
    added = {token["id"]: token for token in document["added_tokens"]}
    scores = list(source.metadata.get("tokenizer.ggml.scores") or ())
    decoder = {}
    for token_id, token in sorted(added.items()):
        is_listed = not scores or scores[token_id] == ADDED_SCORE or source.types[token_id] == TokenType.USER_DEFINED
        if is_listed:
            decoder[str(token_id)] = {flag: token[flag] for flag in _FLAGS}
    settings: dict[str, Any] = {"added_tokens_decoder": decoder}
    for role in ("bos", "eos", "sep"):
        flag = source.metadata.get(f"tokenizer.ggml.add_{role}_token")
        if isinstance(flag, bool):
            settings[f"add_{role}_token"] = flag
    if source.built.kind == "llama" and isinstance(
        prefix := source.metadata.get("tokenizer.ggml.add_space_prefix"), bool
    ):
        settings["add_prefix_space"] = prefix
    for role in ROLE_KEYS:
        token_id = source.role_id(role)
        if token_id is None and role in ("bos", "eos") and getattr(source.built, f"adds_{role}"):
            token_id = getattr(source.built, f"{role}_id")
        if token_id in added:
            settings[f"{role}_token"] = added[token_id]["content"]
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if context_length is not None:
        settings["model_max_length"] = context_length
    return dict(sorted(settings.items()))


def _template_files(metadata: Mapping[str, Any], settings: dict[str, Any]) -> tuple[dict[str, bytes], list[str]]:
    """Templates in files of their own, as transformers writes them; line ends other than \\n survive only in JSON."""
    files: dict[str, bytes] = {}
    warnings = []
    named = {
        key.removeprefix(f"{_TEMPLATE_KEY}."): text
        for key in metadata
        if key.startswith(f"{_TEMPLATE_KEY}.") and isinstance(text := metadata[key], str)
    }
    main = metadata.get(_TEMPLATE_KEY)
    for name, text in named.items():
        if not isinstance(main, str) or not _SAFE_NAME.fullmatch(name):
            warnings.append(f"The chat template {name[:40]!r} was left out: its name cannot be one of a file.")
            continue
        files[f"additional_chat_templates/{name}.jinja"] = text.encode("utf-8", "replace")
    if isinstance(main, str):
        if "\r" in main and not files:
            settings["chat_template"] = main
        else:
            files["chat_template.jinja"] = main.encode("utf-8", "replace")
    return files, warnings


def _sentencepiece(source: _Source) -> bytes:
    scores = list(source.metadata.get("tokenizer.ggml.scores") or ()) or [0.0] * len(source.tokens)
    unknown = source.role_id("unk")
    pieces = []
    for token_id, text in enumerate(source.tokens):
        kind = TokenType.NORMAL
        if source.types[token_id] in TokenType.__members__.values():
            kind = TokenType(source.types[token_id])
        if token_id == unknown:
            kind = TokenType.UNKNOWN  # a model without exactly one is refused by SentencePiece
        elif kind is TokenType.UNKNOWN and unknown is not None:
            kind = TokenType.CONTROL
        spelled = text.replace(" ", SPACE) if kind is TokenType.USER_DEFINED else text
        pieces.append(Piece(spelled, float(scores[token_id]), kind))
    while len(pieces) > 1 and source.is_padding(len(pieces) - 1):
        pieces.pop()
    roles = {role: found for role in ("unk", "bos", "eos", "pad") if (found := source.role_id(role)) is not None}
    return render_sentencepiece(pieces, roles, adds_dummy_prefix=source.has_prefix)


def _render(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=2).encode("utf-8", "replace") + b"\n"
