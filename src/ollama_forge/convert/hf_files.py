"""The small files beside the weights of a Hugging Face folder: configuration, generation settings, model card.

In: a configuration as `arch.config` makes it from GGUF, and the GGUF's metadata. Out: bytes by file name. Positions are
spelled as transformers 4 does (`rope_theta` and `rope_scaling`), which version 5 reads too. What the card says is what
`convert.card` reads back into `general.*`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ollama_forge.arch.rows import Family
from ollama_forge.convert.card import CARD_KEYS, HUB_URL, LINEAGE, LINEAGE_KEYS, LISTS, SAMPLING, parse_lineage

_SAMPLES = ("temp", "top_k", "top_p", "min_p")
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def render_config(config: Mapping[str, Any], family: Family, dtype: str) -> bytes:
    """config.json, readable by transformers 4 and 5.

    Args:
        config: as `arch.config.config_from_gguf` makes it.
        dtype: of most weights: `F32`, `F16` or `BF16`.
    """
    result = {**config, "torch_dtype": _TORCH_NAMES[dtype]}
    rope = result.pop("rope_parameters", None)
    if isinstance(rope, Mapping):
        if family.rope_by_layer_type:
            result["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        result |= _spell_positions(dict(rope))
    return _render_json(_shorten(result))


def render_generation(metadata: Mapping[str, Any]) -> bytes:
    """generation_config.json: every token that ends an answer, and the sampling that the model's makers advise."""
    ids = {
        role: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("eom", "eom"), ("pad", "padding"))
    }
    ends = list(dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if ids[role] is not None))
    result: dict[str, Any] = {f"{role}_token_id": ids[role] for role in ("bos", "pad") if ids[role] is not None}
    if ends:
        result["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for key, (name, _) in SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is not None:
            result[name] = value
            result |= {"do_sample": True} if key in _SAMPLES else {}
    return _render_json(_shorten(result))


def render_card(metadata: Mapping[str, Any], origin: str) -> bytes:
    """README.md: what `general.*` says, as a model card.

    Args:
        origin: what the weights were, such as `Q4_K_M`.
    """
    front: dict[str, Any] = {}
    for key, names in CARD_KEYS.items():
        value = metadata.get(f"general.{key}")
        if names and value is not None:
            front[names[-1] if key in ("license.name", "license.link") else names[0]] = value
    repository = metadata.get("general.source.huggingface.repository")
    if isinstance(repository, str):
        front.setdefault("repo_url", f"https://huggingface.co/{repository}")
    for key, names in LISTS.items():
        words = metadata.get(f"general.{key}")
        if words is not None and not isinstance(words, str):
            front[names[-1] if key == "languages" else names[0]] = [str(word) for word in words]
    for kind, names in LINEAGE.items():
        entries = _lineage(metadata, kind)
        if entries:
            front[names[0]] = entries
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, default_flow_style=False) if front else ""
    title = str(metadata.get("general.name") or "Model").replace("\n", " ")
    head = f"---\n{text}---\n\n" if text else ""
    body = f"# {title}\n\nMade from a GGUF file ({origin}) with `ollama-forge export --format hf`.\n"
    return (head + body).encode("utf-8", "replace")


def _lineage(metadata: Mapping[str, Any], kind: str) -> list[Any]:
    """Base models or data sets: by their repository's name where that says all, as the Hub spells them."""
    count = metadata.get(f"general.{kind}.count")
    entries: list[Any] = []
    for number in range(count if isinstance(count, int) and 0 < count <= 1000 else 0):
        keys = {key: metadata.get(f"general.{kind}.{number}.{key}") for key in LINEAGE_KEYS}
        entry = {key: value for key, value in keys.items() if value is not None}
        repository = HUB_URL.fullmatch(str(entry.get("repo_url", "")))
        if repository and {**parse_lineage(repository[1], 0)} == entry:
            entries.append(repository[1])
        else:
            entries.append(entry)
    return entries


def _spell_positions(rope: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {"rope_theta": rope.pop("rope_theta")}
    if (partial := rope.pop("partial_rotary_factor", None)) is not None:
        result["partial_rotary_factor"] = partial
    kind = rope.get("rope_type", "default")
    if kind == "default":
        result["rope_scaling"] = None
    elif kind == "longrope":  # Phi's configuration takes these three keys and no other
        result["rope_scaling"] = {"type": kind, **{key: rope[key] for key in ("short_factor", "long_factor")}}
    else:
        result["rope_scaling"] = rope
    return result


def _shorten(value: Any) -> Any:
    """Numbers that were float32 in the GGUF, in the fewest digits that still mean them: 1e-05, not 9.99999974e-06."""
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_shorten(item) for item in value]
    if not isinstance(value, float) or value != value or abs(value) > 3.4e38:
        return value
    if _float32(value) != value:
        return value
    return next(short for digits in range(1, 18) if _float32(short := float(f"{value:.{digits}g}")) == value)


def _float32(value: float) -> float:
    if abs(value) > 3.4e38:
        return value
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _render_json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True).encode("utf-8", "replace") + b"\n"
