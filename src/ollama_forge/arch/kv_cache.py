"""How much memory the keys and values of a context take when llama.cpp (and so Ollama) runs a model.

In: GGUF metadata (of an open file, or the fields that a conversion would write) and a context length. Out: bytes, in
all or layer by layer. No tensor is read. It covers grouped heads, head counts and head sizes that differ from layer to
layer, sliding windows, compressed keys (MLA), layers that share another layer's cache, and recurrent layers.
Facts: src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp, src/llama-hparams.cpp and src/models of llama.cpp b11549.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ollama_forge.errors import GGUFError, UsageError
from ollama_forge.gguf.reader import GGUFFile

MAX_CONTEXT = 1 << 30
"""Tokens; far beyond any model, and a bound on what a user or a file may ask for."""

_PADDING = 256  # llama.cpp rounds the number of cells up to it
_BATCH = 512  # tokens that llama.cpp computes at once (n_ubatch): a sliding window needs room for them too
_MAX_LAYERS = 10_000
_MAX_NUMBER = 1 << 31


@dataclass(frozen=True)
class _Windows:
    """How a family alternates sliding and full attention where the file does not say it.

    Every `period`-th layer sees everything, the last of each group or with `is_full_first` the first. `window` stands
    for a missing key, `fixed` for a key whose number llama.cpp does not use.
    """

    period: int
    window: int = 0
    fixed: int = 0
    is_full_first: bool = False


_WINDOWS = {
    "gemma2": _Windows(2, window=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(0),
    "gemma-embedding": _Windows(6),
    "cohere2": _Windows(4),
    "cohere2moe": _Windows(0, is_full_first=True),
    "olmo2": _Windows(4),
    "gpt-oss": _Windows(2),
    "llama4": _Windows(4, fixed=8192),
    "exaone4": _Windows(4),
    "exaone-moe": _Windows(4, window=128),
    "afmoe": _Windows(4),
    "mellum": _Windows(4),
    "plamo3": _Windows(8),
    "smallthinker": _Windows(4, fixed=4096, is_full_first=True),
    "laguna": _Windows(4, is_full_first=True),
    "granite_swa": _Windows(0),
    "mimo2": _Windows(0),
    "step35": _Windows(0),
    "lfm2": _Windows(0),
    "lfm2moe": _Windows(0),
}
# Of other architectures llama.cpp ignores a window that the metadata name (Mistral 7B v0.1, Phi 3).

_FULL_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4}
_KV_LAYERS = {"gemma3n": 20}
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps: `cells` tokens, each with `key_width` and `value_width` numbers."""

    cells: int
    key_width: int
    value_width: int

    @property
    def elements(self) -> int:
        return self.cells * (self.key_width + self.value_width)


def kv_cache_bytes(model: GGUFFile | Mapping[str, Any], context: int, bytes_per_element: float = 2) -> int:
    """Bytes that keys and values of `context` tokens take.

    Args:
        model: an open file, or its metadata by full key (`llama.block_count`).
        context: tokens of one conversation (`num_ctx`).
        bytes_per_element: 2 for float16, what llama.cpp and Ollama use unless told otherwise; 34 / 32 for `q8_0`.

    Raises:
        UsageError: a context that is no number of tokens.
        GGUFError: the metadata lack a number, or hold one that cannot be.
    """
    return math.ceil(sum(layer.elements for layer in cache_layers(model, context)) * bytes_per_element)


def cache_layers(model: GGUFFile | Mapping[str, Any], context: int) -> tuple[LayerCache, ...]:
    """The cache of every layer, in order; a layer that keeps none has zeros. Raises as `kv_cache_bytes`."""
    if not 0 < context <= MAX_CONTEXT:
        raise UsageError(
            f"A context of {context!r} tokens is not possible",
            why=f"It must be a whole number from 1 to {MAX_CONTEXT:,}.",
            next="Example: --context 8192",
        )
    facts = _Facts(model.metadata if isinstance(model, GGUFFile) else model)
    return tuple(facts.layer(number, context) for number in range(facts.n_layers))


def trained_context(model: GGUFFile | Mapping[str, Any]) -> int | None:
    """The context that the model was trained for, in tokens, or None where the metadata do not say it."""
    metadata = model.metadata if isinstance(model, GGUFFile) else model
    value = metadata.get(f"{metadata.get('general.architecture', '')}.context_length")
    return value if isinstance(value, int) and value > 0 else None


