"""What lies in a Hugging Face repo, as values, and which of it a model needs. Pure: lists in, choices out.

In: a `RepoListing`. Out: the files to download. Nothing that can run code (Python, pickles) is ever chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from ollama_forge.errors import HubError, NotFoundError, UnsafeFileError, UsageError
from ollama_forge.source.ref import RefKind, parse_ref

MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
_WEIGHTS = ".safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_VOCABULARIES = ("merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
_CARD = "readme.md"
_LICENCES = ("license", "licence", "notice", "use_policy", "usage_policy")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_URL_KINDS = ("resolve", "blob", "tree", "raw")


@dataclass(frozen=True)
class HubFile:
    """A file of a repo.

    Attributes:
        path: inside the repo, with forward slashes.
        sha256: of its bytes, for files that the Hub keeps as LFS objects; else empty.
        git_sha1: of its bytes as a git blob, for the others; else empty.
    """

    path: str
    size_bytes: int
    sha256: str = ""
    git_sha1: str = ""

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def etag(self) -> str:
        """The name under which the cache keeps its bytes: the hash that it is verified by."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class RepoListing:
    """A repo at one commit.

    Attributes:
        commit: 40 hexadecimal digits.
        revision: as asked for (a branch, a tag, a commit).
        base_models: what the repo's own tags say that it was made from.
        is_offline: the list is what this machine's cache holds, since the Hub was out of reach.
        why_offline: in words.
    """

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    tags: tuple[str, ...] = ()
    licence: str = ""
    base_models: tuple[str, ...] = ()
    is_offline: bool = False
    why_offline: str = ""
    by_path: dict[str, HubFile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_path", {file.path: file for file in self.files})

    @property
    def is_adapter(self) -> bool:
        """Whether it is a LoRA of the PEFT form and no whole model."""
        return ADAPTER_CONFIG in self.by_path and MODEL_CONFIG not in self.by_path

    @property
    def has_safetensors(self) -> bool:
        """Whether it holds a whole model as safetensors."""
        return MODEL_CONFIG in self.by_path and any(_is_weights(file) for file in self.files)


@dataclass(frozen=True)
class RepoName:
    """What a person typed for a repo, understood.

    Attributes:
        revision, file, quant: empty when not said.
    """

    repo: str
    revision: str = ""
    file: str = ""
    quant: str = ""


def parse_repo(text: str) -> RepoName:
    """`org/repo`, `hf:org/repo@revision:file.gguf`, `hf.co/org/repo:Q4_K_M`, or a page of huggingface.co.

    Raises:
        UsageError: none of these.
    """
    stripped = text.strip()
    for host in _HUB_HOSTS:
        if stripped.startswith(host + "/"):
            stripped = "https://" + stripped
    if stripped.startswith(("https://", "http://")):
        return _parse_page(text, stripped)
    ref = parse_ref(stripped if stripped.startswith("hf:") else "hf:" + stripped)
    if ref.kind is not RefKind.HUB:
        raise _not_a_repo(text)
    if ref.file and "." not in ref.file:
        return RepoName(ref.repo, ref.revision, quant=ref.file)
    return RepoName(ref.repo, ref.revision, ref.file)


def _parse_page(text: str, url: str) -> RepoName:
    parts = urlsplit(url)
    if parts.hostname not in _HUB_HOSTS or "@" in parts.netloc:
        raise _not_a_repo(text)
    path, _, quant = unquote(parts.path).strip("/").partition(":")
    words = path.split("/")
    if len(words) < 2:
        raise _not_a_repo(text)
    revision = file = ""
    if len(words) > 3 and words[2] in _URL_KINDS:
        revision, file = words[3], "/".join(words[4:])
    elif len(words) > 2:
        raise _not_a_repo(text)
    repo = "/".join(words[:2])
    at = f"@{revision}" if revision and revision != "main" else ""
    named = parse_repo(f"hf:{repo}{at}" + (f":{file}" if file else ""))
    return RepoName(named.repo, named.revision, named.file, quant)


def _not_a_repo(text: str) -> UsageError:
    return UsageError(
        f"{text!r} is not a Hugging Face repo",
        why="A repo is named by its owner and its name.",
        next="Example: ollama-forge fetch Qwen/Qwen3-0.6B-GGUF",
    )


def looks_like_repo(text: str) -> bool:
    """Whether `text` can be read as a repo (it may as well be an Ollama name or a relative path)."""
    try:
        parse_repo(text)
    except UsageError:
        return False
    return True


def validate_path(path: str) -> None:
    """Refuse a file name that leads out of its folder.

    Raises:
        UnsafeFileError: it would.
    """
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts) or re.search(r"[\\\0:\x00-\x1f]", path):
        raise UnsafeFileError(
            f"The repo lists a file named {path!r}",
            why="Such a name leads out of the folder that it is downloaded to.",
            next="Do not use this repo.",
        )


