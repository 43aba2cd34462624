"""The two models of a measurement: what was typed becomes open GGUF files with the adapters that belong on them.

In: `REF`, or `REF+ADAPTER` (a LoRA in any form, or an Ollama model whose adapter layer is meant). Out: `OpenModel`s,
checked to be comparable before any work. A Hugging Face folder is converted to 16 bits into a scratch folder.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import AdapterError, MissingExtraError, NotFoundError, TrainingError, UsageError
from ollama_forge.files import Progress, no_progress
from ollama_forge.gguf.reader import GGUFFile, open_gguf
from ollama_forge.jobs.adapters import settle_base_copies
from ollama_forge.jobs.conversion import ConvertOptions, convert_folder
from ollama_forge.jobs.resolve import ResolvedModel, resolve
from ollama_forge.source.ref import RefKind, parse_ref
from ollama_forge.transform.lora import WeightedAdapter
from ollama_forge.weights.adapter import open_adapter
from ollama_forge.weights.adapter_base import describe_gguf
from ollama_forge.weights.adapter_fit import fit_adapter

PACKAGES = ("torch", "transformers", "accelerate")


@dataclass(frozen=True)
class MeasuredModel:
    """A model as it is to be measured.

    Attributes:
        text: as typed.
        model: its weights.
        adapters: on top of them, each with its strength, in order; those of an Ollama model come first.
    """

    text: str
    model: ResolvedModel
    adapters: tuple[tuple[Path, float], ...] = ()


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model whose headers are read; open as long as it is measured."""

    text: str
    gguf: GGUFFile
    adapters: tuple[WeightedAdapter, ...]

    @property
    def context_length(self) -> int | None:
        """The longest text that it was made for; None where it does not say."""
        value = self.gguf.arch_value("context_length")
        return value if isinstance(value, int) and value > 0 else None


def require_packages() -> None:
    """Refuse to begin without what scoring needs.

    Raises:
        MissingExtraError: with the packages that are not there.
    """
    missing = [name for name in PACKAGES if not importlib.util.find_spec(name)]
    if missing:
        raise MissingExtraError(f"Measuring needs {', '.join(missing)}", next="pip install 'ollama-forge[train]'")


def require_matplotlib() -> None:
    """Refuse to begin what ends with a picture that nothing here can draw.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not importlib.util.find_spec("matplotlib"):
        raise MissingExtraError("Drawing needs matplotlib", next="pip install 'ollama-forge[train]'")


def resolve_measured(text: str, store_path: Path | None = None) -> MeasuredModel:
    """Find a model and the adapters that are typed behind it with `+`.

    Raises:
        NotFoundError: one of them is not there.
        UsageError: a model where an adapter is expected.
        As `jobs.resolve.resolve`.
    """
    base, adapters = _split(text, store_path)
    model = resolve(base, store_path)
    paths = [path for adapter in adapters for path in _adapter_paths(adapter, store_path)]
    return MeasuredModel(text, model, tuple((path, 1.0) for path in (*model.adapters, *paths)))


def _split(text: str, store_path: Path | None) -> tuple[str, list[str]]:
    """`a+b+c` -> (`a`, [`b`, `c`]), where a path may have a plus in its name: the longest that is there wins."""
    if "+" not in text or Path(text).expanduser().exists():
        return text, []
    parts = text.split("+")
    for count in range(len(parts), 0, -1):
        head = "+".join(parts[:count])
        is_there = Path(head).expanduser().exists() or (count == 1 and parse_ref(head).kind is not RefKind.PATH)
        if is_there or count == 1:
            return head, _join_paths(parts[count:])
    return text, []


def _join_paths(parts: list[str]) -> list[str]:
    joined = []
    while parts:
        count = next((n for n in range(len(parts), 1, -1) if Path("+".join(parts[:n])).expanduser().exists()), 1)
        joined.append("+".join(parts[:count]))
        parts = parts[count:]
    return joined


def _adapter_paths(text: str, store_path: Path | None) -> tuple[Path, ...]:
    path = Path(text).expanduser()
    if not text.strip():
        raise UsageError("There is no adapter behind the plus", next="Write REF+ADAPTER, such as llama3.2+./my-adapter")
    if path.exists():
        return (path,)
    try:
        model = resolve(text, store_path)
    except NotFoundError as exc:
        raise NotFoundError(
            f"There is no adapter {text!r}",
            why="Behind the plus stands a path, or an Ollama model that has an adapter layer.",
            next="Check the path, or see the models: ollama-forge list",
        ) from exc
    if not model.adapters:
        raise UsageError(
            f"{text!r} has no adapter layer",
            why="Behind the plus stands an adapter, or an Ollama model that has one.",
            next=f"To measure {text!r} itself, name it alone.",
        )
    return model.adapters


@contextlib.contextmanager
def open_measured(measured: MeasuredModel, scratch_dir: Path, progress: Progress = no_progress) -> Iterator[OpenModel]:
    """Open headers; nothing is computed but the conversion of a folder.

    Args:
        scratch_dir: where a Hugging Face folder's 16-bit GGUF is written.

    Raises:
        TrainingError: it is no language model.
        AdapterError: an adapter does not fit.
        As the readers and the conversion say.
    """
    with contextlib.ExitStack() as files:
        path = measured.model.gguf_path
        if path is None:
            assert measured.model.folder is not None
            path = scratch_dir / f"{len(list(scratch_dir.iterdir()))}.gguf"
            convert_folder(measured.model.folder, path, ConvertOptions(), progress=progress)
        gguf = files.enter_context(open_gguf(path))
        _require_language_model(gguf, measured.text)
        base = describe_gguf(gguf)
        adapters = []
        for adapter_path, weight in measured.adapters:
            adapter = files.enter_context(open_adapter(adapter_path))
            if adapter.invocation_tokens:
                raise AdapterError(
                    f"{str(adapter_path)!r} is active only behind certain tokens (aLoRA)",
                    why="Measuring would switch it on for the whole text.",
                    next="Measure the model without it.",
                )
            adapters.append(WeightedAdapter(settle_base_copies(fit_adapter(adapter, base), path), weight))
        yield OpenModel(measured.text, gguf, tuple(adapters))


def _require_language_model(gguf: GGUFFile, text: str) -> None:
    kind = gguf.metadata.get("general.type", "model")
    if gguf.arch_value("pooling_type") is not None or kind != "model":
        raise TrainingError(
            f"{text!r} is no model that continues a text",
            why=f"Its header says {kind!r}, architecture {gguf.architecture!r}.",
            next="For an adapter write REF+ADAPTER; for a model choose one that answers: ollama-forge list",
        )


def validate_comparable(this: OpenModel, against: OpenModel) -> None:
    """Refuse models whose tokens do not mean the same.

    Raises:
        UsageError: with the first token that differs.
    """
    mine, theirs = (list(model.gguf.metadata.get("tokenizer.ggml.tokens") or ()) for model in (this, against))
    if mine == theirs:
        return
    index = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
    if index is None:
        why = f"One has {len(mine):,} tokens, the other {len(theirs):,}."
    else:
        why = f"One has {len(mine):,} tokens, the other {len(theirs):,}; token {index} is {mine[index]!r} in one and "
        why += f"{theirs[index]!r} in the other."
    raise UsageError(
        f"{this.text!r} and {against.text!r} have different vocabularies",
        why=f"{why} Probabilities of different tokens cannot be compared.",
        next="Compare a model with what it was made from, such as its 16-bit or Q8_0 form.",
    )
