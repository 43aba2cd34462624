"""What a model expects at every place of a text: logits, computed by llama.cpp itself.

In: a GGUF, LoRA GGUFs, and rows of tokens. Out: float32 logits. llama.cpp lives in a child process as in `engine`,
keeps its blocks packed and rounds as it does when it answers, so numbers made of these logits are those of llama.cpp's
own tools. `engine_logits_host` is the child's side.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ollama_forge.engine_logits_host import SYMBOLS
from ollama_forge.engine_process import EngineProcess, default_threads
from ollama_forge.errors import EngineError
from ollama_forge.gguf.native import bundled_library, usable_cores

_LARGEST_BATCH = 512  # as llama.cpp's tools have it by default
LOAD_TIMEOUT_SECONDS = 600.0
_PIECE_BYTES = 32 << 20
_CONTEXT_STEP = 256  # llama.cpp keeps its cache in such steps


class LogitsEngine:
    """A loaded model that tells what it expects. Close it, or use it in a `with` block.

    Attributes:
        model_path: the GGUF.
        n_vocab: tokens that the model knows.
        context_length: of the longest row of tokens.
    """

    def __init__(self, process: EngineProcess, context_length: int) -> None:
        self._process = process
        self.model_path = process.model_path
        self.context_length = context_length
        self.n_vocab = int(process.reply["n_vocab"])

    def __enter__(self) -> LogitsEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process; all its memory is given back."""
        self._process.close()

    def logits(self, token_ids: Sequence[int], wanted: Sequence[bool]) -> Iterator[NDArray[np.float32]]:
        """Read a row of tokens from its beginning.

        Args:
            token_ids: at most the context's length.
            wanted: of each token, whether the logits of what follows it are asked for.

        Yields:
            float32 [n, n_vocab], in order, as many rows at once as fit 32 MB; all of them once exhausted.

        Raises:
            EngineError: llama.cpp refuses (a token outside the vocabulary, a row longer than the context), or it died.
        """
        if len(token_ids) > self.context_length:
            raise self._refusal(token_ids, f"The context has {self.context_length:,} tokens.")
        step = _batch_length(self.context_length)
        for start in range(0, len(token_ids), step):
            asked = [index for index, want in enumerate(wanted[start : start + step]) if want]
            batch = list(token_ids[start : start + step])
            reply = self._process.ask({"token_ids": batch, "position": start, "asked": asked}, "read a text")
            if "error" in reply:
                raise self._refusal(token_ids, f"{reply['error']}\n{self._process.last_words()}".strip())
            yield from self._rows(len(asked))

    def _refusal(self, token_ids: Sequence[int], why: str) -> EngineError:
        return EngineError(
            f"llama.cpp did not read a text of {len(token_ids):,} tokens with {str(self.model_path)!r}",
            why=why,
            next="Use a smaller --context, or check the file with `ollama-forge verify`.",
        )

    def _rows(self, n_rows: int) -> Iterator[NDArray[np.float32]]:
        step = max(1, _PIECE_BYTES // (4 * self.n_vocab))
        for start in range(0, n_rows, step):
            rows = np.empty((min(step, n_rows - start), self.n_vocab), np.float32)
            self._process.read_into(memoryview(rows.data).cast("B"), "read a text")
            yield rows


def open_logits_engine(
    gguf_path: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    context_length: int,
    n_threads: int | None = None,
    n_gpu_layers: int | None = None,
    timeout_seconds: float = LOAD_TIMEOUT_SECONDS,
) -> LogitsEngine:
    """Load a GGUF in a child process.

    Args:
        adapters: LoRA GGUFs, each with its scale (1.0: as trained).
        context_length: of the longest row of tokens.
        n_threads: None: one for each core that this process may use; one for a very small model.
        n_gpu_layers: None: as many as llama.cpp puts there by itself.

    Raises:
        EngineError: llama.cpp cannot load the model or an adapter, or its library lacks what is needed.
    """
    job = {
        "kind": "logits",
        "library": str(bundled_library()),
        "model": str(gguf_path.absolute()),
        "adapters": [[str(path.absolute()), scale] for path, scale in adapters],
        "context_length": -(-context_length // _CONTEXT_STEP) * _CONTEXT_STEP,
        "n_batch": _batch_length(context_length),
        "n_threads": n_threads or default_threads(gguf_path) or usable_cores(),
        "n_gpu_layers": n_gpu_layers,
    }
    process = EngineProcess(job, model_path=gguf_path, timeout_seconds=timeout_seconds)
    return LogitsEngine(process, context_length)


def _batch_length(context_length: int) -> int:
    """Tokens that are computed together."""
    return min(_LARGEST_BATCH, context_length)


@functools.cache
def has_logits_engine() -> bool:
    """Whether the library of xllamacpp that is installed here exports llama.cpp's functions."""
    path = bundled_library()
    if path is None:
        return False
    try:
        handle = ctypes.CDLL(str(path))
    except OSError:
        return False
    return all(hasattr(handle, symbol) for symbol in SYMBOLS)
