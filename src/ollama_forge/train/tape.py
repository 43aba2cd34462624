"""Products of a block's first pass, kept for its second one: what is kept is not multiplied again.

Recomputation (torch.utils.checkpoint) runs a block once more in backward and stops when it has everything that backward
needs. Keeping what a matrix gave costs 4 bytes for as many multiplications as the matrix has columns, which is half of
what keeping a block's other activations would cost. A product is kept when recomputation has asked for it before (a
block's last one is never needed again) and as long as there is room.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from types import TracebackType
from weakref import WeakSet

import torch

from ollama_forge.train.blocks import PackedMatrix

_at_work: ContextVar[_AtWork | None] = ContextVar("products_at_work", default=None)


def find_product(matrix: PackedMatrix) -> torch.Tensor | None:
    """What the matrix gave when this very block ran for the first time, if that was kept; it is then given away."""
    work = _at_work.get()
    return work.give(matrix) if isinstance(work, _Replay) else None


def offer_product(matrix: PackedMatrix, product: torch.Tensor) -> None:
    """Tell of what a matrix gives, [n, rows]; whoever changes it afterwards makes it worthless, and does no harm."""
    work = _at_work.get()
    if isinstance(work, _Recording):
        work.take(matrix, product.detach())  # with its graph it would hold itself


class ProductKeeper:
    """For one model: which products recomputation asks for, and the room that is left for them.

    Attributes:
        room_bytes: set it before each pass forward; what is kept is taken off.
    """

    def __init__(self) -> None:
        self.room_bytes = 0
        self._asked: WeakSet[PackedMatrix] = WeakSet()

    def is_asked(self, matrix: PackedMatrix) -> bool:
        """Whether recomputation has needed this matrix's product so far."""
        return matrix in self._asked

    def contexts(self) -> tuple[_Recording, _Replay]:
        """A `context_fn` of torch.utils.checkpoint: the contexts of a block's first pass and of its second one."""
        kept: _Kept = {}
        return _Recording(self, kept), _Replay(self, kept)

    def note_asked(self, matrix: PackedMatrix) -> None:
        self._asked.add(matrix)


# In the order in which a block met the matrix; None for what was not kept.
_Kept = dict[PackedMatrix, list[tuple[torch.Tensor, int] | None]]


class _AtWork:
    """A context that may be entered again: backward may go through a block twice."""

    def __init__(self, keeper: ProductKeeper, kept: _Kept) -> None:
        self.keeper = keeper
        self.kept = kept
        self._tokens: list[Token[_AtWork | None]] = []

    def __enter__(self) -> None:
        self._tokens.append(_at_work.set(self))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _at_work.reset(self._tokens.pop())


class _Recording(_AtWork):
    def take(self, matrix: PackedMatrix, product: torch.Tensor) -> None:
        size = product.numel() * product.element_size()
        is_kept = size <= self.keeper.room_bytes and self.keeper.is_asked(matrix)
        if is_kept:
            self.keeper.room_bytes -= size
        self.kept.setdefault(matrix, []).append((product, product._version) if is_kept else None)


class _Replay(_AtWork):
    def give(self, matrix: PackedMatrix) -> torch.Tensor | None:
        self.keeper.note_asked(matrix)
        products = self.kept.get(matrix)
        found = products.pop(0) if products else None
        return found[0] if found is not None and found[0]._version == found[1] else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self.kept.clear()
