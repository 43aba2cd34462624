"""Which Hugging Face repository a GGUF belongs to: by what the file says and by what it is, never by what it is called.

In: an open GGUF and the models of the Hugging Face cache. Out: a `Counterpart` with its evidence, or `unknown`. Three
kinds of evidence count: keys of the file that name a repository, equal dimensions and vocabulary, and unquantized
vectors (norms, biases) that are equal bit by bit. The last tells a chat model from its base, which the others cannot.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.gguf.reader import GGUFFile
from ollama_forge.gguf.types import GGMLType
from ollama_forge.jobs.hf_cache import CachedModel

UNKNOWN = "unknown"
SOURCE, BASE_MODEL, WEIGHTS = "source", "base_model", "weights"

_REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
_ADDRESS = re.compile(
    rf"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)?({_REPOSITORY})(?:/(?:tree|resolve)/\S*)?/?"
)
_SOURCE_KEYS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
)
_DIMENSIONS = (
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "expert_count",
    "expert_feed_forward_length",
)
_MAX_BASES = 100


@dataclass(frozen=True)
class NamedRepository:
    """A repository that a key of the file names.

    Attributes:
        relation: `source`: the file was made from it; `base_model`: it was derived from it.
    """

    repo: str
    relation: str
    key: str


@dataclass(frozen=True)
class CachedMatch:
    """A cached model of the same dimensions and vocabulary.

    Attributes:
        n_equal, n_compared: unquantized vectors that are equal bit by bit, of all that both have; 0 of 0 when the
            cached weights cannot be read.
    """

    model: CachedModel
    n_equal: int
    n_compared: int

    @property
    def is_equal(self) -> bool:
        return 0 < self.n_compared == self.n_equal

    def evidence(self) -> str:
        """In words."""
        if not self.n_compared:
            return "same dimensions and vocabulary; its weights are not here to compare"
        return (
            f"same dimensions and vocabulary; {self.n_equal} of {self.n_compared} unquantized vectors are equal bit by "
            "bit"
        )


@dataclass(frozen=True)
class Counterpart:
    """What is known about where a GGUF comes from.

    Attributes:
        repo: `organization/name`, or `unknown`.
        relation: `weights` (its vectors are these), `source`, `base_model`, or empty when unknown.
        cached: the repository in the cache, when it is there.
        named: every repository that the file names.
        matches: every cached model of its shape.
    """

    repo: str
    relation: str
    evidence: tuple[str, ...]
    cached: CachedModel | None
    named: tuple[NamedRepository, ...]
    matches: tuple[CachedMatch, ...]
    vocabulary_sha256: str

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "repo": self.repo,
            "relation": self.relation,
            "evidence": list(self.evidence),
            "cached": self.cached.document() if self.cached else None,
            "named": [{"repo": name.repo, "relation": name.relation, "key": name.key} for name in self.named],
            "matches": [
                {"repo": m.model.repo, "revision": m.model.revision, "evidence": m.evidence()} for m in self.matches
            ],
            "vocabulary_sha256": self.vocabulary_sha256,
        }


def read_named(metadata: Mapping[str, Any]) -> tuple[NamedRepository, ...]:
    """The repositories on huggingface.co that a GGUF's keys name, the nearest relation first."""
    keys = [(key, SOURCE) for key in _SOURCE_KEYS]
    count = metadata.get("general.base_model.count")
    for number in range(min(count, _MAX_BASES) if isinstance(count, int) else 0):
        keys += [(f"general.base_model.{number}.{part}", BASE_MODEL) for part in ("repo_url", "url")]
    found: dict[tuple[str, str], NamedRepository] = {}
    for key, relation in keys:
        value = metadata.get(key)
        match = _ADDRESS.fullmatch(value.strip()) if isinstance(value, str) else None
        if match and (str(value).startswith("http") or key.endswith(".repository")):
            found.setdefault((match[1], relation), NamedRepository(match[1], relation, key))
    return tuple(found.values())


