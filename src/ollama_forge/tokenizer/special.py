"""Which token begins, ends, pads: the special ids, the `add_*` flags and the templates that a GGUF states.

In: a `TokenizerFolder` and `config.json`. Out: `SpecialTokens`, equal to what llama.cpp's converter derives from the
same files (`gguf-py/gguf/vocab.py`, class SpecialVocab), in the order in which it writes them. One thing is read
better: a token that `tokenizer_config.json` spells as an object counts as its `content` everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import TokenizerError
from ollama_forge.tokenizer.folder import TokenizerFolder, is_token_id, token_text

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_WITHOUT_KEY = frozenset({"cls"})  # GGUF has no key for it


@dataclass(frozen=True)
class SpecialTokens:
    """Roles in the converter's order.

    Attributes:
        ids: (role, token id) for `bos`, `eos`, `unk`, `sep`, `pad`, `mask`, `eot`, `eom`.
        adds: (role, whether the engine puts that token around a text) for `bos`, `eos`, `sep`.
        templates: (name, source), the main one under `default`.
        lowercase, strip_accents: the normaliser's flags, None when it does not say.
        stop_ids: every id that `generation_config.json` and `config.json` call an end; not part of a GGUF.
    """

    ids: tuple[tuple[str, int], ...]
    adds: tuple[tuple[str, bool], ...]
    templates: tuple[tuple[str, str], ...]
    lowercase: bool | None
    strip_accents: bool | None
    stop_ids: tuple[int, ...]

    def id_of(self, role: str) -> int | None:
        return dict(self.ids).get(role)


def read_special_tokens(
    files: TokenizerFolder, config: Mapping[str, Any], n_tokens: int | None = None
) -> SpecialTokens:
    """Derive the special tokens.

    Args:
        files: the tokenizer's files.
        config: `config.json`, for ids that the tokenizer's files do not give.
        n_tokens: ids from there on are ignored; None for no limit.

    Raises:
        TokenizerError: a negative id, or a template of a wrong type.
    """
    roles = list(ROLES)
    named = {role: token_text(files.settings.get(f"{role}_token")) for role in roles}
    adds: dict[str, bool] = {}
    if files.tokenizer:
        named["bos"] = named["bos"] or named["cls"]
        named["eos"] = named["eos"] or named["sep"]
        for processor in _processors(files.tokenizer.get("post_processor")):
            if processor.get("type") == "RobertaProcessing":
                adds |= {"bos": True, "eos": True, "sep": True}
                named["cls"] = named["cls"] or _first_text(processor.get("cls")) or named["bos"]
                named["sep"] = named["sep"] or _first_text(processor.get("sep")) or named["eos"]
            elif processor.get("type") == "TemplateProcessing":
                _read_template_processing(processor, bool(files.settings), named, adds, roles)
    ids: dict[str, int] = {}
    if files.settings:
        added = _added_ids(files.tokenizer)
        for role in roles:
            flag = files.settings.get(f"add_{role}_token")
            if isinstance(flag, bool):
                adds[role] = flag
            text = named.get(role)
            if text is not None and text in added:
                _claim(ids, role, added[text], n_tokens)
    text_config = config.get("text_config")
    for role in roles:
        value = config.get(f"{role}_token_id")
        if value is None and isinstance(text_config, Mapping):
            value = text_config.get(f"{role}_token_id")
        _claim(ids, role, value, n_tokens)
    lowercase, strip_accents = _normalizer_flags(files.tokenizer)
    return SpecialTokens(
        ids=tuple((role, token_id) for role, token_id in ids.items() if role not in _WITHOUT_KEY),
        adds=tuple((role, value) for role, value in adds.items() if role in ("bos", "eos", "sep")),
        templates=read_templates(files),
        lowercase=lowercase,
        strip_accents=strip_accents,
        stop_ids=_stop_ids(files, config),
    )


def read_templates(files: TokenizerFolder) -> tuple[tuple[str, str], ...]:
    """The chat templates as (name, source): those of `tokenizer_config.json`, else those in files of their own.

    Raises:
        TokenizerError: the key is there and is neither text nor a list of named templates.
    """
    if "chat_template" not in files.settings:
        return files.template
    value = files.settings["chat_template"]
    if value is None:
        return ()
    if isinstance(value, str):
        return (("default", value),)
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value]
        return tuple((name, text) for name, text in pairs if isinstance(name, str) and isinstance(text, str) and name)
    raise TokenizerError(
        f"'chat_template' in {str(files.folder / 'tokenizer_config.json')!r} is a {type(value).__name__}",
        why="It must be text, or a list of objects with 'name' and 'template'.",
        next="Mend the file, or delete the key to convert without a template.",
    )


def _claim(ids: dict[str, int], role: str, value: Any, n_tokens: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or role in ids:
        return
    if value < 0:
        raise TokenizerError(
            f"The {role} token has the id {value}", why="Ids start at 0.", next=f"Mend {role}_token_id in config.json."
        )
    if is_token_id(value) and (n_tokens is None or value < n_tokens):
        ids[role] = value


def _processors(post_processor: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(post_processor, Mapping):
        return ()
    members = post_processor.get("processors", [post_processor])
    return [member for member in members if isinstance(member, Mapping)] if isinstance(members, list) else ()


def _first_text(pair: Any) -> str | None:
    return pair[0] if isinstance(pair, list) and pair and isinstance(pair[0], str) else None


def _part(entry: Any, kind: str) -> str | None:
    inner = entry.get(kind) if isinstance(entry, Mapping) else None
    value = inner.get("id") if isinstance(inner, Mapping) else None
    return value if isinstance(value, str) else None


def _read_template_processing(
    processor: Mapping[str, Any],
    has_settings: bool,
    named: dict[str, str | None],
    adds: dict[str, bool],
    roles: list[str],
) -> None:
    """What the simple form `[BOS] A [EOS]` and the pair form `A [SEP] B` say about tokens that are added."""
    single = processor.get("single")
    first = last = None
    if isinstance(single, list) and len(single) > 1:
        if first := _part(single[0], "SpecialToken"):
            if first not in (named["bos"], named["cls"]):
                named["bos"] = first if not has_settings else named["bos"] or first
                if has_settings:
                    named["cls"] = named["cls"] or first
            adds["bos"] = first in (named["bos"], named["cls"])
        if last := _part(single[-1], "SpecialToken"):
            if last != named["eos"] and has_settings:
                _demote_eos(named, roles)
            named["eos"] = last
            adds["eos"] = True
    _read_pair(processor.get("pair"), first, last, has_settings, named, adds)


def _demote_eos(named: dict[str, str | None], roles: list[str]) -> None:
    for role in ("eot", "eom"):
        if role not in roles:
            roles.append(role)
            named[role] = named["eos"]
            return


def _read_pair(
    pair: Any,
    first: str | None,
    last: str | None,
    has_settings: bool,
    named: dict[str, str | None],
    adds: dict[str, bool],
) -> None:
    if not isinstance(pair, list) or not pair:
        return
    start = 1 if first and _part(pair[0], "SpecialToken") == first else 0
    stop = -1 if last and _part(pair[-1], "SpecialToken") == last else None
    parts = pair[start:stop]
    if not parts or _part(parts[0], "Sequence") != "A" or _part(parts[-1], "Sequence") != "B" or len(parts) < 3:
        return
    between = [_part(entry, "SpecialToken") for entry in parts[1:-1]]
    ends = (named["sep"], named["eos"])
    adds["sep"] = bool(between[0] and between[0] in ends and not last)
    if len(between) == 2 and between[1] and between[1] in ends:
        adds["sep"] = True
    if adds["sep"] and not named["sep"] and has_settings:
        named["sep"] = named["eos"]


def _added_ids(tokenizer: Mapping[str, Any] | None) -> dict[str, int]:
    entries = (tokenizer or {}).get("added_tokens")
    found: dict[str, int] = {}
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), str) and is_token_id(entry.get("id")):
            found.setdefault(entry["content"], entry["id"])
    return found


def _normalizer_flags(tokenizer: Mapping[str, Any] | None) -> tuple[bool | None, bool | None]:
    lowercase = strip_accents = None
    waiting = [(tokenizer or {}).get("normalizer")]
    while waiting:
        node = waiting.pop(0)
        if not isinstance(node, Mapping):
            continue
        kind = node.get("type")
        if kind == "Lowercase":
            lowercase = True
        elif kind == "StripAccents":
            strip_accents = True
        elif kind == "BertNormalizer":
            lowercase = node.get("lowercase", lowercase)
            strip_accents = node.get("strip_accents", strip_accents)
        elif kind == "Sequence" and isinstance(node.get("normalizers"), list):
            waiting = [*node["normalizers"], *waiting]
    return lowercase, strip_accents


def _stop_ids(files: TokenizerFolder, config: Mapping[str, Any]) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for source in (files.generation, config):
        value = source.get("eos_token_id")
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and is_token_id(token_id):
                found[token_id] = None
    return tuple(found)
