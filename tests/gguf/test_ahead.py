"""Computed tensors come one ahead of their turn, in order, and nothing goes on after the block."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from ollama_forge.errors import GGUFError
from ollama_forge.gguf.ahead import PIECES_AHEAD, Ahead
from ollama_forge.gguf.types import GGMLType
from ollama_forge.gguf.writer import TensorEntry, string, write_gguf

FIELDS = [string("general.architecture", "llama")]


def entry(name: str, chunks: Callable[[], Iterator[Any]], *, is_computed: bool = True) -> TensorEntry:
    return TensorEntry(name, (2, 4), GGMLType.F32, chunks, is_computed=is_computed)


def halves(value: int) -> Callable[[], Iterator[bytes]]:
    return lambda: iter([bytes([value]) * 16, bytes([value + 100]) * 16])


def written(entries: list[TensorEntry]) -> bytes:
    sink = io.BytesIO()
    write_gguf(sink, FIELDS, entries)
    return sink.getvalue()


@pytest.mark.parametrize("computed", [(), (0,), (1, 2), (0, 3), (0, 1, 2, 3)], ids=str)
def test_the_file_is_the_same_whoever_is_ahead(computed: tuple[int, ...]) -> None:
    plain = [entry(f"t{number}", halves(number), is_computed=False) for number in range(4)]
    mixed = [entry(f"t{number}", halves(number), is_computed=number in computed) for number in range(4)]
    assert written(mixed) == written(plain)


def test_the_next_tensor_is_computed_while_this_one_is_written() -> None:
    second_began = threading.Event()

    def second() -> Iterator[bytes]:
        second_began.set()
        yield bytes(32)

    class Sink(io.BytesIO):
        def write(self, data: Any) -> int:
            # the first tensor's bytes arrive only when the second one is under way
            if bytes(data[:1]) == b"\x07":
                assert second_began.wait(timeout=30)
            return super().write(data)

    write_gguf(Sink(), FIELDS, [entry("a", lambda: iter([b"\x07" * 32])), entry("b", second)])
    assert second_began.is_set()


def test_not_more_than_one_is_ahead() -> None:
    begun: list[str] = []

    def noting(name: str) -> Callable[[], Iterator[bytes]]:
        def chunks() -> Iterator[bytes]:
            begun.append(name)
            yield bytes(32)

        return chunks

    entries = [entry(name, noting(name)) for name in "abcd"]
    with Ahead(entries) as ahead:
        for place, item in enumerate(entries):
            assert list(ahead.take(item)) == [bytes(32)]
            assert len(begun) <= place + 2
    assert begun == list("abcd")


def test_what_computing_raises_is_raised_at_the_tensors_turn() -> None:
    def damaged() -> Iterator[bytes]:
        yield bytes(16)
        raise GGUFError("'b' holds a weight that is not a finite number")

    taken = []
    entries = [entry("a", halves(1)), entry("b", damaged), entry("c", halves(3))]
    with pytest.raises(GGUFError, match="'b'"), Ahead(entries) as ahead:
        for item in entries:
            taken.append(list(ahead.take(item)))
    assert taken == [list(halves(1)())]


def test_a_sink_that_fails_ends_the_computing() -> None:
    has_begun, is_over = threading.Event(), threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                has_begun.set()
                yield b""
        finally:
            is_over.set()

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if bytes(data[:1]) == b"\x07":
                assert has_begun.wait(timeout=30)
                raise OSError(28, "No space left on device")
            return super().write(data)

    before = threading.active_count()
    with pytest.raises(OSError, match="space"):
        write_gguf(Full(), FIELDS, [entry("a", lambda: iter([b"\x07" * 32])), entry("b", endless)])
    assert is_over.wait(timeout=30)
    assert threading.active_count() == before


def test_a_tensor_of_the_wrong_size_is_still_refused() -> None:
    with pytest.raises(GGUFError, match="needs 32 bytes, and only 31"):
        written([entry("a", lambda: iter([bytes(31)]))])
    with pytest.raises(GGUFError, match="needs 32 bytes, and more"):
        written([entry("a", lambda: iter([bytes(33)])), entry("b", halves(1))])


# --- entries in pieces ------------------------------------------------------------------------------------------------


def in_pieces(name: str, pieces: list[Callable[[], Any]], **more: Any) -> TensorEntry:
    """A float32 tensor of 16 bytes for each piece."""
    chunks = lambda: (piece() for piece in pieces)  # noqa: E731
    return TensorEntry(
        *(name, (len(pieces), 4), GGMLType.F32, chunks),
        is_computed=True,
        pieces=lambda: iter(pieces),
        n_threads=2,
        **more,
    )


def test_pieces_are_written_in_order_whichever_is_done_first() -> None:
    second_is_done = threading.Event()

    def slow() -> bytes:
        assert second_is_done.wait(timeout=30)
        return b"\x01" * 16

    def fast() -> bytes:
        second_is_done.set()
        return b"\x02" * 16

    assert written([in_pieces("a", [slow, fast])]).endswith(b"\x01" * 16 + b"\x02" * 16)


def test_a_tensors_last_piece_and_the_next_ones_first_are_computed_together() -> None:
    both = threading.Barrier(2, timeout=30)

    def meeting() -> bytes:
        both.wait()
        return bytes(16)

    written([in_pieces("a", [meeting]), in_pieces("b", [meeting])])


def test_pieces_wait_until_earlier_ones_are_taken() -> None:
    begun: list[int] = []

    def noting(number: int) -> bytes:
        begun.append(number)
        return bytes(16)

    pieces = [partial(noting, number) for number in range(4 * PIECES_AHEAD)]
    first, second = in_pieces("a", pieces[:10]), in_pieces("b", pieces[10:])
    n_taken = 0
    with Ahead([first, second]) as ahead:
        for item in (first, second):
            for _ in ahead.take(item):
                n_taken += 1
                assert len(begun) <= n_taken + PIECES_AHEAD
    assert sorted(begun) == list(range(4 * PIECES_AHEAD))


def test_a_piece_that_fails_is_told_of_at_its_tensors_turn_and_ends_the_rest() -> None:
    def damaged() -> bytes:
        raise GGUFError("'b' holds a weight that is not a finite number")

    good, bad = in_pieces("a", [lambda: bytes(16)]), in_pieces("b", [damaged])
    taken = []
    before = threading.active_count()
    with pytest.raises(GGUFError, match="'b'"), Ahead([good, bad]) as ahead:
        taken += ahead.take(good)
        list(ahead.take(bad))
    assert taken == [bytes(16)] and threading.active_count() == before


def test_memory_is_given_back_when_a_tensor_is_written() -> None:
    order: list[str] = []

    class Sink(io.BytesIO):
        def write(self, data: Any) -> int:
            if bytes(data[:1]) in (b"\x07", b"\x08"):
                order.append(f"write {data[0]}")
            return super().write(data)

    entries = [
        in_pieces("a", [lambda: b"\x07" * 32, lambda: b""], release=lambda: order.append("release a")),
        in_pieces("b", [lambda: b"\x08" * 16], release=lambda: order.append("release b")),
    ]
    write_gguf(Sink(), FIELDS, entries)
    assert order == ["write 7", "release a", "write 8", "release b"]
