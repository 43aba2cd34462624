"""Where an `ollama` is on PATH: start it on a free port of 127.0.0.1, with a store of its own, for tests to run on."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

OLLAMA = shutil.which("ollama")


@contextlib.contextmanager
def start_ollama(folder: Path) -> Iterator[str]:
    """The address of a server whose home and store lie in `folder`; it ends with the block."""
    assert OLLAMA
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(folder), "OLLAMA_HOST": address, "OLLAMA_MODELS": str(folder / "models")}
    with (folder / "ollama.log").open("wb") as log:
        process = subprocess.Popen([OLLAMA, "serve"], env=environment, stdout=log, stderr=log)
        try:
            _wait_for(f"http://{address}/api/version", process)
            yield f"http://{address}"
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.1)
    raise RuntimeError("ollama serve did not come up")
