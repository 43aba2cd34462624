"""The child process of the engine: it loads one model into llama.cpp, and serves it on a keyed loopback port, or
answers with logits over its pipes.

In: one JSON line on stdin (the job). Out: one JSON line on stdout, `{"url": ...}` or `{"n_vocab": ...}` when the model
is loaded, or `{"error": ...}`; llama.cpp's log on stderr. It ends when stdin ends, so it never outlives its parent.
Run as a file, not as a module of the package: it must start in milliseconds, and knows where packages lie only when it
has read the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Load the model, say where it listens, wait for the end of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = _take_stdout()
    job = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = job["import_path"]
    _die_with_parent(job["parent_pid"], signal.SIGKILL)
    _leave_no_core_file()
    loaded = _load_logits(job) if job["kind"] == "logits" else _load_server(job)
    if isinstance(loaded, str):
        reply = {"error": loaded}
    else:
        reply = {"n_vocab": loaded.n_vocab} if job["kind"] == "logits" else {"url": loaded.listening_address}
    # Before the reply: the thread that reads it may end at once, and must not take the child along.
    _die_with_parent(job["parent_pid"], 0)
    replies.write(json.dumps(reply).encode() + b"\n")
    replies.flush()
    if "error" in reply:
        # An ordinary end, so that llama.cpp's log thread writes what it still holds.
        return
    if job["kind"] == "logits":
        from ollama_forge.engine_logits_host import answer_requests

        answer_requests(loaded, sys.stdin.buffer, replies)
    sys.stdin.buffer.read()
    # The server's destructor can wait for ever, and there is nothing to save: leave at once.
    os._exit(0)


def _load_logits(job: dict[str, Any]) -> Any:
    """The model, or the text of what went wrong."""
    try:
        from ollama_forge.engine_logits_host import LogitsModel

        return LogitsModel(job)
    except (ImportError, AttributeError, OSError, RuntimeError) as exc:
        return str(exc)


def _load_server(job: dict[str, Any]) -> Any:
    """The server that listens, or the text of what went wrong."""
    try:
        import xllamacpp
    except ImportError as exc:
        return f"xllamacpp cannot be imported: {exc}"
    try:
        return xllamacpp.Server(_parameters(xllamacpp, job))
    except (RuntimeError, ValueError, OSError) as exc:
        return str(exc)


def _parameters(xllamacpp: Any, job: dict[str, Any]) -> Any:
    parameters = xllamacpp.CommonParams()
    parameters.api_keys = [job["key"]]
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.ui = False
    parameters.offline = True
    parameters.verbosity = 2
    parameters.model.path = job["model"]
    parameters.n_ctx = job["context_length"]
    parameters.n_parallel = 1
    parameters.warmup = False
    # Its default keeps up to 8 GiB of old prompts in memory.
    parameters.cache_ram_mib = 0
    parameters.cache_idle_slots = False
    # A conversation is rendered as its template says, also when the last turn is the assistant's.
    parameters.prefill_assistant = False
    parameters.use_jinja = True
    if job["chat_template"] is not None:
        parameters.chat_template = job["chat_template"]
    if job["n_threads"]:
        parameters.cpuparams.n_threads = job["n_threads"]
        parameters.cpuparams_batch.n_threads = job["n_threads"]
    if job["n_batch"]:
        parameters.n_batch = job["n_batch"]
        parameters.n_ubatch = min(parameters.n_ubatch, job["n_batch"])
    if job["n_gpu_layers"] is not None:
        parameters.n_gpu_layers = job["n_gpu_layers"]
        parameters.fit_params = False
    if job["projector"] is not None:
        parameters.mmproj.path = job["projector"]
    adapters = []
    for path, scale in job["adapters"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path = path
        adapter.scale = scale
        adapters.append(adapter)
    parameters.lora_adapters = adapters
    return parameters


def _take_stdout() -> Any:
    """A private stream for the replies; whatever else prints to stdout goes to the log."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies


def _die_with_parent(parent_pid: int, signal_number: int) -> None:
    """Have Linux send `signal_number` when the parent ends (0: no longer).

    Needed while llama.cpp loads: it holds the interpreter, so the end of stdin would go unseen until it is done. Not
    kept afterwards, because the kernel means the parent's thread, and that may end before the parent does.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)


def _leave_no_core_file() -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


if __name__ == "__main__":
    main()