class _Facts:
    """The numbers of a model that its cache depends on."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.architecture = str(metadata.get("general.architecture", ""))
        self.n_layers = self._count("block_count")
        if not 0 < self.n_layers <= _MAX_LAYERS:
            raise self._wrong("block_count", self.n_layers)
        heads = self._per_layer("attention.head_count")
        if heads is None and self.architecture not in _RECURRENT:
            raise self._wrong("attention.head_count", None)
        self._heads = heads or [0] * self.n_layers
        self._key_heads = self._per_layer("attention.head_count_kv") or self._heads
        most = max(self._heads)
        head_width = self._count("embedding_length") // most if most else 0
        self._widths = {}
        for kind in ("key", "value"):
            full = self._count(f"attention.{kind}_length", head_width)
            self._widths[kind] = (full, self._count(f"attention.{kind}_length_swa", full))
        self._is_compressed = self._count("attention.key_length_mla", 0) > 0
        self._window, self._slides = self._read_windows()
        self._is_recurrent = self._read_recurrent()
        shared = self._count("attention.shared_kv_layers", 0)
        self._n_with_cache = _KV_LAYERS.get(self.architecture, max(0, self.n_layers - shared))

    def layer(self, number: int, context: int) -> LayerCache:
        if number >= self._n_with_cache or self._is_recurrent(number):
            return LayerCache(0, 0, 0)
        slides = self._slides(number)
        cells = _padded(context)
        if slides:
            cells = min(cells, _padded(min(cells, self._window + _BATCH)))
        key, value = (self._widths[kind][slides] * self._key_heads[number] for kind in ("key", "value"))
        return LayerCache(cells, key, 0 if self._is_compressed else value)

    def _read_windows(self) -> tuple[int, Callable[[int], bool]]:
        """The window in tokens, and whether a layer has it."""
        family = _WINDOWS.get(self.architecture)
        if family is None:
            return 0, lambda _number: False
        window = self._count("attention.sliding_window", family.window)
        if window and family.fixed:
            window = family.fixed
        if not window:
            return 0, lambda _number: False
        pattern = self._value("attention.sliding_window_pattern")
        if isinstance(pattern, Sequence) and not isinstance(pattern, str):
            if len(pattern) < self.n_layers:
                raise self._wrong("attention.sliding_window_pattern", pattern)
            flags = [bool(flag) for flag in pattern[: self.n_layers]]
            return window, lambda number: flags[number]
        period = family.period if pattern is None else self._count("attention.sliding_window_pattern")
        if family.is_full_first:
            return window, lambda number: period > 0 and number % period != 0
        return window, lambda number: period > 0 and number % period < period - 1

    def _read_recurrent(self) -> Callable[[int], bool]:
        if self.architecture in _RECURRENT:
            return lambda _number: True
        interval = self._count("full_attention_interval", _FULL_INTERVALS.get(self.architecture, 0))
        return lambda number: interval > 0 and (number + 1) % interval != 0

    def _value(self, suffix: str) -> Any:
        return self._metadata.get(f"{self.architecture}.{suffix}")

    def _count(self, suffix: str, default: int | None = None) -> int:
        """A whole number; the largest where there is one for each layer."""
        value = self._value(suffix)
        if value is None and default is not None:
            return default
        if isinstance(value, Sequence) and not isinstance(value, str) and 0 < len(value) <= _MAX_LAYERS:
            return max(self._checked(suffix, item) for item in value)
        return self._checked(suffix, value)

    def _per_layer(self, suffix: str) -> list[int] | None:
        value = self._value(suffix)
        if value is None:
            return None
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(value) < self.n_layers:
                raise self._wrong(suffix, value)
            return [self._checked(suffix, item) for item in value[: self.n_layers]]
        return [self._checked(suffix, value)] * self.n_layers

    def _checked(self, suffix: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_NUMBER:
            raise self._wrong(suffix, value)
        return value

    def _wrong(self, suffix: str, value: object) -> GGUFError:
        return GGUFError(
            f"The metadata give {self.architecture + '.' + suffix!r} as {value!r}",
            why="The size of the cache of keys and values follows from it.",
            next="Check that the file is a language model: ollama-forge show FILE.",
        )


def _padded(cells: int) -> int:
    return -(-cells // _PADDING) * _PADDING
