"""A LoRA GGUF (or an old ggla file) becomes a PEFT folder that `PeftModel.from_pretrained` loads.

In: a `FittedAdapter`. Out: adapter_config.json and the entries of adapter_model.safetensors. Rows of Llama's queries
and keys go back into the order of transformers; the numbers stay what they were.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ollama_forge.arch import layout
from ollama_forge.arch.rows import Role, TensorAddress, Transform
from ollama_forge.errors import AdapterError
from ollama_forge.gguf.writer import Sink
from ollama_forge.transform.edits import Floats
from ollama_forge.transform.origin import hub_names
from ollama_forge.weights.adapter_fit import FittedAdapter, FittedPair, is_vector
from ollama_forge.weights.adapter_peft import PREFIX

_EMBEDDINGS = (Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING)


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A float32 tensor to be written; `read` is called when its turn comes."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]


@dataclass(frozen=True, eq=False)
class PeftAdapter:
    """A PEFT folder that is decided but not yet computed."""

    config: dict[str, Any]
    tensors: tuple[StoredArray, ...]

    @property
    def size_bytes(self) -> int:
        """Of the weights, about."""
        return sum(4 * math.prod(tensor.shape) for tensor in self.tensors) + 200 * len(self.tensors)


def plan_peft(fitted: FittedAdapter) -> PeftAdapter:
    """Decide everything; no number is read.

    Raises:
        AdapterError: the base's family is not known, or something that PEFT cannot say; it is named.
    """
    if fitted.base.family is None:
        raise AdapterError(
            f"How transformers names the tensors of {fitted.base.architecture!r} models is not known",
            why="So the adapter can only be used as a GGUF file.",
            next="Merge it: ollama-forge merge BASE ADAPTER -o OUT.gguf",
        )
    for item in fitted.replacements:
        raise AdapterError(
            f"The adapter's tensor {item.replacement.tensor.name!r} has no place in a PEFT folder",
            why="llama.cpp ignores it, so what it does was never seen.",
            next="Convert the adapter that the file was made from.",
        )
    tensors: list[StoredArray] = []
    for pair in fitted.pairs:
        tensors += _tensors_of(pair)
    return PeftAdapter(_config(fitted), tuple(sorted(tensors, key=lambda tensor: tensor.name)))


def write_safetensors(sink: Sink, tensors: Sequence[StoredArray]) -> None:
    """Write float32 tensors as safetensors, one at a time (https://github.com/huggingface/safetensors#format)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + 4 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little"))
    sink.write(text)
    for tensor in tensors:
        values = np.ascontiguousarray(tensor.read(), dtype="<f4")
        if values.shape != tensor.shape:
            raise AdapterError(f"{tensor.name!r} became {values.shape}, and {tensor.shape} was planned")
        sink.write(values.tobytes())


def _module(pair: FittedPair) -> str:
    home = pair.home
    if home.row is None or is_vector(pair) or home.row.is_bias:
        raise AdapterError(
            f"The adapter's tensor {pair.pair.b.name!r} has no place in a PEFT folder",
            why=f"transformers has no matrix for {pair.gguf_name!r}.",
            next="Merge it: ollama-forge merge BASE ADAPTER -o OUT.gguf",
        )
    return TensorAddress(home.row, home.layer, home.expert).hf_name.removesuffix(".weight")


def _tensors_of(pair: FittedPair) -> Iterator[StoredArray]:
    module = PREFIX + _module(pair)
    n_outputs, n_inputs = pair.pair.shape
    rank = pair.pair.rank
    row, config = pair.home.row, pair.base.config

    def outputs() -> Floats:
        values = pair.read_b()
        if row is not None and row.transform in (Transform.PERMUTE_QUERY, Transform.PERMUTE_KEY):
            if config is None:
                raise AdapterError(
                    f"{pair.base.name!r} does not say how many heads it has",
                    why=f"The rows of {pair.gguf_name!r} stand in another order in transformers.",
                    next="Name another file of the base with --base.",
                )
            values = layout.to_hf(values, row.transform, config)
        return values

    if pair.role in _EMBEDDINGS:
        yield StoredArray(f"{module}.lora_embedding_A", (rank, n_outputs), lambda: outputs().T)
        yield StoredArray(f"{module}.lora_embedding_B", (n_inputs, rank), lambda: pair.read_a().T)
    else:
        yield StoredArray(f"{module}.lora_A.weight", (rank, n_inputs), pair.read_a)
        yield StoredArray(f"{module}.lora_B.weight", (n_outputs, rank), outputs)


def _config(fitted: FittedAdapter) -> dict[str, Any]:
    modules = {_module(pair): pair.pair for pair in fitted.pairs}
    rank = Counter(pair.rank for pair in modules.values()).most_common(1)[0][0]
    alpha = Counter(pair.strength for pair in modules.values()).most_common(1)[0][0]
    names = hub_names(fitted.adapter.base_names) or hub_names(fitted.base.names)
    is_conv = any(pair.home.row is not None and pair.home.row.transform is Transform.TRANSPOSE for pair in fitted.pairs)
    return {
        "alora_invocation_tokens": list(fitted.adapter.invocation_tokens) or None,
        "alpha_pattern": {name: _plain(pair.strength) for name, pair in modules.items() if pair.strength != alpha},
        "base_model_name_or_path": names[0] if names else None,
        "bias": "none",
        "fan_in_fan_out": is_conv,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {name: pair.rank for name, pair in modules.items() if pair.rank != rank},
        "target_modules": sorted(_short_names(modules)),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _short_names(modules: dict[str, Any]) -> set[str]:
    """`q_proj` where every layer has each of them; else whole names, so that PEFT makes no others."""
    counts = Counter(name.rpartition(".")[2] for name in modules)
    return set(counts) if len(set(counts.values())) == 1 else set(modules)


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
