"""Run a program that is not part of this package: find it, ask what it can do, pass on what it says as it says it.

In: an argv list, never a shell's string. Out: nothing, or a `ForgeError` with the program's own last words. What a
program may see of the environment is a list of names; tokens and keys are not on it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ollama_forge.errors import ForgeError, TrainingError

Output = Callable[[bytes], None]
"""Called with what the program writes, at once, in pieces of any length."""

HELP_TIMEOUT_SECONDS = 20.0
END_TIMEOUT_SECONDS = 10.0
_HELP_BYTES = 1 << 20
_KEPT_BYTES = 8192
_LAST_LINES = 4
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_LAST_LINE_CHARS = 400
_TELLING = re.compile(r"GGML_ASSERT|error|failed|abort|exception|out of memory|killed|cannot|unable", re.IGNORECASE)
_ALLOWED_ENVIRONMENT = re.compile(
    r"PATH|HOME|USER|LOGNAME|USERPROFILE|TMPDIR|TEMP|TMP|LANG|LANGUAGE|LC_[A-Z]+|TZ|TERM|NO_COLOR|SYSTEMROOT|WINDIR"
    r"|COMSPEC|APPDATA|LOCALAPPDATA|PROGRAMDATA|XDG_[A-Z]+_HOME|(LD|DYLD)_LIBRARY_PATH|CUDA_[A-Z_]+"
    r"|(HIP|ROCR|ONEAPI|GPU)_VISIBLE_DEVICES|NVIDIA_VISIBLE_DEVICES|NCCL_[A-Z_]+|(OMP|MKL|OPENBLAS)_NUM_THREADS"
    r"|VIRTUAL_ENV|CONDA_PREFIX|PYTHONPATH|CC|CXX|TORCH_HOME|TRITON_CACHE_DIR|TOKENIZERS_PARALLELISM"
    r"|HF_(HOME|HUB_CACHE|DATASETS_CACHE|ENDPOINT|HUB_OFFLINE|DATASETS_OFFLINE)|TRANSFORMERS_OFFLINE"
)


def find_program(name: str) -> Path | None:
    """The program of that name on PATH. Entries of PATH that are relative are left out: a folder that somebody else
    filled must not become a program by being the current one."""
    entries = [entry for entry in os.environ.get("PATH", "").split(os.pathsep) if Path(entry).is_absolute()]
    found = shutil.which(name, path=os.pathsep.join(entries)) if entries else None
    return Path(found) if found and Path(found).is_absolute() else None


def read_help(program: Path) -> str:
    """What `program --help` says on both of its outputs; empty when it cannot be run or does not end."""
    return read_output([str(program), "--help"])[1]


def read_output(command: Sequence[str], timeout_seconds: float = HELP_TIMEOUT_SECONDS) -> tuple[int | None, str]:
    """(exit code, what it says on both of its outputs) of a short program.

    The code is None and the text empty when it cannot be run or does not end in time.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=program_environment(),
                cwd=tempfile.gettempdir(),
                start_new_session=True,
            )
        except OSError:
            return None, ""
        try:
            code = process.wait(timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end(process)
        said.seek(0)
        return code, said.read(_HELP_BYTES).decode("utf-8", "replace")


def has_flag(help_text: str, flag: str) -> bool:
    """Whether a help text names `flag` as a word of its own."""
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_text) is not None


def run_program(
    command: Sequence[str],
    folder: Path,
    output: Output,
    *,
    failure: type[ForgeError] = TrainingError,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program to its end in `folder`. It writes to a terminal of its own, so that it holds no words back.

    Args:
        failure: the class of the error.
        environment: all that the program sees of it; None: `program_environment`.

    Raises:
        ForgeError: `failure`: it could not be started, or ended with an exit code other than 0.
    """
    last = b""
    with _started(command, folder, failure, environment) as (process, read):
        while chunk := read():
            output(chunk)
            last = (last + chunk)[-_KEPT_BYTES:]
        code = process.wait()
    if code:
        raise failure(
            f"{Path(command[0]).name!r} ended with {_ending(code)}",
            why=_last_words(last),
            next="Its own words above say why; the command was: " + quoted(command),
        )


def program_environment() -> dict[str, str]:
    """The environment that a program gets."""
    environment = {name: value for name, value in os.environ.items() if _ALLOWED_ENVIRONMENT.fullmatch(name.upper())}
    environment["PYTHONUNBUFFERED"] = "1"
    environment["GGML_NO_BACKTRACE"] = "1"  # an abort of ggml would start a debugger, whose words bury its own
    return environment


def quoted(command: Sequence[str]) -> str:
    """A command as a person may type it into a shell."""
    import shlex

    return " ".join(shlex.quote(word) for word in command)


@contextlib.contextmanager
def _started(
    command: Sequence[str], folder: Path, failure: type[ForgeError], environment: Mapping[str, str] | None
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], bytes]]]:
    opened = _open_terminal() if sys.platform != "win32" else None
    target = opened[1] if opened else subprocess.PIPE
    try:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=target,
            stderr=subprocess.STDOUT,
            env=program_environment() if environment is None else dict(environment),
            cwd=folder,
            start_new_session=True,
            preexec_fn=_terminal_owner(opened[1]) if opened else None,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        if opened:
            os.close(opened[0])
        raise failure(
            f"{command[0]!r} could not be started: {exc}",
            why="It is on PATH, but the system does not run it.",
            next="Check the file, or train without it: --trainer builtin"
            if failure is TrainingError
            else f"Check the file: ls -l {command[0]}",
        ) from exc
    finally:
        if opened:
            os.close(opened[1])
    try:
        yield process, (lambda: _read_terminal(opened[0], process)) if opened else (lambda: _read_pipe(process))
    except BaseException:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            _signal_group(process, signal.SIGINT)
            process.wait(timeout=END_TIMEOUT_SECONDS)
        _end(process)
        raise
    finally:
        if opened:
            os.close(opened[0])
        if process.stdout:
            process.stdout.close()


def _open_terminal() -> tuple[int, int]:
    """(our end, the program's end) of a pseudo-terminal that passes bytes on as they are."""
    import pty
    import tty

    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    return ours, theirs


def _terminal_owner(terminal: int) -> Callable[[], None]:
    """For the program's side of the fork: with the terminal its own, it is hung up when we die, however we die."""
    import fcntl
    import termios

    def own() -> None:
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    return own


def _read_terminal(terminal: int, process: subprocess.Popen[bytes]) -> bytes:
    """The next piece; empty at the end. A grandchild that stays behind does not keep us."""
    import select

    while True:
        ready, _, _ = select.select([terminal], [], [], 0.2)
        if ready:
            try:
                return os.read(terminal, 1 << 16)
            except OSError:  # Linux says so when the other end is closed
                return b""
        if process.poll() is not None:
            return b""


def _read_pipe(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    return os.read(process.stdout.fileno(), 1 << 16)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that the program and what it started are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    if sys.platform == "win32":
        if process.poll() is None:
            process.terminate()
        return
    os.killpg(process.pid, number)


def _ending(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"


def _last_words(said: bytes) -> str:
    """Lines that tell of trouble, and the last ones."""
    text = _ESCAPES.sub("", said.decode("utf-8", "replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]
    lines = [line[:_LAST_LINE_CHARS] for line in lines if line]
    telling = [line for line in lines[:-_LAST_LINES] if _TELLING.search(line)]
    return "\n".join(dict.fromkeys([*telling[-_LAST_LINES:], *lines[-_LAST_LINES:]]))
