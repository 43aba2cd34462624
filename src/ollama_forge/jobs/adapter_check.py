"""Whether an adapter belongs to a base model: one verdict for each thing that decides it, each with what was seen.

In: a path as typed, and a base on this disk. Out: an `AdapterReport`. Nothing is written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ollama_forge.arch.families import HF_ARCHITECTURES, load_family
from ollama_forge.errors import AdapterError
from ollama_forge.jobs.adapters import base_path, require_numbers
from ollama_forge.jobs.resolve import ResolvedModel
from ollama_forge.transform.lora_gguf import require_expressible
from ollama_forge.weights.adapter import Adapter, AdapterKind, open_adapter
from ollama_forge.weights.adapter_base import LoraBase, describe_base
from ollama_forge.weights.adapter_fit import FittedAdapter, Misfit, try_fit

OK, DIFFERS, UNKNOWN = "ok", "differs", "unknown"
_MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True)
class Verdict:
    """One thing that was looked at.

    Attributes:
        name: `family`, `targets`, `shapes`, `rank`, `numbers`, `form`, `tokenizer`, `base name`.
        state: `ok`, `differs` or `unknown`.
        evidence: what was seen.
        is_fatal: with `differs`, the adapter cannot be used on this base.
    """

    name: str
    state: str
    adapter: str
    base: str
    evidence: str
    is_fatal: bool = False

    def document(self) -> dict[str, str]:
        """The JSON form."""
        return {
            "name": self.name,
            "state": self.state,
            "adapter": self.adapter,
            "base": self.base,
            "evidence": self.evidence,
        }


@dataclass(frozen=True)
class AdapterReport:
    """Whether an adapter fits a base, and why."""

    path: Path
    kind: str
    base: str
    verdicts: tuple[Verdict, ...]

    @property
    def fits(self) -> bool:
        return not any(verdict.is_fatal and verdict.state == DIFFERS for verdict in self.verdicts)

    @property
    def needs_merge(self) -> bool:
        """Whether it fits, but not as an adapter layer."""
        return any(verdict.name == "form" and verdict.state == DIFFERS for verdict in self.verdicts)

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "adapter": str(self.path),
            "kind": self.kind,
            "base": self.base,
            "fits": self.fits,
            "needs_merge": self.needs_merge,
            "verdicts": [verdict.document() for verdict in self.verdicts],
        }


def check_adapter(path: Path, base: ResolvedModel) -> AdapterReport:
    """Look at everything that decides whether an adapter belongs to a base.

    Raises:
        AdapterError: the adapter itself is broken; the tensor or setting is named.
        NotFoundError, GGUFError, SafetensorsError, UnsafeFileError: as the readers say.
    """
    described = describe_base(base_path(base))
    with open_adapter(path) as adapter:
        fitted, misfits = try_fit(adapter, described)
        verdicts = (
            _judge_family(adapter, described, misfits),
            _judge_places(adapter, described, misfits, "target", "targets"),
            _judge_places(adapter, described, misfits, "shape", "shapes"),
            _judge_rank(adapter),
            _judge_numbers(adapter),
            _judge_form(fitted, misfits),
            _judge_tokenizer(adapter, described),
            _judge_name(adapter, described, base),
        )
        named = tuple(replace(one, base=base.text) if one.base == described.name else one for one in verdicts)
        return AdapterReport(adapter.path, adapter.kind.value, base.text, named)


def _judge_family(adapter: Adapter, base: LoraBase, misfits: tuple[Misfit, ...]) -> Verdict:
    if adapter.architecture is not None:
        state = OK if adapter.architecture == base.architecture else DIFFERS
        evidence = "general.architecture of both files"
        return Verdict("family", state, adapter.architecture, base.architecture, evidence, is_fatal=True)
    if adapter.base_class is not None:
        module = HF_ARCHITECTURES.get(adapter.base_class)
        if module is not None:
            own = load_family(module).gguf_architecture
            state = OK if own == base.architecture else DIFFERS
            return Verdict("family", state, own, base.architecture, "base_model_class in auto_mapping", is_fatal=True)
    if any(misfit.kind in ("family", "target") for misfit in misfits):
        return Verdict("family", UNKNOWN, "", base.architecture, "the adapter names none, and targets are missing")
    evidence = f"its {len(adapter.pairs)} targets are named as in this family"
    return Verdict("family", OK, base.architecture, base.architecture, evidence)


def _judge_places(adapter: Adapter, base: LoraBase, misfits: tuple[Misfit, ...], kind: str, name: str) -> Verdict:
    found = [misfit for misfit in misfits if misfit.kind == kind]
    total = len(adapter.pairs) + len(adapter.replacements)
    mine = f"{total} tensors"
    if found:
        first = found[0]
        evidence = f"{len(found)} of {total}: {first.what}. {first.why}"
        return Verdict(name, DIFFERS, mine, base.name, evidence, is_fatal=True)
    if base.shapes is None:
        evidence = "only the base's configuration is here, not its weights"
        return Verdict(name, UNKNOWN if kind == "shape" else OK, mine, base.name, evidence, is_fatal=True)
    blocked = any(misfit.kind == "target" for misfit in misfits)
    if kind == "shape" and blocked:
        return Verdict(name, UNKNOWN, mine, base.name, "tensors without a home have no shape to compare", is_fatal=True)
    return Verdict(name, OK, mine, base.name, "every one was compared with the base's own", is_fatal=True)


def _judge_rank(adapter: Adapter) -> Verdict:
    if not adapter.pairs:
        return Verdict("rank", UNKNOWN, "", "", "it has no pair of matrices")
    ranks = ", ".join(str(rank) for rank in adapter.ranks)
    scales = sorted({round(pair.scale, 6) for pair in adapter.pairs})
    words = "alpha / root of rank" if adapter.is_rank_stabilized else "alpha / rank"
    evidence = f"scale {', '.join(f'{scale:g}' for scale in scales[:4])} ({words})"
    too_large = next((pair for pair in adapter.pairs if pair.rank > min(pair.shape[-2:])), None)
    if too_large is not None:
        evidence += f"; {too_large.target!r} has no more than {min(too_large.shape[-2:])}, so a smaller rank would do"
    return Verdict("rank", OK, ranks, "", evidence)


def _judge_numbers(adapter: Adapter) -> Verdict:
    try:
        largest = require_numbers(adapter)
    except AdapterError as exc:
        return Verdict("numbers", DIFFERS, "", "", exc.what, is_fatal=True)
    if adapter.pairs and not largest and not adapter.replacements:
        return Verdict("numbers", DIFFERS, "", "", "every matrix B is zero: the adapter changes nothing")
    return Verdict("numbers", OK, "", "", f"all are finite; the largest in a matrix B is {largest:.3g}")


def _judge_form(fitted: FittedAdapter, misfits: tuple[Misfit, ...]) -> Verdict:
    if misfits:
        return Verdict("form", UNKNOWN, "", "", "it does not fit, so this was not looked at")
    try:
        require_expressible(replace(fitted, base_copies=()))
    except AdapterError as exc:
        return Verdict("form", DIFFERS, "", "", f"it can only be merged: {exc.what}. {exc.why}")
    return Verdict("form", OK, "", "", "it can be an adapter layer, or be merged")


def _judge_tokenizer(adapter: Adapter, base: LoraBase) -> Verdict:
    has = f"{base.n_tokens:,} tokens" if base.n_tokens is not None else ""
    count = _count_tokens(adapter.path) if adapter.kind is AdapterKind.PEFT else None
    if count is None or base.n_tokens is None:
        return Verdict("tokenizer", UNKNOWN, "", has, "the adapter brings no tokenizer.json")
    # Rows beyond the tokenizer are common in a base; tokens beyond the base's rows cannot be.
    state = OK if count <= base.n_tokens else DIFFERS
    evidence = "tokens in the adapter's tokenizer.json"
    if state == DIFFERS:
        evidence += "; the base has no rows for the new ones"
    return Verdict("tokenizer", state, f"{count:,} tokens", has, evidence)


def _count_tokens(folder: Path) -> int | None:
    path = folder / "tokenizer.json"
    try:
        if not path.is_file() or path.stat().st_size > _MAX_TOKENIZER_BYTES:
            return None
        parsed = json.loads(path.read_bytes())
        vocabulary = parsed["model"]["vocab"]
        ids = {token["id"] for token in parsed.get("added_tokens") or ()}
        ids |= set(vocabulary.values()) if isinstance(vocabulary, dict) else set(range(len(vocabulary)))
        return len(ids)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _judge_name(adapter: Adapter, base: LoraBase, model: ResolvedModel) -> Verdict:
    own = list(base.names)
    if model.installed is not None:
        own.append(model.installed.name.display)
    if model.folder is not None:
        own.append(model.folder.resolve().name)
    mine, theirs = ", ".join(adapter.base_names), ", ".join(dict.fromkeys(own))
    if not adapter.base_names or not own:
        return Verdict("base name", UNKNOWN, mine, theirs, "one of them has no name")
    same = {_plain_name(name) for name in adapter.base_names} & {_plain_name(name) for name in own}
    state = OK if same else DIFFERS
    return Verdict("base name", state, mine, theirs, "names without their organization, spelling and quantization")


def _plain_name(name: str) -> str:
    """`meta-llama/Llama-3.2-1B-Instruct` -> `llama321binstruct`."""
    last = name.rstrip("/").replace("\\", "/").rpartition("/")[2].removesuffix(":latest")
    last = re.sub(r"[-_.](bnb-4bit|gguf|q\d\w*|f16|bf16|unsloth)\b.*", "", last.lower())
    return re.sub(r"[^a-z0-9]", "", last)
