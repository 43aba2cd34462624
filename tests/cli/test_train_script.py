"""`train --write-script`: a script that bash runs from end to end, and that no name can make do anything else."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import DEMO_MODEL, forge, forge_json
from trainer_programs import argv_of, write_old_finetune

from ollama_forge.dataset.render import ALPACA_GO_TEMPLATE
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.train_script import ScriptRequest, render_script

DATA = DEMO_MODEL.parent / "finetune.jsonl"
NASTY = "a 'b' \"c\" $(touch PWNED) `touch PWNED` ; touch PWNED #"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with an awkward name."""
    path = tmp_path / NASTY
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def run_bash(script: str, folder: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    path = [*map(str, programs), str(Path(sys.executable).parent), "/usr/bin", "/bin"]
    environment = {**os.environ, "PATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", script], cwd=folder, env=environment, capture_output=True, text=True)


def request(**changes: Any) -> ScriptRequest:
    return ScriptRequest(
        **{
            **{"data": (Path("train.jsonl"),), "base": "llama3.2", "name": "my-model", "base_gguf": None},
            **{"prepared": Path("train_prepared.txt"), "format": "llama.cpp", "adapter_dir": Path("adapter_out")},
            **{"workdir": Path("work"), "trainer": "builtin"},
            **changes,
        }
    )


def test_bash_runs_the_script_from_end_to_end_and_names_execute_nothing(folder: Path) -> None:
    data = f"data {NASTY}.jsonl"
    shutil.copyfile(DATA, data)
    store, work = f"store {NASTY}", f"work {NASTY}"
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", store)
    written = forge_json(
        *("train", "--data", data, "--base", "base", "--name", "my/model:v1", "--store", store, "--workdir", work),
        *("--max-steps", "2", "--max-length", "64", "--rank", "2", "--lr", "1e-3", "--system", NASTY, "--no-check"),
        *("--write-script", f"{NASTY}.sh"),
    )
    script = Path(written["script"])
    assert script.read_text() == written["text"] and stat.S_IMODE(script.stat().st_mode) == 0o755
    ended = run_bash(script.name, folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not list(folder.parent.rglob("PWNED"))
    model = resolve("my/model:v1", Path(store))
    assert len(model.adapters) == 1 and model.modelfile.system == NASTY
    assert Path("train_prepared.txt").read_text().startswith("### Instruction:")
    steps = [line for line in ended.stdout.splitlines() if line.startswith("[")]
    assert [line[:5] for line in steps] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]


