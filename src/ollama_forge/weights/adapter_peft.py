"""A LoRA in a PEFT folder: adapter_config.json beside adapter_model.safetensors (or .bin, through torch's safe reader).

In: a folder. Out: `PeftFolder`, pairs by Hugging Face tensor name. Every tensor of the file ends up in a pair, in a
replacement or in an error. Names: peft/utils/save_and_load.py and peft/tuners/lora of PEFT 0.21.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ollama_forge.errors import AdapterError, MissingExtraError, NotFoundError
from ollama_forge.weights.adapter_config import CONFIG_NAME, MERGE_WITH_PEFT, PeftConfig, read_peft_config
from ollama_forge.weights.adapter_gguf import missing_half
from ollama_forge.weights.adapter_parts import AdapterTensor, LoraPair, Replacement, ReplacementKind, make_pair
from ollama_forge.weights.safetensors import SafetensorsFolder, open_safetensors, resolve_member

SAFE_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
PREFIX = "base_model.model."

# The end of a tensor's name, and which part of a pair it is.
_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_A.default.weight": "a",
    "lora_B.default.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "bias",
}
_NEW_TOKENS = "trainable_tokens_delta"
_WRAPPING = re.compile(r"\.modules_to_save(\.default)?\.")


class PeftFolder:
    """An open PEFT folder."""

    def __init__(
        self, folder: Path, config: PeftConfig, tensors: Mapping[str, AdapterTensor], close: Callable[[], None]
    ) -> None:
        self.path = folder
        self.config = config
        self.close = close
        self.pairs, self.replacements = _Sorter(config).sort(tensors)


def open_peft(folder: Path) -> PeftFolder:
    """Open it.

    Raises:
        AdapterError: an adapter that is broken, or that does what cannot be done here; the tensor or setting is named.
        MissingExtraError: an adapter_model.bin, and torch is not installed.
        SafetensorsError, UnsafeFileError, NotFoundError: as the readers say.
    """
    if not (folder / CONFIG_NAME).exists():
        raise NotFoundError(
            f"{str(folder)!r} has no {CONFIG_NAME}",
            why="Without it nobody knows the adapter's alpha, so nobody knows how strong it is.",
            next="Get the whole adapter folder again from where it was made.",
        )
    config = read_peft_config(folder)
    if (folder / SAFE_NAME).exists():
        file = open_safetensors(resolve_member(folder, SAFE_NAME))
        try:
            return PeftFolder(folder, config, _tensors_of(file), file.close)
        except BaseException:
            file.close()
            raise
    if (folder / PICKLE_NAME).exists():
        return PeftFolder(folder, config, _unpickled(resolve_member(folder, PICKLE_NAME)), lambda: None)
    raise NotFoundError(
        f"{str(folder)!r} has neither {SAFE_NAME} nor {PICKLE_NAME}",
        why=f"It holds only {CONFIG_NAME}: the weights of the adapter are missing.",
        next="Get the whole adapter folder again from where it was made.",
    )


def module_of(target: str) -> str:
    """The module whose weight a target is, as PEFT's patterns spell it."""
    return target.removesuffix(".weight")


def _tensors_of(file: SafetensorsFolder) -> dict[str, AdapterTensor]:
    return {
        name: AdapterTensor(name, entry.shape, entry.dtype, functools.partial(file.read, name))
        for name, entry in file.tensors.items()
    }


def _unpickled(path: Path) -> dict[str, AdapterTensor]:
    """The tensors of a .bin file; torch reads it with `weights_only`, which runs no code of the file."""
    try:
        import torch
    except ImportError as exc:
        raise MissingExtraError(
            f"{str(path)!r} can only be read with torch",
            why="It is a pickle; torch has a reader that takes tensors out of one without running its code.",
            next="pip install 'ollama-forge[train]', or get the adapter as adapter_model.safetensors",
        ) from exc
    import pickle

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as exc:
        # Nothing of torch's own text: it advises to read the file with the guard switched off.
        raise AdapterError(
            f"{str(path)!r} is not a file of tensors",
            why="It is damaged, or holds objects that only running its code could make; that is never done.",
            next="Get the adapter as adapter_model.safetensors.",
        ) from exc
    if not isinstance(loaded, dict):
        raise AdapterError(f"{str(path)!r} holds no table of tensors", next="Get the adapter as safetensors.")
    tensors = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise AdapterError(f"{str(path)!r} holds {str(name)[:80]!r}, which is no tensor")
        floats = value.detach().to(torch.float32).contiguous().numpy()
        tensors[name] = AdapterTensor(name, tuple(floats.shape), "F32", functools.partial(_bytes_of, floats))
    return tensors


