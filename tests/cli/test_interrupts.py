"""Ctrl-C ends a command at any moment, in those too in which Python would lose it; where it is ignored, it stays so."""

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


def interrupted_training(folder: Path, n_steps: int, *launcher: str) -> tuple[int, str]:
    """Exit code and errors of a training that gets SIGINT as soon as it has its folder, before its first step."""
    words = ["finetune", "--data", DEMO_MODEL.parent / "finetune.jsonl", "--base", DEMO_MODEL, "--skip-retrain"]
    words += ["--workdir", folder, "--epochs", "100000", "--max-steps", n_steps, "--quiet"]
    command = [*launcher, sys.executable, "-m", "ollama_forge", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        while not (folder / "run.json").exists():
            assert child.poll() is None
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        try:
            _, err = child.communicate(timeout=120)
        finally:
            child.kill()
    return child.returncode, err


def test_before_the_first_step_a_training_ends_at_once(tmp_path: Path) -> None:
    code, err = interrupted_training(tmp_path / "run", 100_000)
    assert code == 130 and "Run the same command again" in err and "Traceback" not in err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_training_in_the_background_of_a_script_goes_on(tmp_path: Path) -> None:
    """A shell starts `command &` of a script with the signal ignored: Ctrl-C is meant for the script alone."""
    as_shell_does = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    code, err = interrupted_training(tmp_path / "run", 2, sys.executable, "-c", as_shell_does)
    assert code == 0, err
    assert (tmp_path / "run" / "adapter").is_dir()
