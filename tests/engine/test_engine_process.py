"""Whatever happens to the child, the parent lives and says why; whatever happens to the parent, the child goes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tiny_gguf import write_tiny_gguf, write_tiny_lora

from ollama_forge.engine import Sampling, open_engine
from ollama_forge.errors import EngineError

LINUX = sys.platform.startswith("linux")


def wait_until(claim: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if claim():
            return True
        time.sleep(0.02)
    return claim()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not status.exists() or "\nState:\tZ" not in status.read_text()


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = write_tiny_gguf(folder / "whole.gguf").read_bytes()
    contents = {
        "truncated": (whole[:100_000], "is not within the file bounds"),
        "not a gguf": (b"PK\x03\x04" + bytes(500), "magic"),
        "empty": (b"", "magic"),
        "cut in the header": (whole[:60], "failed to read"),
    }
    broken = {}
    for name, (content, reason) in contents.items():
        path = folder / f"{name}.gguf"
        path.write_bytes(content)
        broken[name] = (path, reason)
    foreign = write_tiny_gguf(folder / "foreign.gguf", architecture="nosuch")
    return broken | {"unknown architecture": (foreign, "unknown model architecture: 'nosuch'")}


@pytest.mark.parametrize("name", ["truncated", "not a gguf", "empty", "cut in the header", "unknown architecture"])
def test_a_file_that_does_not_load_is_an_error_with_llama_cpps_words(name: str, tmp_path: Path) -> None:
    path, reason = broken_files(tmp_path)[name]
    with pytest.raises(EngineError) as caught:
        open_engine(path, n_threads=1)
    assert repr(str(path)) in caught.value.what
    assert reason in caught.value.why
    assert caught.value.next


def test_an_abort_inside_llama_cpp_is_an_error(model_path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "alpha-is-text.gguf"
    writer = gguf.GGUFWriter(adapter, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_string("adapter.lora.alpha", "16")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(EngineError) as caught:
        open_engine(model_path, adapters=[(adapter, 1.0)], n_threads=1)
    assert "SIGABRT" in caught.value.what or not LINUX
    assert "GGML_ASSERT" in caught.value.why


def test_an_adapter_of_another_shape_is_an_error(model_path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "other.gguf"
    content = write_tiny_lora(tmp_path / "fits.gguf").read_bytes()
    adapter.write_bytes(content.replace(b"blk.0.attn_q", b"blk.9.attn_q"))
    with pytest.raises(EngineError, match="could not load") as caught:
        open_engine(model_path, adapters=[(adapter, 1.0)], n_threads=1)
    assert "blk.9.attn_q" in caught.value.why


@pytest.mark.parametrize("streamed", [False, True])
def test_a_child_killed_in_mid_request_is_an_error_at_once(model_path: Path, streamed: bool) -> None:
    heard = threading.Event()
    with open_engine(model_path, n_threads=1) as engine:
        endless = Sampling(temperature=0.0, max_tokens=480, stop=("never said",))
        on_text = (lambda text: heard.set()) if streamed else None

        def kill() -> None:
            heard.wait(timeout=0.0 if not streamed else 20.0)
            os.kill(engine.pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(EngineError) as caught:
            for _ in range(1000):
                engine.generate("the", endless, on_text=on_text)
        killer.join()
    assert "SIGKILL" in caught.value.what


def test_a_request_after_the_child_died_is_an_error(model_path: Path) -> None:
    with open_engine(model_path, n_threads=1) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(EngineError, match="SIGKILL"):
                engine.generate("the", Sampling(max_tokens=1))


def test_a_request_that_takes_too_long_is_an_error_and_the_engine_goes_on(model_path: Path) -> None:
    with open_engine(model_path, n_threads=1) as engine:
        for on_text in (None, lambda text: None):
            os.kill(engine.pid, signal.SIGSTOP)
            with pytest.raises(EngineError, match=r"within 0\.2 seconds"):
                engine.generate("the", Sampling(max_tokens=400), on_text=on_text, timeout_seconds=0.2)
            os.kill(engine.pid, signal.SIGCONT)
            assert engine.generate("the", Sampling(max_tokens=2)).n_tokens == 2


def test_loading_that_takes_too_long_is_an_error(model_path: Path) -> None:
    with pytest.raises(EngineError, match="did not load"):
        open_engine(model_path, timeout_seconds=0.0)


def test_an_interrupted_request_leaves_the_engine_usable(model_path: Path) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(text: str) -> None:
        raise Interrupt

    with open_engine(model_path, n_threads=1) as engine:
        with pytest.raises(Interrupt):
            engine.generate("the", Sampling(max_tokens=400), on_text=interrupt)
        assert engine.generate("the", Sampling(max_tokens=2)).n_tokens == 2


def test_the_child_is_gone_after_close_and_its_port_with_it(model_path: Path) -> None:
    engine = open_engine(model_path, n_threads=1)
    port = int(engine._process.reply["url"].rsplit(":", 1)[1])
    engine.close()
    engine.close()
    assert not is_running(engine.pid)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


LOADING_SCRIPT = """
import sys
from pathlib import Path
from ollama_forge.engine_process import EngineProcess
path = sys.argv[1]
job = {"kind": "server", "model": path, "adapters": [], "projector": None, "context_length": 64, "n_threads": 1,
       "n_batch": None, "n_gpu_layers": None, "chat_template": None}
