"""Kill a command at a chosen point, for real: SIGKILL, no clean-up, no luck with timing.

The child runs the true code under an audit hook that counts what it is about to do to files below some folders (open,
rename, link, mkdir, unlink, chmod, utime, rmdir), every fsync, and every write or copy through `HashingWriter`. At
event number K it kills itself; in a write or a copy, after half of the bytes. Sweeping K over all events visits every
state that a crash can leave.

    total = count_events(["-m", "ollama_forge", "import", ...], [store])
    outcome = run_and_kill(["-m", "ollama_forge", "import", ...], 17, [store])       # one fresh interpreter
    outcomes = kill_forks("from ... import ...", "land(...ROOT...)", [(root, 17), ...])   # many, one warm interpreter
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_EVENTS = {
    "open",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "os.chown",
    "os.utime",
    "os.truncate",
    "shutil.rmtree",
}


@dataclass(frozen=True)
class Outcome:
    """How a child ended. `n_events` is how far it came."""

    was_killed: bool
    returncode: int
    n_events: int
    stdout: str = ""
    stderr: str = ""


def run_and_kill(
    argv: Sequence[str],
    event_number: int,
    folders: Sequence[Path],
    *,
    environ: Mapping[str, str] | None = None,
    timeout_seconds: float = 300,
) -> Outcome:
    """Run `python argv...` and kill it when it is about to do its event number `event_number`; 0 lets it end.

    Args:
        argv: what would follow `python`: `["-m", "module", ...]`, `["-c", "code", ...]` or `["script.py", ...]`.
        folders: only events on paths below these count; a write and an fsync always do.
    """
    with tempfile.TemporaryDirectory() as scratch:
        counter = Path(scratch) / "events"
        command = [sys.executable, __file__, str(event_number), str(counter), os.pathsep.join(map(str, folders)), *argv]
        done = subprocess.run(
            command,
            env=None if environ is None else dict(environ),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
        n_events = len(counter.read_bytes()) if counter.exists() else 0
    return Outcome(done.returncode == -signal.SIGKILL, done.returncode, n_events, done.stdout, done.stderr)


def count_events(argv: Sequence[str], folders: Sequence[Path], *, environ: Mapping[str, str] | None = None) -> int:
    """How many events a whole run has. It really runs; it must succeed."""
    outcome = run_and_kill(argv, 0, folders, environ=environ)
    if outcome.returncode:
        raise AssertionError(f"the command fails without being killed: {outcome.stderr or outcome.stdout}")
    return outcome.n_events


def kill_forks(preparation: str, code: str, runs: Sequence[tuple[Path, int]]) -> list[Outcome]:
    """Run `code` once for each (folder, event number), each in a fork of one interpreter that ran `preparation`.

    `code` finds its folder as `ROOT` (a `pathlib.Path`); event number 0 lets it end.
    """
    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{number}\t{Path(scratch) / str(index)}\t{root}" for index, (root, number) in enumerate(runs)]
        command = [sys.executable, __file__, "--fork", preparation, code]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise AssertionError(done.stderr)
        codes = [int(word) for word in done.stdout.split()]
        counts = [len((Path(scratch) / str(index)).read_bytes()) for index in range(len(runs))]
    return [
        Outcome(returncode == -signal.SIGKILL, returncode, count, stderr=done.stderr)
        for returncode, count in zip(codes, counts, strict=True)
    ]


class _Reaper:
    """Counts events in a file, one byte each, because a killed process tells nothing afterwards."""

    def __init__(self, event_number: int, counter: str, folders: Sequence[str]) -> None:
        self._event_number = event_number
        self._n_events = 0
        self._folders = tuple(str(Path(folder).absolute()) for folder in folders)
        self._counter = os.open(counter, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(self) -> None:
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            if self._count():
                self._die()
            fsync(descriptor)

        os.fsync = counted_fsync  # fsync raises no audit event

        from ollama_forge.files import FileSpan, HashingWriter

        write, copy = HashingWriter.write, HashingWriter.copy

        def torn_write(writer: HashingWriter, data: bytes | bytearray | memoryview) -> int:
            if self._count():
                stream = writer._stream
                stream.write(memoryview(data).cast("B")[: len(memoryview(data).cast("B")) // 2])
                stream.flush()
                self._die()
            return write(writer, data)

        def torn_copy(writer: HashingWriter, span: FileSpan, advance: object = None) -> bool:
            if writer._hash is None and self._count():
                copy(writer, FileSpan(span.descriptor, span.offset, span.n_bytes // 2))
                self._die()
            return copy(writer, span, advance)  # type: ignore[arg-type]

        HashingWriter.write = torn_write  # type: ignore[method-assign]
        HashingWriter.copy = torn_copy  # type: ignore[method-assign]

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event not in _EVENTS or not any(self._is_inside(argument) for argument in arguments[:2]):
            return
        if self._count():
            self._die()

    def _is_inside(self, argument: object) -> bool:
        if not isinstance(argument, (str, bytes, os.PathLike)):
            return False
        path = str(Path(os.fsdecode(argument)).absolute())
        return any(path == folder or path.startswith(folder + os.sep) for folder in self._folders)

    def _count(self) -> bool:
        self._n_events += 1
        os.write(self._counter, b".")
        return self._n_events == self._event_number

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def _run_argv(argv: list[str]) -> None:
    if argv[0] == "-c":
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<killed>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")


def _fork_each(preparation: str, code: str) -> None:
    names: dict[str, object] = {}
    exec(compile(preparation, "<preparation>", "exec"), names)
    program = compile(code, "<killed>", "exec")
    for line in sys.stdin.read().splitlines():
        number, counter, root = line.split("\t")
        child = os.fork()
        if not child:
            _Reaper(int(number), counter, [root]).watch()
            status = 1
            try:
                exec(program, {**names, "ROOT": Path(root)})
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(ended)}\n")


if __name__ == "__main__":
    sys.path.pop(0)  # the tests' folder is not on the path of what is killed
    if sys.argv[1] == "--fork":
        _fork_each(sys.argv[2], sys.argv[3])
    else:
        _Reaper(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(os.pathsep)).watch()
        _run_argv(sys.argv[4:])
