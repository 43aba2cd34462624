"""Two long-lived programs that take a step each at the same time, in slices: one of them goes on for two seconds while
the other is stopped, so that a slow minute of the machine falls on both alike.

The child loads what it needs and calls `serve`; the parent calls `take_turns`. One line of JSON goes each way.
"""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO

from harness import SLICE_SECONDS, Command, FailedRunError


@dataclass(frozen=True)
class Turns:
    """What one program took: seconds to load, seconds of each step after the first, and high-water marks: of its
    memory, and of the card's where it says it."""

    load_seconds: float
    step_seconds: tuple[float, ...]
    peak_bytes: int
    card_bytes: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_seconds)


def ratio_of(ours: Turns, theirs: Turns) -> tuple[float, str]:
    """The median of the pairs' ratios, and the smallest and largest in words."""
    ratios = sorted(one / other for one, other in zip(ours.step_seconds, theirs.step_seconds, strict=True))
    return statistics.median(ratios), f"{len(ratios)} steps of each in turn, pairs {ratios[0]:.3f}-{ratios[-1]:.3f}x"


def take_turns(commands: Sequence[Command], n_steps: int, slice_seconds: float | None = SLICE_SECONDS) -> list[Turns]:
    """Load one program after the other, then a step of each, in slices; the first step of each is not counted.

    Args:
        slice_seconds: None for whole steps in turn, where stopping a program does not stop its work (a card's).

    Raises:
        FailedRunError: one ended early, or not with 0.
    """
    children: list[_Child] = []
    try:
        for command in commands:
            children.append(_Child(command))
            children[-1].load()
        for _ in range(n_steps + 1):
            for child in children:
                child.begin_step()
            while any(child.is_at_work for child in children):
                for child in children:
                    child.go_on(slice_seconds)
        return [child.end() for child in children]
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


class _Child:
    """One of the programs; its step's seconds are those in which it went on."""

    def __init__(self, command: Command) -> None:
        self._label = command.label
        self._load_seconds = 0.0
        self._steps: list[float] = []
        self._step_seconds = 0.0
        self._card_bytes = 0
        self.is_at_work = False
        self.process = subprocess.Popen(
            command.argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **command.environment},
            text=True,
        )

    def load(self) -> None:
        self._load_seconds = self._answer()["load"]

    def begin_step(self) -> None:
        """Stop it, and tell it what to do when it goes on."""
        self.process.send_signal(signal.SIGSTOP)
        stream = self._pipe(self.process.stdin)
        stream.write("\n")
        stream.flush()
        self.is_at_work, self._step_seconds = True, 0.0

    def go_on(self, slice_seconds: float | None) -> None:
        """A slice of the step, or what is left of it."""
        if not self.is_at_work:
            return
        began = time.perf_counter()
        self.process.send_signal(signal.SIGCONT)
        answered = select.select([self._pipe(self.process.stdout)], [], [], slice_seconds)[0]
        if not answered:
            self.process.send_signal(signal.SIGSTOP)
        self._step_seconds += time.perf_counter() - began
        if answered:
            self._card_bytes = int(self._answer().get("card_bytes", 0))
            self._steps.append(self._step_seconds)
            self.is_at_work = False
            print(f"    {self._label}: {self._steps[-1]:.2f} s", file=sys.stderr, flush=True)

    def end(self) -> Turns:
        self._pipe(self.process.stdin).close()
        _, status, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        if self.process.returncode:
            raise FailedRunError(f"{self._label} exited with {self.process.returncode}")
        scale = 1 if sys.platform == "darwin" else 1024
        return Turns(self._load_seconds, tuple(self._steps[1:]), usage.ru_maxrss * scale, self._card_bytes)

    def _answer(self) -> dict[str, float]:
        line = self._pipe(self.process.stdout).readline()
        if not line:
            raise FailedRunError(f"{self._label} ended early, with {self.process.wait()}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def _pipe(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def serve(load: Callable[[], Callable[[], float]], card_bytes: Callable[[], int] = lambda: 0) -> None:
    """The child's side: load, say so, and take a step whenever a line comes, until there are no more.

    Args:
        load: gives the function that takes a step and returns its loss.
        card_bytes: the high-water mark of the card's memory.
    """
    began = time.perf_counter()
    step = load()
    print(json.dumps({"load": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({"loss": step(), "card_bytes": card_bytes()}), flush=True)
