"""What a thing is that somebody wants as a model: found out by looking at it, not by the shape of its name.

In: what was typed. Out: an `Identified`: its kind, what was seen, and the reference that commands take.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ollama_forge.errors import ForgeError, NameInvalidError, NotFoundError, UnsafeFileError, UsageError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.recipe.document import parse_document, read_recipe_text
from ollama_forge.recipe.places import locate
from ollama_forge.recipe.schema import SOURCES
from ollama_forge.source.gguf_names import list_choices
from ollama_forge.source.hub import list_repo
from ollama_forge.source.hub_files import RepoName, looks_like_repo, parse_repo
from ollama_forge.source.ref import looks_like_path
from ollama_forge.store.catalog import open_store
from ollama_forge.store.installed import InstalledModel

_RECIPES = (".yaml", ".yml", ".json")
_DATA = (".jsonl", ".csv", ".parquet")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Kind(Enum):
    """What a source may be."""

    RECIPE = "recipe"
    GGUF = "gguf"
    FOLDER = "folder"
    ADAPTER = "adapter"
    OLLAMA = "ollama"
    HUB_GGUF = "hub gguf"
    HUB_SAFETENSORS = "hub safetensors"
    HUB_ADAPTER = "hub adapter"


@dataclass(frozen=True)
class Identified:
    """A source, understood.

    Attributes:
        ref: what the command for it takes.
        said: what it is, and how that was seen.
        repo: pinned to the commit that was looked at, for those of the Hub.
        base: what an adapter says that it was trained on.
    """

    kind: Kind
    ref: str
    said: str
    repo: RepoName | None = None
    base: str = ""


def identify(text: str, store_path: Path | None = None, *, revision: str = "") -> Identified:
    """Find out what a source is: what lies on this disk first, then Ollama's models, then the Hub.

    Raises:
        NotFoundError: it is nowhere.
        UsageError: it is something else than a model, a recipe or an adapter.
        UnsafeFileError: a pickle.
        HubError: as `source.hub`.
    """
    path = locate(Path(), text)
    if path.is_dir():
        return _identify_folder(text, path)
    if path.is_file():
        return _identify_file(text, path)
    if looks_like_path(text) or path.suffix.lower() in (*_RECIPES, *_DATA):
        raise NotFoundError(f"There is no file or folder {text!r}", next="Check the path.")
    installed = _find_installed(text, store_path)
    if installed is not None:
        said = f"an Ollama model ({installed.digest[:12]} in {installed.blobs.blobs_dir.parent})"
        return Identified(Kind.OLLAMA, installed.name.display, said)
    if looks_like_repo(text):
        return _identify_repo(text, revision)
    open_store(store_path).find(text)  # its error names models that are called alike
    raise NotFoundError(f"There is no {text!r}", next="ollama-forge list")


def _find_installed(text: str, store_path: Path | None) -> InstalledModel | None:
    if text.startswith("hf:") or "://" in text:
        return None
    try:
        return open_store(store_path).find(text)
    except (NotFoundError, NameInvalidError):
        return None


def _identify_folder(text: str, folder: Path) -> Identified:
    names = {entry.name for entry in folder.iterdir()}
    if any(name in names for name in _ADAPTER_FILES) and "config.json" not in names:
        seen = next(name for name in _ADAPTER_FILES if name in names)
        return Identified(Kind.ADAPTER, text, f"a LoRA adapter (the folder has {seen})", base=_adapter_base(folder))
    if "config.json" in names:
        n_shards = sum(name.endswith(".safetensors") for name in names)
        weights = f"{n_shards} safetensors file{'' if n_shards == 1 else 's'}"
        return Identified(Kind.FOLDER, text, f"a Hugging Face model (config.json, {weights})")
    ggufs = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".gguf")
    firsts = [entry for entry in ggufs if "-of-" not in entry.stem or "-00001-of-" in entry.stem]
    models = [entry for entry in firsts if "mmproj" not in entry.name.lower()]
    if len(models) == 1:
        return _identify_file(str(models[0]), models[0])
    if models:
        raise UsageError(
            f"The folder {text!r} holds {len(models)} GGUF files",
            next="Name one of them: " + ", ".join(str(entry) for entry in models[:5]),
        )
    recipes = [entry for entry in sorted(folder.iterdir()) if entry.suffix.lower() in _RECIPES and _is_recipe(entry)]
    if len(recipes) == 1:
        return _identify_file(str(recipes[0]), recipes[0])
    raise UsageError(
        f"The folder {text!r} holds no model, no adapter and no recipe",
        why="Looked for config.json, adapter_config.json, .gguf files and recipes.",
        next="Check the path.",
    )


def _identify_file(text: str, path: Path) -> Identified:
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic == b"GGUF":
        return _identify_gguf(text, path)
    if magic in (b"ggla", b"algg"):
        return Identified(Kind.ADAPTER, text, "a LoRA adapter in llama.cpp's old format")
    suffix = path.suffix.lower()
    if suffix in _PICKLES:
        raise UnsafeFileError(
            f"{text!r} is a PyTorch pickle",
            why="Reading one runs whatever code it holds.",
            next="Use the model's .safetensors files; or name the folder of the adapter that it belongs to.",
        )
    if suffix == ".safetensors":
        return _identify_folder(str(path.parent), path.parent)
    if suffix in _DATA:
        raise UsageError(
            f"{text!r} is training data, not a model",
            next=f"ollama-forge finetune --data {text} --base MODEL --name NAME",
        )
    if suffix in _RECIPES and _is_recipe(path):
        return Identified(Kind.RECIPE, text, "a recipe (it has a name and a source)")
    if path.name.lower().startswith("modelfile"):
        raise UsageError(f"{text!r} is a Modelfile", next=f"ollama-forge create-from-base -f {text} --name NAME")
    begin = f"It begins with {magic!r}" if magic else "It is empty"
    raise UsageError(
        f"{text!r} is neither a model nor a recipe",
        why=f"{begin}; a GGUF begins with b'GGUF', and a recipe has a `name` and one of {', '.join(SOURCES)}.",
        next="Check the path.",
    )


def _identify_gguf(text: str, path: Path) -> Identified:
    with open_gguf(path) as gguf:
        kind = str(gguf.metadata.get("general.type", "model"))
        facts = f"{gguf.architecture}, {len(gguf.tensors)} tensors, {_spoken_size(gguf.size_bytes)}"
        base = str(gguf.metadata.get("general.base_model.0.name", ""))
    if kind == "adapter":
        return Identified(Kind.ADAPTER, text, f"a LoRA adapter as GGUF ({facts})", base=base)
    if kind != "model":
        raise UsageError(
            f"{text!r} is a GGUF, and no model: its header says {kind!r}",
            why="A projector belongs beside the weights of its model; an importance matrix is for quantizing.",
            next="Name the model's own file.",
        )
    return Identified(Kind.GGUF, text, f"a GGUF model ({facts})")


def _spoken_size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def _identify_repo(text: str, revision: str) -> Identified:
    named = parse_repo(text)
    listing = list_repo(named.repo, revision or named.revision)
    pinned = RepoName(named.repo, listing.commit, named.file, named.quant)
    at = f"{named.repo} at {listing.commit[:12]}"
    if listing.is_adapter:
        base = listing.base_models[0] if listing.base_models else ""
        said = f"a LoRA adapter on the Hub ({at}, it has adapter_config.json)"
        return Identified(Kind.HUB_ADAPTER, named.repo, said, pinned, base)
    choices = list_choices(listing.files)
    if choices:
        ggufs = f"{len(choices)} GGUF{'' if len(choices) == 1 else 's'}"
        return Identified(Kind.HUB_GGUF, named.repo, f"a repo of {ggufs} on the Hub ({at})", pinned)
    if listing.has_safetensors:
        return Identified(Kind.HUB_SAFETENSORS, named.repo, f"a repo of safetensors on the Hub ({at})", pinned)
    raise NotFoundError(
        f"{named.repo!r} holds no model that can be used",
        why="It has neither GGUF files, nor config.json with safetensors, nor an adapter.",
        next="Look at its page; pickles (.bin) are not read.",
    )


def _is_recipe(path: Path) -> bool:
    try:
        document, _ = parse_document(read_recipe_text(path))
    except ForgeError:
        return False
    return document is not None and "name" in document.value and any(kind in document.value for kind in SOURCES)


def _adapter_base(folder: Path) -> str:
    from ollama_forge.weights.adapter_config import read_peft_config

    try:
        return read_peft_config(folder).base_name or ""
    except ForgeError:
        return ""
