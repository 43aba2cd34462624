"""The one way in which a job is run and measured: in a child process, alone, several times, beside its peer.

Time is wall time of the whole child (start-up included, because a person waits for that too), memory is the child's
own high-water mark as `wait4` reports it. Runs of the two sides alternate, so that a slow minute of the machine falls
on both; where they take minutes they alternate every two seconds. Figures are medians.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SLICE_SECONDS = 2.0


class FailedRunError(Exception):
    """A measured command did not end well; the message carries the end of what it said."""


@dataclass(frozen=True)
class Command:
    """One program as it is measured; `clean` is called before each run (remove its output)."""

    label: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    clean: Callable[[], None] | None = None


@dataclass(frozen=True)
class Run:
    """What one run cost."""

    seconds: float
    peak_bytes: int
    output: str
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """What several runs of one command cost."""

    label: str
    runs: tuple[Run, ...]

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_bytes(self) -> int:
        return int(statistics.median(run.peak_bytes for run in self.runs))

    @property
    def cpu_seconds(self) -> float:
        """Processor time, user and system: what the job costs when the machine is busy with others too."""
        return statistics.median(run.cpu_seconds for run in self.runs)

    @property
    def spread(self) -> str:
        """Fastest and slowest run, for the reader who doubts the median."""
        seconds = sorted(run.seconds for run in self.runs)
        return f"{seconds[0]:.3g}-{seconds[-1]:.3g} s"


def ratio_in_pairs(ours: Measurement, theirs: Measurement) -> float:
    """The median of the rounds' ratios of seconds: both sides of a pair met the same weather of the machine."""
    return statistics.median(one.seconds / other.seconds for one, other in zip(ours.runs, theirs.runs, strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the results: ours beside a peer or a floor, and what was promised."""

    job: str
    ours: str
    beside: str
    ratio: str
    target: str
    held: bool | None
    note: str = ""


@dataclass(frozen=True)
class Job:
    """One entry of a module's `JOBS`: a name to choose it by, and the function that measures it."""

    name: str
    measure: Callable[[Workshop], list[Row]]


@dataclass(frozen=True)
class Workshop:
    """Where a bench runs: the folder for its data, and how often each side is run."""

    folder: Path
    repeats: int
    large_layers: int
    n_threads: int

    def python(self, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, *arguments)

    def make(self, what: str, name: str, number: int) -> Path:
        """An input of `random_models.py`, made in a child and only once."""
        path = self.folder / name
        script = str(Path(__file__).resolve().with_name("random_models.py"))
        if what != "vocabulary" or not path.is_file():
            run_once(Command(f"make {name}", self.python(script, what, str(path), str(number))))
        return path

    def forge(self, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "ollama_forge", *arguments)


def run_once(command: Command) -> Run:
    """Run one command to its end, after the file systems have come to rest.

    Raises:
        FailedRunError: it did not exit with 0.
    """
    if command.clean:
        command.clean()
    os.sync()
    environment = _environment(command)
    began = time.perf_counter()
    child = subprocess.Popen(command.argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    with child:
        output = (child.stdout.read() if child.stdout else b"").decode("utf-8", "replace")
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
    return _ended(command, child.returncode, seconds, usage, output)


def _environment(command: Command) -> dict[str, str]:
    environment = {**os.environ, **command.environment}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps its bytecode
    return environment


def _ended(command: Command, code: int, seconds: float, usage: resource.struct_rusage, output: str) -> Run:
    if code:
        raise FailedRunError(f"{' '.join(command.argv)} exited with {code}:\n{output[-2000:]}")
    scale = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_maxrss * scale, output, usage.ru_utime + usage.ru_stime)


def run_side_by_side(commands: Sequence[Command], repeats: int) -> list[Measurement]:
    """Run the commands in turn, `repeats` times each; one measurement per command, in their order."""
    runs: list[list[Run]] = [[] for _ in commands]
    for _ in range(repeats):
        for index, command in enumerate(commands):
            runs[index].append(run_once(command))
            print(f"    {command.label}: {runs[index][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    return [Measurement(command.label, tuple(taken)) for command, taken in zip(commands, runs, strict=True)]


def run_in_slices(commands: Sequence[Command], repeats: int) -> list[Measurement]:
    """As `run_side_by_side`, for commands that take minutes: all of them are begun, and one at a time goes on for two
    seconds while the others are stopped. A run's seconds are those in which it went on. Linux only.

    The system still writes out what one wrote while the next one runs, so in each round another one is the first.
    """
    runs: list[list[Run]] = [[] for _ in commands]
    for number in range(repeats):
        for command in commands:
            if command.clean:
                command.clean()
        os.sync()
        sliced = [_Sliced(command) for command in commands]
        first = number % len(sliced)
        try:
            while any(child.run is None for child in sliced):
                for child in [*sliced[first:], *sliced[:first]]:
                    child.go_on()
        finally:
            for child in sliced:
                child.kill()
        for taken, child in zip(runs, sliced, strict=True):
            assert child.run is not None
            taken.append(child.run)
            print(f"    {child.command.label}: {child.run.seconds:.2f} s", file=sys.stderr, flush=True)
    return [Measurement(command.label, tuple(taken)) for command, taken in zip(commands, runs, strict=True)]


class _Sliced:
    """A command that goes on only while it is told to; `run` is known when it has ended."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.run: Run | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `kill`
        self._seconds = 0.0

    def go_on(self) -> None:
        """A slice of it, or what is left."""
        if self.run is not None:
            return
        began = time.perf_counter()
        if self._child is None:
            self._child = subprocess.Popen(
                self.command.argv,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                env=_environment(self.command),
                start_new_session=True,
            )
        else:
            os.killpg(self._child.pid, signal.SIGCONT)
        handle = os.pidfd_open(self._child.pid)
        try:
            is_over = bool(select.select([handle], [], [], SLICE_SECONDS)[0])
        finally:
            os.close(handle)
        if not is_over:
            os.killpg(self._child.pid, signal.SIGSTOP)
        self._seconds += time.perf_counter() - began
        if is_over:
            _, status, usage = os.wait4(self._child.pid, 0)
            self._child.returncode = os.waitstatus_to_exitcode(status)
            self._said.seek(0)
            output = self._said.read().decode("utf-8", "replace")
            self.run = _ended(self.command, self._child.returncode, self._seconds, usage, output)

    def kill(self) -> None:
        """End it where another one failed."""
        self._said.close()
        if self._child is not None and self._child.returncode is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def removing(*paths: Path) -> Callable[[], None]:
    """A `clean` that takes the named files away."""

    def clean() -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    return clean


def show(measurement: Measurement) -> str:
    """Seconds and peak memory as a cell of the results."""
    return f"{measurement.label}: {show_seconds(measurement.seconds)}, {measurement.peak_bytes / 1e6:.0f} MB"


def show_seconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
