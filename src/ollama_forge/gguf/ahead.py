"""Tensors that are computed, one ahead of the one that is being written.

In: entries in the order of the file. Out: the chunks of each. Writing waits for the disk and hashes on one core; where
a tensor has to be encoded, the other cores would have nothing to do meanwhile, and at a tensor's end all but one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ollama_forge.gguf.writer import TensorEntry


class Ahead:
    """Give the entries in their order; inside the `with` block the next computed one is on its way.

    At most two encoded tensors exist at a time. Leaving the block, also by an error, waits until nothing is computed.
    """

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self._waiting = deque(entry for entry in entries if entry.is_computed)
        self._is_stopped = False
        self._coming: Future[list[Any]] | None = None

    def __enter__(self) -> Ahead:
        if self._waiting:
            from concurrent.futures import ThreadPoolExecutor  # importing it takes time, and copying needs none

            self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
            self._start_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped = True
        if self._coming is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, entry: TensorEntry) -> Iterable[Any]:
        """The chunks of an entry whose turn has come; what computing them raised is raised here."""
        if not entry.is_computed:
            return entry.chunks()
        assert self._coming is not None
        chunks = self._coming.result()
        self._start_next()
        return chunks

    def _start_next(self) -> None:
        if self._waiting:
            self._coming = self._pool.submit(self._compute, self._waiting.popleft())

    def _compute(self, entry: TensorEntry) -> list[Any]:
        chunks = []
        coming = iter(entry.chunks())
        for chunk in coming:
            chunks.append(chunk)
            if self._is_stopped:
                if isinstance(coming, Generator):
                    coming.close()  # ends the threads that it has started
                break
        return chunks