EngineProcess(job, model_path=Path(path), timeout_seconds=600)
"""


def find_child(parent_pid: int) -> int | None:
    """The child of a process, once it has llama.cpp in memory."""
    for pid in Path(f"/proc/{parent_pid}/task/{parent_pid}/children").read_text().split():
        if "xllamacpp" in Path(f"/proc/{pid}/maps").read_text():
            return int(pid)
    return None


if LINUX:

    def test_the_child_goes_when_the_parent_is_killed_while_the_model_loads(tmp_path: Path) -> None:
        """The model is a pipe that nobody writes to, so llama.cpp waits in opening it until it is killed."""
        path = tmp_path / "endless.gguf"
        os.mkfifo(path)
        with subprocess.Popen([sys.executable, "-c", LOADING_SCRIPT, str(path)]) as parent:
            assert wait_until(lambda: find_child(parent.pid) is not None)
            child_pid = find_child(parent.pid)
            time.sleep(0.2)
            parent.kill()
        try:
            assert child_pid and wait_until(lambda: not is_running(child_pid))
        finally:
            if child_pid and is_running(child_pid):
                os.kill(child_pid, signal.SIGKILL)

    def test_no_secret_of_the_parent_reaches_the_child(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_should_stay_here")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "should-stay-here")
        with open_engine(model_path, n_threads=1) as engine:
            environment = Path(f"/proc/{engine.pid}/environ").read_bytes()
            arguments = Path(f"/proc/{engine.pid}/cmdline").read_bytes()
            assert b"should" not in environment
            assert b"PATH=" in environment
            assert engine._process.key.encode() not in environment + arguments


SCRIPT = """
import sys, time
from pathlib import Path
from ollama_forge.engine import open_engine
engine = open_engine(Path(sys.argv[1]), n_threads=1)
sys.stdout.write(f"{engine.pid}\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_goes_when_the_parent_is_killed(model_path: Path, ending: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(model_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    with parent:
        assert parent.stdout
        child_pid = int(parent.stdout.readline())
        assert is_running(child_pid)
        parent.send_signal(ending)
        parent.wait(timeout=30)
    assert wait_until(lambda: not is_running(child_pid))


def test_an_engine_outlives_the_thread_that_opened_it(model_path: Path) -> None:
    opened = []
    thread = threading.Thread(target=lambda: opened.append(open_engine(model_path, n_threads=1)))
    thread.start()
    thread.join()
    with opened[0] as engine:
        time.sleep(0.1)
        assert engine.generate("the", Sampling(max_tokens=2)).n_tokens == 2