def choose_model_files(listing: RepoListing) -> tuple[HubFile, ...]:
    """The files of a whole model: weights as safetensors once, configuration, tokenizer, templates, licence, and the
    model card, whose head says what the model was made from.

    Raises:
        NotFoundError: no config.json, or no weights.
        UnsafeFileError: its weights are pickles only.
    """
    weights = _choose_weights(file for file in listing.files if _is_weights(file))
    if not weights:
        _refuse_without_weights(listing)
    if MODEL_CONFIG not in listing.by_path:
        raise NotFoundError(
            f"{listing.repo!r} has no config.json",
            why="Without it nobody knows which family the weights belong to.",
            next="Look for the repo of the model itself, or for one with GGUF files.",
        )
    sharded = any(_SHARD.fullmatch(file.path) for file in weights)
    beside = [file for file in listing.files if _is_needed(file) and (sharded or not _is_index(file))]
    return (*sorted(beside, key=lambda file: file.path), *weights)


def is_model_weights(file: HubFile) -> bool:
    """Whether a file is (a shard of) a model's weights, as `choose_model_files` takes them."""
    return _is_weights(file)


def choose_adapter_files(listing: RepoListing) -> tuple[HubFile, ...]:
    """The files of a LoRA: PEFT's two, or its one GGUF.

    Raises:
        NotFoundError: it is no adapter.
        UnsafeFileError: a pickle only.
        UsageError: several GGUF files.
    """
    weights = [file for file in listing.files if file.path in _ADAPTER_WEIGHTS]
    if weights and ADAPTER_CONFIG in listing.by_path:
        licences = [file for file in listing.files if _is_licence(file)]
        return (listing.by_path[ADAPTER_CONFIG], *licences, *weights)
    ggufs = [file for file in listing.files if file.path.lower().endswith(".gguf")]
    if len(ggufs) == 1:
        return (ggufs[0],)
    if ggufs:
        raise UsageError(
            f"{listing.repo!r} holds {len(ggufs)} GGUF files",
            why="Which of them is the adapter is not said anywhere.",
            next="Name one: --file " + " or --file ".join(file.path for file in ggufs[:5]),
        )
    if ADAPTER_CONFIG in listing.by_path:
        raise UnsafeFileError(
            f"{listing.repo!r} has its adapter as a pickle only",
            why="Reading one runs whatever code it holds.",
            next="Ask its author for adapter_model.safetensors, or convert it on a machine that you can lose.",
        )
    raise NotFoundError(
        f"{listing.repo!r} is not an adapter",
        why="It has neither adapter_config.json with adapter_model.safetensors, nor a GGUF.",
        next=f"If it is a whole model: ollama-forge import {listing.repo} --name NAME",
    )


def _refuse_without_weights(listing: RepoListing) -> None:
    if listing.is_adapter:
        raise NotFoundError(
            f"{listing.repo!r} is an adapter, not a whole model",
            next=f"ollama-forge fetch-adapter {listing.repo} --base MODEL --name NAME",
        )
    if any(file.path.lower().endswith(".gguf") for file in listing.files):
        raise NotFoundError(
            f"{listing.repo!r} has GGUF files and no safetensors",
            why="They need no conversion.",
            next=f"ollama-forge fetch {listing.repo} --name NAME",
        )
    if any(file.path.lower().endswith(_PICKLES) for file in listing.files):
        raise UnsafeFileError(
            f"{listing.repo!r} has its weights as pickles only",
            why="Reading one runs whatever code it holds.",
            next="Look for a converted copy of it with .safetensors files.",
        )
    raise NotFoundError(f"{listing.repo!r} holds no weights", next="Check the name of the repo on its page.")


def _choose_weights(found: Iterable[HubFile]) -> tuple[HubFile, ...]:
    """One copy of the weights: transformers' own names before others, a set of shards before its joined twin.

    Raises:
        HubError: a set of shards is not whole.
    """
    files = sorted(found, key=lambda file: file.path)
    sets: dict[str, list[HubFile]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.path)
        sets.setdefault(f"{match['stem']}-of-{match['total']}" if match else file.path, []).append(file)
    for shards in sets.values():
        match = _SHARD.fullmatch(shards[0].path)
        if match and len(shards) != int(match["total"]):
            raise HubError(
                f"The repo has {len(shards)} of {int(match['total'])} files of {match['stem']!r}",
                next="Tell its author, or take another revision with --revision.",
            )
    if len(sets) <= 1:
        return tuple(files)
    for is_it in (_is_transformers_set, _is_transformers_file):
        chosen = [shards for key, shards in sets.items() if is_it(key)]
        if chosen:
            return tuple(chosen[0])
    return tuple(files)


def _is_transformers_set(key: str) -> bool:
    return key.startswith("model-of-")


def _is_transformers_file(key: str) -> bool:
    return key == "model.safetensors"


def _is_weights(file: HubFile) -> bool:
    return "/" not in file.path and file.path.endswith(_WEIGHTS) and file.path not in _ADAPTER_WEIGHTS


def _is_index(file: HubFile) -> bool:
    return file.path.endswith(".safetensors.index.json")


def _is_licence(file: HubFile) -> bool:
    return "/" not in file.path and file.path.lower().startswith(_LICENCES) and not file.path.lower().endswith(".py")


def _is_needed(file: HubFile) -> bool:
    path = file.path.lower()
    if path.endswith((".py", *_PICKLES, _WEIGHTS, ".gguf", ".onnx")):
        return False
    if "/" in path:
        return path.endswith(".jinja")
    is_named = path.endswith((".json", ".jinja")) or path.startswith("tokenizer") or path in (*_VOCABULARIES, _CARD)
    return (is_named and path != ADAPTER_CONFIG and not path.endswith(".bin.index.json")) or _is_licence(file)
