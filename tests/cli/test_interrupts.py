"""Ctrl-C ends a command at any moment, in the moments too in which Python or a shell would lose it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import DEMO_MODEL

from ollama_forge.cli.interrupts import interruptible


class InterruptedWhenGone:
    """Somebody presses Ctrl-C while its destructor runs."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_a_destructor_drops_comes_again() -> None:
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interruptible():
        InterruptedWhenGone()
        time.sleep(30)
    assert sys.unraisablehook is hook


def test_a_training_that_a_script_started_in_the_background_can_be_interrupted_before_its_first_step(
    tmp_path: Path,
) -> None:
    words = ["finetune", "--data", DEMO_MODEL.parent / "finetune.jsonl", "--base", DEMO_MODEL, "--skip-retrain"]
    words += ["--workdir", tmp_path / "run", "--epochs", "100000", "--quiet"]
    # as `command &` of a shell script is started
    as_shell_does = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", as_shell_does, sys.executable, "-m", "ollama_forge", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not (tmp_path / "run" / "run.json").exists():
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        try:
            _, err = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 130 and "Run the same command again" in err and "Traceback" not in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
