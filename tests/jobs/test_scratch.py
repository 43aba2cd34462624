"""Scratch folders: gone at the end, gone after a kill, and never taken from somebody who works in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ollama_forge.jobs.scratch import scratch_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be renamed there")
CHILD = """
import sys, time
from pathlib import Path
from ollama_forge.jobs.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "model.gguf").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def working_command(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that has a scratch folder with a file in it."""
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(parent)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()


def test_it_is_empty_and_goes_with_all_that_is_in_it(tmp_path: Path) -> None:
    with scratch_folder(tmp_path) as folder:
        assert folder.is_dir() and not list(folder.iterdir())
        (folder / "below").mkdir()
        (folder / "below" / "file").write_text("x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="wrong"), scratch_folder(tmp_path):
        raise ValueError("wrong")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_command_left_goes_when_the_next_one_begins(tmp_path: Path) -> None:
    with working_command(tmp_path) as (process, folder):
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / "model.gguf").exists()
        with scratch_folder(tmp_path):
            assert not folder.parent.exists()


def test_a_command_that_is_still_at_work_keeps_its_folder(tmp_path: Path) -> None:
    with working_command(tmp_path) as (_process, folder), scratch_folder(tmp_path) as own, scratch_folder(tmp_path):
        assert (folder / "model.gguf").exists() and own.is_dir()


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    foreign = tmp_path / "ollama-forge-notes"
    foreign.mkdir()
    (foreign / "diary.txt").write_text("x")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "in-use").write_text("")
    (tmp_path / "ollama-forge-link").symlink_to(kept)
    (tmp_path / "ollama-forge-file").write_text("x")
    hostile = tmp_path / "ollama-forge-hostile"
    hostile.mkdir()
    (hostile / "in-use").symlink_to(kept / "in-use")
    before = sorted(tmp_path.rglob("*"))
    with scratch_folder(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_many_commands_at_once_do_not_take_each_others(tmp_path: Path) -> None:
    rounds = """
import sys
from pathlib import Path
from ollama_forge.jobs.scratch import scratch_folder
for _ in range(100):
    with scratch_folder(Path(sys.argv[1])) as folder:
        (folder / "a").write_text("x")
        assert (folder / "a").read_text() == "x"
"""
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    children = [subprocess.Popen([sys.executable, "-c", rounds, str(tmp_path)], env=environment) for _ in range(4)]
    deadline = time.monotonic() + 120
    assert [child.wait(deadline - time.monotonic()) for child in children] == [0] * 4
    assert not list(tmp_path.iterdir())