@pytest.mark.parametrize("more", [(), ("--merge",)])
def test_the_script_lands_the_same_modelfile_as_the_command(folder: Path, more: tuple[str, ...]) -> None:
    """Of a base that says something, but has no chat template: training gives it one, which Ollama must send."""
    source = folder / "source"
    shutil.copytree(DEMO_MODEL, source)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": None}))
    shutil.copyfile(DATA, "d.jsonl")
    said = ("--system", NASTY, "--stop", NASTY, "--message", f"user={NASTY}", "--license", NASTY)
    forge_json("import", source, "--name", "base", "--no-check", "--store", "store", *said)
    words = ("train", "--data", "d.jsonl", "--base", "base", "--store", "store", "--max-steps", "2", "--no-check")
    words = (*words, "--max-length", "64", "--rank", "2", "--lr", "1e-3", "--message", "assistant=Hi!", *more)
    forge_json(*words, "--name", "direct")
    forge_json(*words, "--name", "scripted", "--write-script", "s.sh")
    ended = run_bash("s.sh", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    direct, scripted = (resolve(name, Path("store")) for name in ("direct", "scripted"))
    assert scripted.modelfile.template == ALPACA_GO_TEMPLATE and scripted.modelfile.system == NASTY
    assert scripted.modelfile.licenses == (NASTY,) and scripted.modelfile.messages[-1].content == "Hi!"
    assert replace(scripted.modelfile, sources=(), adapters=()) == replace(direct.modelfile, sources=(), adapters=())


def test_the_script_calls_finetune_as_documented_and_lands_its_adapter(folder: Path, tmp_path: Path) -> None:
    write_old_finetune(tmp_path / "programs")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", "store")
    forge_json("convert", DEMO_MODEL, "-o", "it's.gguf")
    shutil.copyfile(DATA, "d.jsonl")
    forge_json(
        *("train", "--data", "d.jsonl", "--base", "base", "--name", "tuned", "--base-gguf", "it's.gguf"),
        *("--run-trainer", "--adapter-output", "my adapters", "--store", "store", "--write-script", "train.sh"),
    )
    ended = run_bash("train.sh", folder, tmp_path / "programs")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert argv_of(tmp_path / "programs") == [
        *("--train-data", "train_prepared.txt", "--sample-start", "### Instruction"),
        *("--model-base", "it's.gguf", "--lora-out", "my adapters/lora.bin"),
    ]
    assert len(resolve("tuned", Path("store")).adapters) == 1


def test_the_script_stops_at_the_first_step_that_fails(folder: Path) -> None:
    Path("bad.jsonl").write_text('{"instruction": "only"}\n')
    forge_json("train", "--data", "bad.jsonl", "--base", "base", "--name", "n", "--write-script", "s.sh")
    ended = run_bash("s.sh", folder)
    assert ended.returncode == 1 and "[2/4]" not in ended.stdout and not Path("train_prepared.txt").exists()


def test_without_finetune_the_script_says_so_and_fails(folder: Path) -> None:
    shutil.copyfile(DATA, "d.jsonl")
    forge_json(
        *("train", "--data", "d.jsonl", "--base", "base", "--name", "n", "--base-gguf", "b.gguf", "--run-trainer"),
        *("--write-script", "s.sh"),
    )
    ended = run_bash("s.sh", folder)
    assert ended.returncode == 1 and "finetune is not on PATH" in ended.stderr and "[4/4]" not in ended.stdout


def test_the_top_of_the_script_says_what_it_does() -> None:
    lines = render_script(request(base_gguf=Path("my base.gguf"))).splitlines()
    comments = [line for line in lines[: lines.index("set -euo pipefail")] if line]
    assert lines[0].startswith("#!") and all(line.startswith("#") for line in comments)
    for words in ("Data:    train.jsonl", "Base:    llama3.2", "Name:    my-model", "Adapter: work/adapter"):
        assert f"# {words}" in comments
    assert "BASE_GGUF='my base.gguf'" in lines
    assert "|| true" not in "\n".join(lines)
    external = render_script(request(trainer="llama.cpp", base_gguf=Path("b.gguf")))
    assert "--sample-start '### Instruction' --model-base \"$BASE_GGUF\"" in external


def test_no_name_leaves_its_comment_line(tmp_path: Path) -> None:
    nasty = "x\ntouch PWNED\r\x85touch PWNED\x1b"
    text = render_script(
        request(data=(Path(nasty),), base=nasty, name=nasty, workdir=Path(nasty), adapter_dir=Path(nasty))
    )
    head = text[: text.index("set -euo")]
    assert all(line.startswith("#") or not line for line in head.split("\n"))
    (tmp_path / "s.sh").write_text(text.replace("ollama-forge ", "true "))
    assert run_bash("s.sh", tmp_path).returncode == 0 and not (tmp_path / "PWNED").exists()


def test_a_script_is_not_overwritten_without_force_and_a_dry_run_writes_none(folder: Path) -> None:
    words = ("train", "--data", "d.jsonl", "--base", "b", "--name", "n", "--write-script", "s.sh")
    shown = forge(*words, "--dry-run")
    assert shown.code == 0 and shown.out.startswith("#!/usr/bin/env bash") and not Path("s.sh").exists()
    Path("s.sh").write_text("mine")
    refused = forge(*words, "--json")
    assert refused.code == 1 and refused.document["error"]["kind"] == "exists" and Path("s.sh").read_text() == "mine"
    assert forge(*words, "--force").code == 0 and Path("s.sh").read_text() == shown.out


def test_options_reach_the_step_that_they_are_for(folder: Path) -> None:
    Path("c.yaml").write_text("rank: 4\nnum-ctx: 512\n")
    text = forge_json(
        *("train", "more.jsonl", "--data", "d.jsonl", "--base", "b", "--name", "n", "--write-script", "s.sh"),
        *("--config", "c.yaml", "--include", "*.csv", "--merge", "--no-check", "--stop", "a b", "--stop", "c"),
        *("--target-modules", "q_proj", "--device", "cpu"),
    )["text"]
    train = text[text.index("ollama-forge train-run") : text.index("[4/4]")]
    land = text[text.index("ollama-forge retrain") :]
    assert "DATA=(d.jsonl more.jsonl)" in text
    assert "--rank 4" in train and "--target-modules q_proj" in train and "--device cpu" in train
    assert "--include '*.csv'" in train and "--merge" not in train and "--num-ctx" not in train
    assert "--num-ctx 512" in land and "--merge" in land and "--no-check" in land and "--rank" not in land
    assert "--stop 'a b' --stop c" in land


def test_finetune_gets_the_options_that_were_given_in_its_own_words(folder: Path) -> None:
    text = forge_json(
        *("train", "--data", "d.jsonl", "--base", "b", "--name", "n", "--base-gguf", "g.gguf", "--run-trainer"),
        *("--rank", "8", "--lr", "1e-4", "--epochs", "2", "--write-script", "s.sh"),
    )["text"]
    assert "--lora-r 8 --adam-alpha 0.0001 --epochs 2" in " ".join(text.split()).replace(
        "--epochs 2 --adam-alpha 0.0001 --lora-r 8", "--lora-r 8 --adam-alpha 0.0001 --epochs 2"
    )


def test_a_script_that_could_not_work_is_not_written(folder: Path) -> None:
    base = ("train", "--data", "d.jsonl", "--base", "b", "--write-script", "s.sh", "--json")
    for words in (
        (),
        ("--name", "-rf"),
        ("--name", "n", "--run-trainer"),
        ("--name", "n", "--trainer", "llama.cpp"),
        ("--name", "n", "--prepared-output", "d.jsonl"),
    ):
        ended = forge(*base, *words)
        assert ended.code in (1, 2) and json.loads(ended.out)["error"]["next"], words
    assert not Path("s.sh").exists()


def test_train_without_a_script_trains(folder: Path) -> None:
    shutil.copyfile(DATA, "d.jsonl")
    planned = forge_json("train", "--data", "d.jsonl", "--base", DEMO_MODEL, "--name", "n", "--store", "s", "--dry-run")
    assert planned["dry_run"] and planned["plan"]["examples"] == 50
