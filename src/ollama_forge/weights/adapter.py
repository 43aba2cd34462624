"""An adapter at rest, whatever its form: a PEFT folder, a LoRA in GGUF, or llama.cpp's old format.

In: a path as a person gives it: a folder, or a file. Out: an `Adapter`: pairs of thin matrices by the name of what they
change, lazily read. Which base it fits is `adapter_fit`'s business; converting and merging is `transform`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType

from ollama_forge.errors import AdapterError, ForgeError, NotFoundError
from ollama_forge.files import disk_error
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.weights.adapter_config import CONFIG_NAME
from ollama_forge.weights.adapter_ggla import MAGIC, open_ggla
from ollama_forge.weights.adapter_gguf import open_lora_gguf
from ollama_forge.weights.adapter_parts import LoraPair, Replacement
from ollama_forge.weights.adapter_peft import PICKLE_NAME, SAFE_NAME, open_peft

RESULT_FOLDER = "adapter"
"""Where a training leaves its adapter, below its working folder."""

_WEIGHTS = (SAFE_NAME, PICKLE_NAME)
_HINT = "If this is a llama.cpp LoRA, pass the .bin or .gguf file path, or the directory containing it."


class AdapterKind(Enum):
    """The forms that can be read."""

    PEFT = "PEFT folder"
    GGUF = "LoRA GGUF"
    GGLA = "llama.cpp's old LoRA format (ggla)"


@dataclass(frozen=True)
class AdapterPlace:
    """Where an adapter lies: a folder for PEFT, a file for the others."""

    path: Path
    kind: AdapterKind


@dataclass(frozen=True, eq=False)
class Adapter:
    """An open adapter. Close it, or use it in a `with` block; its tensors must not be read after that.

    Attributes:
        path: its folder or file.
        kind: its form. PEFT names tensors as Hugging Face does, the others as GGUF does.
        pairs: what it changes by a product of two matrices.
        replacements: what it replaces whole.
        architecture: `general.architecture` of a LoRA GGUF.
        base_names: what it says its base is called; names on the Hub, or a path for PEFT.
        base_class: the transformers class of its base, where PEFT says it.
        invocation_tokens: it is active only behind these tokens (aLoRA).
    """

    path: Path
    kind: AdapterKind
    pairs: tuple[LoraPair, ...]
    replacements: tuple[Replacement, ...] = ()
    architecture: str | None = None
    base_names: tuple[str, ...] = ()
    base_class: str | None = None
    invocation_tokens: tuple[int, ...] = ()
    is_rank_stabilized: bool = False
    close: Callable[[], None] = field(default=lambda: None, repr=False)

    def __enter__(self) -> Adapter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def uses_gguf_names(self) -> bool:
        return self.kind is not AdapterKind.PEFT

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is a DoRA."""
        return any(pair.magnitude is not None for pair in self.pairs)

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks in it, each once, smallest first."""
        return tuple(sorted({pair.rank for pair in self.pairs}))


def find_adapter(path: Path) -> AdapterPlace:
    """What a path means. A folder with adapter_config.json or adapter_model.* is a PEFT folder; otherwise it must hold
    exactly one .gguf or .bin file, where models, matrices and pickles do not count, or be the working folder of a
    training, whose adapter lies in `adapter/`. A file is told by its first bytes, not by its name.

    Raises:
        NotFoundError: nothing is there.
        AdapterError: something else is there, or several adapters.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _find_in_folder(path)
    if not path.exists():
        raise NotFoundError(f"There is no adapter {str(path)!r}", why=_HINT, next="Check the path.")
    is_named_so = path.name in (*_WEIGHTS, CONFIG_NAME)
    if is_named_so and ((path.parent / CONFIG_NAME).exists() or path.suffix != ".bin"):
        return AdapterPlace(path.parent, AdapterKind.PEFT)
    return _find_in_file(path)


def open_adapter(path: Path) -> Adapter:
    """Open an adapter of any form; its shapes are checked, its numbers when they are read.

    Raises:
        NotFoundError: nothing is there, or a part of it is missing.
        AdapterError: it is broken, or does something that cannot be done here; the tensor or setting is named.
        MissingExtraError: an adapter_model.bin, and torch is not installed.
        GGUFError, SafetensorsError, UnsafeFileError, DiskError: as the readers say.
    """
    place = find_adapter(path)
    if place.kind is AdapterKind.PEFT:
        folder = open_peft(place.path)
        config = folder.config
        return Adapter(
            path=place.path,
            kind=place.kind,
            pairs=folder.pairs,
            replacements=folder.replacements,
            base_names=(config.base_name,) if config.base_name else (),
            base_class=config.base_class,
            invocation_tokens=config.invocation_tokens,
            is_rank_stabilized=config.is_rank_stabilized,
            close=folder.close,
        )
    if place.kind is AdapterKind.GGLA:
        old = open_ggla(place.path)
        return Adapter(path=place.path, kind=place.kind, pairs=old.pairs, close=old.close)
    file = open_lora_gguf(place.path)
    return Adapter(
        path=place.path,
        kind=place.kind,
        pairs=file.pairs,
        replacements=file.replacements,
        architecture=file.architecture,
        base_names=file.base_names,
        invocation_tokens=file.invocation_tokens,
        close=file.close,
    )


def _find_in_folder(folder: Path) -> AdapterPlace:
    if any((folder / name).exists() for name in (CONFIG_NAME, *_WEIGHTS)):
        return AdapterPlace(folder, AdapterKind.PEFT)
    try:
        files = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in (".gguf", ".bin"))
    except OSError as exc:
        raise disk_error(exc, folder, "read") from exc
    adapters = [file for file in files if _may_be_adapter(file)]
    if not adapters and (folder / RESULT_FOLDER / CONFIG_NAME).exists():
        return AdapterPlace(folder / RESULT_FOLDER, AdapterKind.PEFT)
    files = adapters or files
    if len(files) == 1:
        return _find_in_file(files[0])
    if files:
        raise AdapterError(
            f"The folder {str(folder)!r} holds {len(files)} .gguf or .bin files",
            why="Which of them is the adapter is not clear.",
            next="Name one of them: " + ", ".join(str(file) for file in files[:5]),
        )
    raise AdapterError(
        f"The folder {str(folder)!r} holds no adapter",
        why=f"Expected {CONFIG_NAME} with {SAFE_NAME} (PEFT), or exactly one .bin or .gguf file.",
        next=_HINT,
    )


def _may_be_adapter(path: Path) -> bool:
    """False for a file that says itself that it is something else; a broken one is told when it is opened."""
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            return magic == MAGIC
        with open_gguf(path) as file:
            return file.metadata.get("general.type", "adapter") == "adapter"
    except (OSError, ForgeError):
        return True


def _find_in_file(path: Path) -> AdapterPlace:
    try:
        if not path.is_file():
            raise AdapterError(f"{str(path)!r} is not a file", next=_HINT)
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
    if magic == b"GGUF":
        return AdapterPlace(path, AdapterKind.GGUF)
    if magic == MAGIC:
        return AdapterPlace(path, AdapterKind.GGLA)
    raise AdapterError(
        f"{str(path)!r} is no adapter",
        why=f"It begins with {magic!r}; a LoRA file begins with b'GGUF'. PyTorch files are read only in a PEFT folder, "
        f"beside {CONFIG_NAME}.",
        next=_HINT,
    )