def name_origin(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What the keys alone say, for `show`: `hf_repo` (or unknown) and which key says so."""
    chosen = _choose_named(read_named(metadata))
    if chosen is None:
        return {"hf_repo": UNKNOWN}
    return {"hf_repo": chosen.repo, "hf_repo_relation": chosen.relation, "hf_repo_evidence": chosen.key}


def find_counterpart(gguf: GGUFFile, cached: Sequence[CachedModel]) -> Counterpart:
    """Weigh the evidence. Cached models that cannot be read are passed over: they prove nothing."""
    named = read_named(gguf.metadata)
    tokens = gguf.metadata.get("tokenizer.ggml.tokens") or ()
    vocabulary = hash_vocabulary(tokens)
    matches = tuple(match for model in cached if (match := _match(gguf, vocabulary, model)) is not None)
    equal = [match for match in matches if match.is_equal]
    names = [name.repo for name in named]
    equal.sort(key=lambda match: names.index(match.model.repo) if match.model.repo in names else len(names))
    if equal:
        best = equal[0]
        keys = [f"{name.key} names it" for name in named if name.repo == best.model.repo]
        evidence = (best.evidence(), *keys)
        return Counterpart(best.model.repo, WEIGHTS, evidence, best.model, named, matches, vocabulary)
    chosen = _choose_named(named)
    if chosen is None:
        several = f"It names {len(named)} base models." if named else "No key of the file names a repository."
        return Counterpart(UNKNOWN, "", (several,), None, named, matches, vocabulary)
    here = next((model for model in cached if model.repo == chosen.repo), None)
    match = next((match for match in matches if match.model.repo == chosen.repo), None)
    evidence = (f"{chosen.key} names it",)
    if match is not None:
        evidence += (match.evidence(),)
    elif here is not None:
        evidence += ("but the copy in the cache has other dimensions or another vocabulary",)
    return Counterpart(
        chosen.repo, chosen.relation, evidence, match.model if match else here, named, matches, vocabulary
    )


def hash_vocabulary(tokens: Iterable[Any]) -> str:
    """SHA-256 over the texts of all tokens in order, without the `[PADi]` that only fill the embedding's last rows."""
    texts = [token if isinstance(token, bytes) else str(token).encode("utf-8", "surrogateescape") for token in tokens]
    while texts and texts[-1] == f"[PAD{len(texts) - 1}]".encode():
        texts.pop()
    total = hashlib.sha256()
    for text in texts:
        total.update(len(text).to_bytes(4, "little") + text)
    return total.hexdigest()


def _choose_named(named: Sequence[NamedRepository]) -> NamedRepository | None:
    """The source; else the base model, when there is one and not several."""
    sources = [name for name in named if name.relation == SOURCE]
    bases = [name for name in named if name.relation == BASE_MODEL]
    if sources:
        return sources[0]
    return bases[0] if len(bases) == 1 else None


def _match(gguf: GGUFFile, vocabulary: str, model: CachedModel) -> CachedMatch | None:
    try:
        if not _has_same_shape(gguf, vocabulary, model):
            return None
    except ForgeError:
        return None
    try:
        n_equal, n_compared = _compare_vectors(gguf, model)
    except ForgeError:
        n_equal = n_compared = 0
    return CachedMatch(model, n_equal, n_compared)


def _has_same_shape(gguf: GGUFFile, vocabulary: str, model: CachedModel) -> bool:
    from ollama_forge.arch.config import hyper_fields, parse_config
    from ollama_forge.arch.families import find_family
    from ollama_forge.tokenizer.vocab import read_vocabulary
    from ollama_forge.weights.folder import read_config

    raw = read_config(model.folder)
    family = find_family(raw)
    if family.gguf_architecture != gguf.architecture:
        return False
    config = parse_config(family, raw)
    theirs = {field.key: field.value for field in hyper_fields(family, config)}
    for suffix in _DIMENSIONS:
        ours, other = gguf.arch_value(suffix), theirs.get(f"{family.gguf_architecture}.{suffix}")
        if ours is not None and other is not None and ours != other:
            return False
    found = read_vocabulary(model.folder, raw, config.values.get("vocab_size"))
    return hash_vocabulary(found.tokens) == vocabulary


def _compare_vectors(gguf: GGUFFile, model: CachedModel) -> tuple[int, int]:
    """Vectors stay float32 whatever the matrices become, so a GGUF still has those of the very checkpoint."""
    import numpy as np

    from ollama_forge.weights.checkpoint import Layout, open_checkpoint

    n_equal = n_compared = 0
    with open_checkpoint(gguf.path) as ours, open_checkpoint(model.folder) as theirs:
        for key, tensor in ours.tensors.items():
            other = theirs.tensors.get(key)
            is_vector = len(tensor.spec.shape) == 1 and tensor.spec.encoding is GGMLType.F32
            if not is_vector or other is None or not tensor.row.hf_name:
                continue
            n_compared += 1
            wanted = theirs.read_float32(other, Layout.GGUF)
            n_equal += bool(np.array_equal(ours.read_float32(tensor, Layout.GGUF), wanted))
    return n_equal, n_compared