def _bytes_of(values: Any) -> memoryview:
    return memoryview(values.reshape(-1).view("u1"))


class _Sorter:
    """Puts each tensor of the file where it belongs."""

    def __init__(self, config: PeftConfig) -> None:
        self._config = config
        self._parts: dict[str, dict[str, AdapterTensor]] = {}
        self._replacements: list[Replacement] = []

    def sort(self, tensors: Mapping[str, AdapterTensor]) -> tuple[tuple[LoraPair, ...], tuple[Replacement, ...]]:
        for name, tensor in tensors.items():
            self._place(name.removeprefix(PREFIX), tensor)
        if not self._parts and not self._replacements:
            raise AdapterError("The adapter has no tensors", why="Its training saved nothing.", next="Train it again.")
        pairs = tuple(self._pair(module, parts) for module, parts in self._parts.items())
        return pairs, tuple(self._replacements)

    def _place(self, name: str, tensor: AdapterTensor) -> None:
        for ending, part in _PARTS.items():
            if name.endswith("." + ending):
                module = name[: -len(ending) - 1]
                if module.endswith((".experts", ".experts.base_layer")):
                    raise AdapterError(
                        f"The adapter's tensor {tensor.name!r} changes stacked experts (target_parameters)",
                        why="Which expert each of its rows belongs to depends on the version of PEFT that made it.",
                        next=MERGE_WITH_PEFT,
                    )
                if part in self._parts.setdefault(module, {}):
                    raise AdapterError(f"The adapter has two tensors like {tensor.name!r}", next="Get it again.")
                self._parts[module][part] = tensor
                return
        if name.endswith(_NEW_TOKENS):
            raise AdapterError(
                f"The adapter's tensor {tensor.name!r} trains single tokens (trainable_token_indices)",
                why="Neither a LoRA file nor a merge into quantized weights can express it.",
                next=MERGE_WITH_PEFT,
            )
        if ".lora_" in name or not name.endswith((".weight", ".bias")):
            raise AdapterError(
                f"The adapter has a tensor {tensor.name!r} that means nothing known",
                why="Leaving it out would give a model that answers differently.",
                next=MERGE_WITH_PEFT,
            )
        if ".base_layer." in name:
            # A trained bias lies there too; a weight there is the base's own.
            kind = ReplacementKind.BASE_COPY if name.endswith(".weight") else ReplacementKind.TRAINED
            self._replacements.append(Replacement(name.replace(".base_layer.", "."), tensor, kind))
            return
        self._replacements.append(Replacement(_WRAPPING.sub(".", name), tensor))

    def _pair(self, module: str, parts: dict[str, AdapterTensor]) -> LoraPair:
        target = module + ".weight"
        is_embedding = "embedding_a" in parts or "embedding_b" in parts
        names = ("embedding_a", "embedding_b") if is_embedding else ("a", "b")
        halves = {half: parts[name] for half, name in zip("ab", names, strict=True) if name in parts}
        if len(halves) < 2:
            raise missing_half(target, halves or parts)
        a, b = halves["a"], halves["b"]
        if is_embedding:
            a, b = b.transposed(), a.transposed()
        config = self._config
        pair = make_pair(target, a, b, config.alpha_of(module), is_rank_stabilized=config.is_rank_stabilized)
        if pair.rank != config.rank_of(module):
            raise AdapterError(
                f"The adapter's tensor {halves['a'].name!r} has rank {pair.rank}, and {CONFIG_NAME} says "
                f"{config.rank_of(module)}",
                why="The configuration and the weights do not belong together.",
                next="Get the adapter again from where it was made.",
            )
        return self._with_extras(pair, parts, is_embedding=is_embedding)

    def _with_extras(self, pair: LoraPair, parts: dict[str, AdapterTensor], *, is_embedding: bool) -> LoraPair:
        for part in ("magnitude", "bias"):
            vector = parts.get(part)
            if vector is not None and (is_embedding or vector.shape != pair.shape[:1]):
                raise AdapterError(
                    f"The adapter's tensor {vector.name!r} has the shape {vector.shape}",
                    why="One number for each row of the matrix is expected"
                    + (", and none for an embedding." if is_embedding else f": {pair.shape[:1]}."),
                    next=MERGE_WITH_PEFT,
                )
        if self._config.has_magnitudes and "magnitude" not in parts:
            raise AdapterError(
                f"The adapter has no magnitude vector for {pair.target!r}",
                why=f"{CONFIG_NAME} says use_dora, and DoRA needs one for each matrix.",
                next="Get the adapter again from where it was made.",
            )
        return LoraPair(
            pair.target, pair.a, pair.b, pair.scale, pair.strength, parts.get("magnitude"), parts.get("bias")
        )
