"""Tensors that are computed ahead of the one that is being written, across the borders between tensors.

In: entries in the order of the file. Out: the chunks of each. Writing waits for the disk and hashes on one core; where
tensors have to be encoded, the other cores would have nothing to do meanwhile, and at each tensor's end all but one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ollama_forge.gguf.writer import TensorEntry

PIECES_AHEAD = 64  # some 10 MB of encoded weights: enough work to write, hash and sync beside it
_PIECES_PER_THREAD = 4


class Ahead:
    """Give the entries in their order; inside the `with` block the next computed ones are on their way.

    Entries in pieces are computed by several threads, `PIECES_AHEAD` pieces ahead; of the others one at a time, so that
    at most two of them exist. Leaving the block, also by an error, waits until nothing is computed.
    """

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        computed = [entry for entry in entries if entry.is_computed]
        self._n_threads = max((entry.n_threads for entry in computed if entry.pieces), default=1)
        self._most_ahead = max(PIECES_AHEAD, _PIECES_PER_THREAD * self._n_threads)
        self._jobs = self._jobs_of(computed)
        self._coming: deque[tuple[TensorEntry, int, Future[Iterable[Any]]]] = deque()
        self._n_ahead = 0
        self._is_stopped = False
        self._has_jobs = bool(computed)

    def __enter__(self) -> Ahead:
        if self._has_jobs:
            from concurrent.futures import ThreadPoolExecutor  # importing it takes time, and copying needs none

            self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="ahead")
            self._start_next()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped = True
        if self._has_jobs:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, entry: TensorEntry) -> Iterator[Any]:
        """The chunks of an entry whose turn has come; what computing them raised is raised here."""
        if not entry.is_computed:
            yield from entry.chunks()
            return
        while self._coming and self._coming[0][0] is entry:
            _, weight, coming = self._coming.popleft()
            self._n_ahead -= weight
            self._start_next()
            yield from coming.result()

    def _start_next(self) -> None:
        while self._n_ahead < self._most_ahead:
            job = next(self._jobs, None)
            if job is None:
                return
            entry, weight, compute = job
            self._coming.append((entry, weight, self._pool.submit(compute)))
            self._n_ahead += weight

    def _jobs_of(
        self, entries: Sequence[TensorEntry]
    ) -> Iterator[tuple[TensorEntry, int, Callable[[], Iterable[Any]]]]:
        """(whose, how many pieces it counts as, the call that gives some of its chunks)."""
        for entry in entries:
            if entry.pieces is None:
                yield entry, self._most_ahead, partial(self._compute_whole, entry)
            else:
                for piece in entry.pieces():
                    yield entry, 1, partial(_compute_piece, piece)

    def _compute_whole(self, entry: TensorEntry) -> list[Any]:
        chunks = []
        coming = iter(entry.chunks())
        for chunk in coming:
            chunks.append(chunk)
            if self._is_stopped:
                if isinstance(coming, Generator):
                    coming.close()  # ends the threads that it has started
                break
        return chunks


def _compute_piece(piece: Callable[[], Any]) -> tuple[Any, ...]:
    return (piece(),)
