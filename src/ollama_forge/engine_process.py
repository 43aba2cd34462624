"""The life of the engine's child process: start it, wait until the model is loaded, say why it died, end it.

In: a job (its kind, model, adapters, sizes). Out: a process that listens on a keyed loopback port, or that is asked
over its pipes. What is said belongs to `engine` and `engine_logits`; what runs inside the child to `engine_host`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from ollama_forge.errors import EngineError

SMALL_MODEL_BYTES = 16 << 20
LOG_LINES_KEPT = 200
LOG_LINE_BYTES = 2000
END_TIMEOUT_SECONDS = 5.0

_ALLOWED_ENVIRONMENT = re.compile(
    r"PATH|HOME|USERPROFILE|TMPDIR|TEMP|TMP|LANG|LC_[A-Z]+|TZ|SYSTEMROOT|WINDIR|COMSPEC|PROGRAMDATA|LOCALAPPDATA"
    r"|LD_LIBRARY_PATH|DYLD_LIBRARY_PATH|(CUDA|HIP|ROCR|ONEAPI|GPU)_VISIBLE_DEVICES|CUDA_DEVICE_ORDER"
    r"|OMP_NUM_THREADS|VK_ICD_FILENAMES|HSA_OVERRIDE_GFX_VERSION"
)
_LOG_PREFIX = re.compile(r"^(?:\d+\.)+\d+ ([DIWE]) +")
_TELLING = re.compile(
    r"GGML_ASSERT|error|failed|abort|terminate|what\(\)|out of memory|cannot|unable|invalid", re.IGNORECASE
)
_SAYS_NOTHING = re.compile(
    r"srv +init: exiting due to|common_fit_params:|llama_model_load_from_file_impl:"
    r"|(cmn|srv) +\S+: failed to load model"
)
_HOST = Path(__file__).with_name("engine_host.py")


class EngineProcess:
    """A running child.

    Attributes:
        reply: what it said when the model was loaded: `url`, where it listens, or `n_vocab`.
        key: to be shown where it listens.

    Raises:
        EngineError: the model does not load, the child dies, or loading takes longer than `timeout_seconds`.
    """

    def __init__(self, job: Mapping[str, object], *, model_path: Path, timeout_seconds: float) -> None:
        self.model_path = model_path
        self.key = secrets.token_hex(32)
        self._log: deque[str] = deque(maxlen=LOG_LINES_KEPT)
        self._process = _start()
        self._stdin = cast(IO[bytes], self._process.stdin)
        self._stdout = cast(IO[bytes], self._process.stdout)
        self._stderr = cast(IO[bytes], self._process.stderr)
        self._logger = threading.Thread(target=self._read_log, daemon=True)
        self._logger.start()
        try:
            self.reply = self._load(job, timeout_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, object], doing: str) -> dict[str, Any]:
        """Send a line of JSON and read the line that comes back.

        Raises:
            EngineError: the child died.
        """
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            raise self._broken_off(doing)
        return cast(dict[str, Any], json.loads(line))

    def read_into(self, buffer: memoryview, doing: str) -> None:
        """Fill a buffer with the bytes that follow a reply.

        Raises:
            EngineError: the child died.
        """
        stdout = cast(io.BufferedReader, self._stdout)
        n_read = 0
        while n_read < len(buffer):
            count = stdout.readinto(buffer[n_read:])
            if not count:
                raise self._broken_off(doing)
            n_read += count

    def _broken_off(self, doing: str) -> EngineError:
        return self.death(doing) or EngineError(
            f"llama.cpp did not {doing} with {str(self.model_path)!r}: the answer broke off",
            why=self.last_words(),
            next="Try again; if it happens again, check the file with `ollama-forge verify`.",
        )

    def _load(self, job: Mapping[str, object], timeout_seconds: float) -> dict[str, Any]:
        secret = {"key": self.key, "parent_pid": os.getpid(), "import_path": [entry for entry in sys.path if entry]}
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps({**job, **secret}).encode() + b"\n")
            self._stdin.flush()
        replies: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=lambda: replies.put(self._stdout.readline()), daemon=True).start()
        try:
            line = replies.get(timeout=timeout_seconds)
        except queue.Empty:
            raise EngineError(
                f"llama.cpp did not load {str(self.model_path)!r} within {timeout_seconds:g} seconds",
                why=self.last_words(),
                next="Wait until the machine is less busy, or try a smaller quantization or a smaller --param num_ctx.",
            ) from None
        reply = json.loads(line) if line else {}
        if reply and "error" not in reply:
            return cast(dict[str, Any], reply)
        ending = self._ending()
        raise EngineError(
            f"llama.cpp could not load {str(self.model_path)!r}" + ("" if line else f": {ending}"),
            why=self.last_words() or str(reply.get("error", "")),
            next="Check the file with `ollama-forge show`, or fetch or convert the model again.",
        )

    def death(self, doing: str) -> EngineError | None:
        """The error to raise when the child is gone, or None while it lives. A dying child gets a moment to be gone."""
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return None
        return EngineError(
            f"llama.cpp stopped while it was to {doing} with {str(self.model_path)!r}: {self._ending()}",
            why=self.last_words(),
            next="If the machine ran out of memory, try a smaller quantization or --param num_ctx; else check the file "
            "with `ollama-forge verify`.",
        )

    def last_words(self) -> str:
        """llama.cpp's last lines that tell of trouble (or its last lines), without the timestamps."""
        if self._process.poll() is not None:
            self._logger.join(timeout=1.0)
        lines = [_LOG_PREFIX.sub("", line) for line in list(self._log)]
        telling = [line for line in lines if _TELLING.search(line) and not _SAYS_NOTHING.match(line)]
        chosen = list(dict.fromkeys(telling or lines))[-6:]
        return "\n".join(line[:500] for line in chosen)

    def close(self) -> None:
        """End the child at once (it has nothing to save) and wait for it; its memory is free afterwards."""
        self._process.kill()
        self._process.wait()
        self._logger.join(timeout=1.0)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        if not self._logger.is_alive():
            self._stderr.close()

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return "no answer"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            return f"killed by {name}"
        return f"exit code {code}"

    def _read_log(self) -> None:
        while line := self._stderr.readline(LOG_LINE_BYTES):
            text = line.decode("utf-8", "replace").rstrip()
            if text:
                self._log.append(text)


def _start() -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if _ALLOWED_ENVIRONMENT.fullmatch(name.upper())}
    # Otherwise an abort of ggml starts a debugger to print a backtrace.
    environment["GGML_NO_BACKTRACE"] = "1"
    try:
        return subprocess.Popen(
            [sys.executable, "-I", str(_HOST)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as exc:
        raise EngineError(
            f"The engine's process could not be started: {exc}",
            why=f"It runs {sys.executable!r}.",
            next="Run `ollama-forge check`.",
        ) from exc


def usable_threads() -> int | None:
    """Cores that this process may use, or None where that is all of them (llama.cpp then counts the physical ones)."""
    n_cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else n_cores
    with contextlib.suppress(OSError, ValueError):
        # A container's share of processor time (cgroup v2): "max 100000" or "200000 100000".
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        allowed = min(allowed, max(1, int(quota) // int(period)))
    return allowed if allowed < n_cores else None


def default_threads(gguf_path: Path) -> int | None:
    """One thread for a model that fits a processor's cache: there, threads that wait for each other cost more than
    they bring, and on a busy machine they cost hundreds of times more."""
    return 1 if gguf_path.stat().st_size < SMALL_MODEL_BYTES else usable_threads()
