"""The wizard: from answers to the one command and the model it makes; at a terminal, from a file, and interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import DEMO_MODEL, Ended, forge, forge_json, tree_hash

from ollama_forge.cli.wizard_jobs import JOBS, offered_jobs

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wizard") / "store"
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--store", folder)
    return folder


@pytest.fixture
def store(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "store"))


def answers_file(folder: Path, **answers: Any) -> Path:
    path = folder / "answers.yaml"
    path.write_text(yaml.safe_dump(answers), encoding="utf-8")
    return path


def command_of(ended: Ended) -> list[str]:
    """The line that the wizard prints as the one command that does the same."""
    line = next(line for line in ended.err.splitlines() if line.strip().startswith("ollama-forge "))
    return shlex.split(line)[1:]


def test_answers_make_the_model_that_the_printed_command_makes(store: Path, tmp_path: Path) -> None:
    system = 'Answer like a pirate. It\'s "quoted"; $(not run)'
    path = answers_file(tmp_path, model="base", name="mine", job="customise", system=system, temperature=0)
    ended = forge("wizard", "--answers", path, "--store", store)
    assert ended.code == 0 and "mine:latest" in ended.out
    shown = forge_json("show", "mine", "--store", store)
    assert shown["system"] == system and shown["modelfile_parameters"]["temperature"] == 0
    argv = command_of(ended)
    argv[argv.index("mine")] = "twin"
    assert forge_json(*argv)["digest"] == shown["digest"]


def test_the_result_of_json_is_one_document_with_answers_command_fits_and_result(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"model": "1", "name": "small", "job": "quantize", "type": "q4_k_m"}), encoding="utf-8")
    done = forge_json("wizard", "--answers", path, "--store", store)
    assert done["answers"]["model"] == "base:latest" and done["answers"]["type"] == "Q4_K_M"
    assert done["command"][:2] == ["ollama-forge", "convert"] and "--allow-requantize" in done["command"]
    assert done["fits"]["run"]["light"] == "green" and done["fits"]["run"]["parts"]["weights"] > 500_000
    assert done["result"]["name"] == "small:latest"
    assert forge_json("show", "small", "--store", store)["quantization"] == "Q4_K_M"


def test_a_fine_tune_is_answered_and_done(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "few.jsonl"
    lines = (DEMO_MODEL.parent / "finetune.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    path = answers_file(
        tmp_path, model="base", name="taught", job="finetune", data=str(data), epochs=1, max_length=64, merge=False
    )
    done = forge_json("wizard", "--answers", path, "--store", store)
    assert done["command"][-2:] == ["--store", str(store)] and "--merge" not in done["command"]
    assert done["command"][done["command"].index("--epochs") + 1] == "1"
    assert "taught:latest" in [row["name"] for row in forge_json("list", "--store", store)]


def test_a_dry_run_shows_everything_and_changes_nothing(store: Path, tmp_path: Path) -> None:
    path = answers_file(tmp_path, model="base", name="mine", job="customise", system="Hi.")
    before = tree_hash(store)
    ended = forge("wizard", "--answers", path, "--store", store, "--dry-run")
    assert ended.code == 0 and "Nothing was changed" in ended.out and tree_hash(store) == before
    assert "green" in ended.err and "free" in ended.err and "--dry-run" not in command_of(ended)


def test_a_folder_is_quantized_while_it_is_imported(store: Path, tmp_path: Path) -> None:
    path = answers_file(tmp_path, model=str(DEMO_MODEL), name="imported", job="quantize", type="Q8_0")
    done = forge_json("wizard", "--answers", path, "--store", store)
    assert done["command"][1] == "import" and done["result"]["name"] == "imported:latest"


@pytest.mark.parametrize(
    ("answers", "code", "says"),
    [
        ({"model": "base", "name": "x", "jop": "customise"}, 2, "'job'"),
        ({"model": "base", "name": "x", "job": "dance"}, 2, "There are: customise, quantize"),
        ({"model": "base", "job": "customise"}, 2, "lack 'name'"),
        ({"model": "bose", "name": "x", "job": "customise"}, 1, "base"),
        ({"model": "base", "name": "a b", "job": "customise"}, 1, "a b"),
        ({"model": "base", "name": "base", "job": "customise"}, 2, "replace: yes"),
        ({"model": "base", "name": "x", "job": "finetune", "data": "nowhere.jsonl"}, 2, "no such file"),
        ({"model": "base", "name": "x", "job": "customise", "temperature": "hot"}, 2, "'hot'"),
        ({"model": "base", "name": "x", "job": "quantize", "type": "Q4_K_X"}, 2, "Q4_K_M"),
    ],
)
def test_a_wrong_answer_is_named_before_anything_is_done(
    store: Path, tmp_path: Path, answers: dict[str, Any], code: int, says: str
) -> None:
    before = tree_hash(store)
    ended = forge("wizard", "--answers", answers_file(tmp_path, **answers), "--store", store)
    assert ended.code == code and says in ended.err and "next:" in ended.err
    assert tree_hash(store) == before


def test_what_is_no_answers_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.yaml"
    for text in ("- a\n- b\n", "model: [\n", ""):
        path.write_text(text, encoding="utf-8")
        ended = forge("wizard", "--answers", path)
        assert ended.code == 2 and "next:" in ended.err
    assert forge("wizard", "--answers", tmp_path / "none.yaml").code == 2


def test_an_existing_model_is_replaced_only_when_the_answers_say_so(store: Path, tmp_path: Path) -> None:
    path = answers_file(tmp_path, model="base", name="base2", job="customise", system="One.")
    assert forge("wizard", "--answers", path, "--store", store).code == 0
    path = answers_file(tmp_path, model="base", name="base2", job="customise", system="Two.", replace=True)
    ended = forge("wizard", "--answers", path, "--store", store)
    assert ended.code == 0 and "--force" in command_of(ended)
    assert forge_json("show", "base2", "--store", store)["system"] == "Two."


def test_only_jobs_whose_command_is_there_are_offered() -> None:
    offered = {job.key for job in offered_jobs()}
    assert {"customise", "quantize", "finetune"} <= offered
    for job in JOBS:
        assert (forge(*job.words, "--help").code == 0) == (job.key in offered), job.key


def test_a_model_with_an_adapter_is_to_be_merged_before_it_is_trained(store: Path, tmp_path: Path) -> None:
    from ollama_forge.jobs.model_fits import fit_ref

    adapter = tmp_path / "adapter"
    write_lora(adapter)
    forge_json("retrain", "--base", "base", "--adapter", adapter, "--name", "tuned", "--no-check", "--store", store)
    plain, tuned = fit_ref("base", store), fit_ref("tuned", store)
    assert "finetune" in plain.fits and "finetune" not in tuned.fits
    assert "ollama-forge merge tuned" in tuned.why_not("finetune") and tuned.size_bytes > plain.size_bytes


def write_lora(folder: Path) -> None:
    """A LoRA of the demo model, in PEFT's form, of ones."""
    import numpy as np
    from safetensors.numpy import save_file

    width = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    pair = {"lora_A": np.full((2, width), 0.01, np.float32), "lora_B": np.full((width, 2), 0.01, np.float32)}
    save_file({f"{stem}.{name}.weight": tensor for name, tensor in pair.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def test_every_offered_job_gives_a_command_that_its_own_dry_run_accepts(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO_MODEL.parent / "finetune.jsonl", tmp_path / "data.jsonl")
    things = ("turnip", "carrot", "leek", "potato"), ("lamp", "chair", "cup", "table")
    for name, words in zip(("harmful.txt", "harmless.txt"), things, strict=True):
        (tmp_path / name).write_text("".join(f"How do I wash a {word}?\n" for word in words), encoding="utf-8")
    answers = {
        "customise": {"system": "Hi."},
        "quantize": {},
        "finetune": {"data": "data.jsonl"},
        "abliterate": {"harmful": "harmful.txt", "harmless": "harmless.txt"},
        "downsize": {"data": "data.jsonl", "target": "65 %"},
    }
    before = tree_hash(store)
    for job in offered_jobs():
        path = answers_file(tmp_path, model="base", name="made", job=job.key, **answers[job.key])
        ended = forge("wizard", "--answers", path, "--store", store, "--dry-run")
        assert ended.code == 0, job.key + ended.out + ended.err
    assert tree_hash(store) == before


class Terminal:
    """The wizard at a pseudo-terminal, answered as a person would: a line when the question is there."""

    def __init__(self, *argv: object, home: Path, folder: Path | None = None) -> None:
        self.ours, theirs = pty.openpty()
        self.said = ""
        command = [sys.executable, "-m", "ollama_forge", "wizard", *map(str, argv)]
        environment = {**os.environ, "OLLAMA_FORGE_HOME": str(home), "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is more than a character
        )
        os.close(theirs)

    def answer(self, question: str, text: str) -> None:
        self.wait_for(question)
        os.write(self.ours, text.encode())

    def interrupt(self, words: str) -> None:
        """Ctrl-C, again and again as a person would: one that comes just before Python waits for a key is lost."""
        self.wait_for(words)
        ends = time.monotonic() + 60
        while "--answers" not in self.said and self.process.poll() is None:
            assert time.monotonic() < ends, f"Ctrl-C was not heard:\n{self.said}"
            with contextlib.suppress(OSError):
                os.write(self.ours, b"\x03")
            while self._read(timeout_seconds=5):  # it says the key back at once, and then works for a while
                pass

    def wait_for(self, words: str) -> None:
        start = len(self.said)
        ends = time.monotonic() + 60
        while words not in self.said[start:]:
            assert time.monotonic() < ends and self._read(), f"{words!r} was not said:\n{self.said}"

    def end(self) -> int:
        while self._read():
            pass
        os.close(self.ours)
        return self.process.wait(60)

    def _read(self, timeout_seconds: float = 60) -> bool:
        ready, _, _ = select.select([self.ours], [], [], timeout_seconds)
        try:
            chunk = os.read(self.ours, 65536) if ready else b""
        except OSError:
            chunk = b""
        self.said += _COLOUR.sub("", chunk.decode("utf-8", "replace"))
        return bool(chunk)


def test_at_a_terminal_it_lists_models_with_lights_asks_again_and_makes_the_model(
    origin: Path, store: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "saved.yaml"
    terminal = Terminal("--store", store, "--save-answers", saved, home=tmp_path / "home")
    terminal.answer("Which model?", "nothing-here\n")
    terminal.answer("There is no model", "1\n")
    terminal.answer("Name of the result", "\n")
    terminal.answer("What shall be done?", "1\n")
    terminal.answer("System prompt", "Answer in one word.\n")
    terminal.answer("Temperature", "warm\n")
    terminal.answer("It must be a number", "0.5\n")
    terminal.answer("Context in tokens", "\n")
    terminal.answer("Run it?", "\n")
    assert terminal.end() == 0, terminal.said
    assert "● green" in terminal.said and "Q8_0" in terminal.said and "1.3M" in terminal.said
    shown = forge_json("show", "base-mine", "--store", store)
    assert shown["system"] == "Answer in one word." and shown["modelfile_parameters"] == {"temperature": 0.5}
    again = forge_json("wizard", "--answers", saved, "--store", origin, "--dry-run")["answers"]
    assert again["name"] == "base-mine" and again["temperature"] == "0.5"


def test_no_at_the_end_runs_nothing(store: Path, tmp_path: Path) -> None:
    before = tree_hash(store)
    path = answers_file(tmp_path, model="base", name="x", job="customise", system="Hi.")
    terminal = Terminal("--answers", path, "--store", store, home=tmp_path / "home")
    for question in ("Temperature", "Context in tokens"):
        terminal.answer(question, "\n")
    terminal.answer("Run it?", "no\n")
    assert terminal.end() == 0 and tree_hash(store) == before


def test_ctrl_c_keeps_the_answers_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    terminal = Terminal("--store", store, home=tmp_path / "home")
    terminal.answer("Which model?", "base\n")
    terminal.answer("Name of the result", "later\n")
    terminal.answer("What shall be done?", "customise\n")
    terminal.interrupt("System prompt")
    assert terminal.end() == 130
    kept = tmp_path / "home" / "wizard-answers.yaml"
    assert f"ollama-forge wizard --answers {kept}" in terminal.said and "Traceback" not in terminal.said
    assert yaml.safe_load(kept.read_text()) == {"model": "base", "name": "later", "job": "customise"}
    assert forge("wizard", "--answers", kept, "--store", store).code == 0
    assert "later:latest" in [row["name"] for row in forge_json("list", "--store", store)]


def test_ctrl_c_while_it_works_keeps_the_answers_too(store: Path, tmp_path: Path) -> None:
    lines = (DEMO_MODEL.parent / "finetune.jsonl").read_text(encoding="utf-8")
    (tmp_path / "data.jsonl").write_text(lines * 20, encoding="utf-8")
    path = answers_file(
        tmp_path, model="base", name="long", job="finetune", data=str(tmp_path / "data.jsonl"), run=True
    )
    terminal = Terminal("--answers", path, "--store", store, home=tmp_path / "home", folder=tmp_path)
    for question in ("Times through", "Tokens of an example", "Merge into"):
        terminal.answer(question, "\n")
    terminal.interrupt("trained numbers")
    assert terminal.end() == 130, terminal.said
    assert f"wizard --answers {tmp_path / 'home' / 'wizard-answers.yaml'}" in terminal.said
    assert "long:latest" not in [row["name"] for row in forge_json("list", "--store", store)]


def test_without_a_terminal_and_without_answers_it_says_what_to_give() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "ollama_forge", "wizard"], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "--answers answers.yaml" in ended.stderr
