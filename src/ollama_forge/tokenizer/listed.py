"""What the tokenizer's files list: the model's own tokens, the added ones, the ones named for a role.

In: a `TokenizerFolder`. Out: ids with their texts or entries, checked; every reader of a vocabulary asks here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.entries import Entries, TokenType, looks_special
from ollama_forge.tokenizer.folder import TokenizerFolder, is_token_id, token_text

MAX_TOKENS = 4_000_000
ADDED_SCORE = -1000.0


def model_of(files: TokenizerFolder) -> Mapping[str, Any]:
    model = (files.tokenizer or {}).get("model")
    if not isinstance(model, Mapping):
        raise TokenizerError(
            f"{str(files.folder / 'tokenizer.json')!r} has no 'model'", next="Download the file again."
        )
    # files of before 2021 do not name the type of BPE
    return model if "type" in model else {"type": "BPE" if "merges" in model else None, **model}


def vocabulary_ids(files: TokenizerFolder, model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, Mapping) or not all(is_token_id(token_id) for token_id in vocabulary.values()):
        raise TokenizerError(
            f"The vocabulary in {str(files.folder / 'tokenizer.json')!r} is not a map from texts to ids",
            next="Download the file again.",
        )
    if any(token_id >= MAX_TOKENS for token_id in vocabulary.values()):
        raise TokenizerError(
            f"The vocabulary in {str(files.folder / 'tokenizer.json')!r} has an id of {max(vocabulary.values())}",
            why=f"Ids up to {MAX_TOKENS:,} are allowed.",
            next="Download the file again.",
        )
    return dict(vocabulary)


def listed_in_settings(files: TokenizerFolder) -> dict[int, Mapping[str, Any]]:
    """`added_tokens_decoder` of `tokenizer_config.json`, by id."""
    listed = files.settings.get("added_tokens_decoder")
    found: dict[int, Mapping[str, Any]] = {}
    for key, entry in listed.items() if isinstance(listed, Mapping) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and str(key).isdecimal():
            found[int(key)] = entry
    return _within_bounds(found)


def listed_in_tokenizer(files: TokenizerFolder) -> dict[int, Mapping[str, Any]]:
    """`added_tokens` of `tokenizer.json`, by id."""
    listed = (files.tokenizer or {}).get("added_tokens")
    found: dict[int, Mapping[str, Any]] = {}
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and is_token_id(entry.get("id")):
            found[entry["id"]] = entry
    return _within_bounds(found)


def _within_bounds(found: dict[int, Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    if found and max(found) >= MAX_TOKENS:
        raise TokenizerError(
            f"An added token has the id {max(found)}", why=f"Ids up to {MAX_TOKENS:,} are allowed.", next="Mend it."
        )
    return found


def named_special(files: TokenizerFolder, ids: Mapping[str, int]) -> dict[int, str]:
    """Tokens that a configuration file names for a role; they are special even when nothing lists them as added."""
    named: dict[int, str] = {}
    for source in (files.settings, files.special):
        for key, value in source.items():
            if not key.endswith("_token") and key not in ("additional_special_tokens", "extra_special_tokens"):
                continue
            members = value.values() if key == "extra_special_tokens" and isinstance(value, Mapping) else value
            for entry in members if isinstance(members, list) else [members]:
                text = token_text(entry)
                if text is not None and text in ids:
                    named[ids[text]] = text
    return named


def put_added(entries: Entries, token_id: int, entry: Mapping[str, Any], *, keeps_text: bool = False) -> None:
    """An added token over what was there. Phi-3's converter takes names as they are and trusts `special` alone."""
    text = str(entry["content"])
    is_control = bool(entry.get("special")) or (not keeps_text and looks_special(text))
    if not is_control and not keeps_text:
        text = text.replace("▁", " ")
    entries.put(token_id, text, ADDED_SCORE, TokenType.CONTROL if is_control else TokenType.USER_DEFINED)


def components(node: Any, children: str) -> list[Mapping[str, Any]]:
    if not isinstance(node, Mapping):
        return []
    members = node.get(children)
    if node.get("type") == "Sequence" and isinstance(members, list):
        return [inner for member in members for inner in components(member, children)]
    return [node]


def puts_space_in_front(document: Mapping[str, Any]) -> bool:
    for node in components(document.get("normalizer"), "normalizers"):
        if node.get("type") == "Prepend":
            return True
    for node in components(document.get("pre_tokenizer"), "pretokenizers"):
        if node.get("type") == "Metaspace":
            return node.get("prepend_scheme", "always") != "never" and node.get("add_prefix_space", True) is not False
    return False
