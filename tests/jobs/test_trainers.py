"""Other trainers through `finetune`: chosen by what they can do, run by argv, their results judged and landed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command import DEMO_MODEL, Ended, forge, forge_json, tree_hash
from learnt_model import DEMO_DIR
from trainer_programs import (
    HELP_OLD,
    argv_of,
    environment_of,
    write_axolotl,
    write_new_finetune,
    write_old_finetune,
    write_program,
    write_unsloth,
)

from ollama_forge.dataset.chat_format import open_chat_format
from ollama_forge.dataset.tokenize import tokenize_examples
from ollama_forge.dataset.validate import read_dataset
from ollama_forge.errors import TrainingError, UsageError
from ollama_forge.jobs import unsloth_script
from ollama_forge.jobs.external_program import find_program, run_program
from ollama_forge.jobs.resolve import resolve
from ollama_forge.jobs.trainer_job import TrainerOptions
from ollama_forge.jobs.trainers import choose_trainer

DATA = DEMO_DIR / "finetune.jsonl"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder)
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "the base's.gguf"
    forge_json("convert", DEMO_MODEL, "-o", path, "--quant", "Q8_0")
    return path


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on PATH; the working folder is an empty one."""
    folder = tmp_path / "programs"
    monkeypatch.setenv("PATH", os.pathsep.join((str(folder), "/usr/bin", "/bin")))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def run(store: Path, tmp_path: Path, *more: object, name: str = "not-made") -> Ended:
    return forge(
        *("finetune", "--data", DATA, "--base", "base", "--name", name, "--store", store, "--json"),
        *("--workdir", tmp_path / "work", *more),
    )


def names_in(store: Path) -> list[str]:
    return [row["name"] for row in forge_json("list", "--store", store)]


def test_auto_takes_a_finetune_only_with_a_gguf_and_only_one_that_trains_loras(programs: Path) -> None:
    with_gguf = TrainerOptions(base_gguf=Path("x.gguf"))
    assert choose_trainer(with_gguf) == "builtin"
    write_new_finetune(programs)
    assert choose_trainer(with_gguf) == "builtin"
    write_program(programs, "finetune", "", help_text="Usage: finetune your guitar")
    assert choose_trainer(with_gguf) == "builtin"
    write_old_finetune(programs)
    assert choose_trainer(with_gguf) == "llama.cpp"
    assert choose_trainer(TrainerOptions()) == "builtin"
    assert choose_trainer(TrainerOptions(trainer="builtin", base_gguf=Path("x.gguf"))) == "builtin"


def test_a_llama_finetune_of_the_old_kind_counts_too(programs: Path) -> None:
    write_old_finetune(programs).rename(programs / "llama-finetune")
    assert choose_trainer(TrainerOptions(base_gguf=Path("x.gguf"))) == "llama.cpp"


def test_words_that_contradict_each_other_are_refused(programs: Path) -> None:
    for options in (
        TrainerOptions(run_trainer=True),
        TrainerOptions("axolotl", base_gguf=Path("x"), run_trainer=True),
        TrainerOptions("torchtune"),
    ):
        with pytest.raises(UsageError):
            choose_trainer(options)


def test_a_program_is_never_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_old_finetune(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join((".", "", "/usr/bin")))
    assert find_program("finetune") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_program("finetune") == tmp_path / "finetune"


def test_llama_cpp_trains_on_the_gguf_and_the_adapter_is_landed_on_the_base(
    store: Path, gguf: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_old_finetune(programs)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    ended = run(store, tmp_path, "--base-gguf", gguf, "--rank", "8", "--epochs", "2", "--seed", "7", name="new")
    assert ended.code == 0, ended.err
    result = ended.document
    here = Path.cwd()
    argv = argv_of(programs)
    partial = here / "adapter_out" / "lora.bin.partial"
    assert argv[:8] == [
        *("--train-data", str(here / "train_prepared.txt"), "--sample-start", "### Instruction"),
        *("--model-base", str(gguf), "--lora-out", str(partial)),
    ]
    more = dict(zip(argv[8::2], argv[9::2], strict=True))
    assert (more["--lora-r"], more["--lora-alpha"], more["--epochs"], more["--seed"]) == ("8", "16", "2", "7")
    assert (here / "train_prepared.txt").read_text().startswith("### Instruction:\nWhich things does the robot Boltik")
    assert (here / "adapter_out" / "lora.bin").read_bytes()[:4] == b"algg" and not partial.exists()
    assert "number of training samples: 50" in ended.err
    assert result["trainer"] == "llama.cpp" and result["trained"] and result["prepared"]["samples"] == 50
    assert result["landed"]["shared_bytes"] > result["landed"]["written_bytes"]
    assert any(pair["before"] != pair["after"] for pair in result["answers"]) and not result["warnings"]
    assert len(resolve("new", store).adapters) == 1
    assert not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & set(environment_of(programs))


def test_only_options_that_the_program_knows_are_given_to_it(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    four = "--train-data F --sample-start S --model-base F --lora-out F"
    write_old_finetune(programs, help_text=four)
    ended = run(store, tmp_path, "--base-gguf", gguf, "--skip-retrain")
    assert ended.code == 0, ended.err
    assert argv_of(programs)[::2] == ["--train-data", "--sample-start", "--model-base", "--lora-out"]
    assert ended.document["landed"] is None and ended.document["adapter_gguf"]


def test_a_trainer_that_fails_is_told_with_its_last_words_and_nothing_is_landed(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    path = write_old_finetune(programs)
    path.write_text(path.read_text() + "\nsys.stderr.write('CUDA error: out of memory\\n')\nsys.exit(3)\n")
    before = tree_hash(store)
    ended = run(store, tmp_path, "--base-gguf", gguf, name="failed")
    assert ended.code == 1
    error = ended.document["error"]
    assert error["kind"] == "training" and "exit code 3" in error["what"] and "out of memory" in error["why"]
    assert tree_hash(store) == before
    assert not (Path.cwd() / "adapter_out" / "lora.bin").exists()


def test_a_trainer_that_trained_nothing_is_told(store: Path, gguf: Path, programs: Path, tmp_path: Path) -> None:
    write_old_finetune(programs, strength=0.0)
    ended = run(store, tmp_path, "--base-gguf", gguf, name="nothing")
    assert ended.code == 1 and "changed nothing" in ended.document["error"]["what"]
    write_program(programs, "finetune", "", help_text=HELP_OLD)
    ended = run(store, tmp_path, "--base-gguf", gguf, "--force", "--adapter-output", "empty", name="nothing")
    assert ended.code == 1 and "nothing at" in ended.document["error"]["what"]
    assert not {"nothing:latest", "failed:latest", "not-made:latest"} & set(names_in(store))


def test_an_adapter_is_not_trained_over_without_force(store: Path, gguf: Path, programs: Path, tmp_path: Path) -> None:
    write_old_finetune(programs)
    (Path.cwd() / "adapter_out").mkdir()
    old = Path.cwd() / "adapter_out" / "lora.bin"
    old.write_bytes(b"hours of work")
    ended = run(store, tmp_path, "--base-gguf", gguf, name="over")
    assert ended.code == 1 and ended.document["error"]["kind"] == "exists" and old.read_bytes() == b"hours of work"
    (programs / "argv.json").unlink(missing_ok=True)
    assert run(store, tmp_path, "--base-gguf", gguf, "--force", name="over").code == 0
    assert old.read_bytes()[:4] == b"algg"


def test_prepared_data_is_kept_where_it_is_the_same_and_never_replaced_otherwise(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    write_old_finetune(programs)
    words = ("--base-gguf", gguf, "--skip-retrain", "--prepared-output", "mine.txt")
    assert run(store, tmp_path, *words).code == 0
    assert run(store, tmp_path / "again", *words, "--adapter-output", "second").code == 0
    (Path.cwd() / "mine.txt").write_text("my own notes")
    ended = run(store, tmp_path / "third", *words, "--adapter-output", "third")
    assert ended.code == 1 and ended.document["error"]["kind"] == "exists"
    assert (Path.cwd() / "mine.txt").read_text() == "my own notes"


def test_the_data_itself_is_never_the_prepared_output(store: Path, programs: Path, tmp_path: Path) -> None:
    ended = run(store, tmp_path, "--prepared-output", DATA, "--force")
    assert ended.code == 2 and "among the data" in ended.document["error"]["what"]


def test_what_a_layer_cannot_hold_is_merged_and_that_is_said(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    write_old_finetune(programs, targets=("blk.0.attn_q.weight", "blk.0.attn_norm.weight"), strength=0.1)
    ended = run(store, tmp_path, "--base-gguf", gguf, name="normed")
    assert ended.code == 0, ended.err
    assert "Merged" in ended.document["warnings"][0] and "attn_norm" in ended.document["warnings"][0]
    assert not resolve("normed", store).adapters and len(ended.document["answers"]) == 3


def test_without_a_finetune_run_trainer_is_an_error_and_says_the_way(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    ended = run(store, tmp_path, "--base-gguf", gguf, "--run-trainer")
    assert ended.code == 1 and "built-in" in ended.document["error"]["next"]


def test_todays_finetune_gets_a_float32_base_and_its_model_is_landed_in_the_bases_quantization(
    store: Path, programs: Path, tmp_path: Path
) -> None:
    write_new_finetune(programs)
    ended = run(store, tmp_path, "--trainer", "llama.cpp", "--lr", "1e-5", name="whole")
    assert ended.code == 0, ended.err
    argv = argv_of(programs)
    given = dict(zip(argv[::2], argv[1::2], strict=True))
    assert given["--learning-rate"] == "1e-05" and int(given["-c"]) % 32 == 0
    assert ended.document["model"] == str(tmp_path / "work" / "finetuned-f32.gguf")
    rows = {row["name"]: row for row in forge_json("list", "--store", store)}
    assert rows["whole:latest"]["quantization"] == rows["base:latest"]["quantization"] == "Q4_K_M"
    assert any("all weights" in warning for warning in ended.document["warnings"])


def test_a_dry_run_of_another_trainer_writes_nothing(store: Path, gguf: Path, programs: Path, tmp_path: Path) -> None:
    write_old_finetune(programs)
    before = tree_hash(store)
    ended = run(store, tmp_path, "--base-gguf", gguf, "--dry-run")
    assert ended.code == 0 and ended.document["dry_run"] and ended.document["prepared"]["samples"] == 50
    assert tree_hash(store) == before and not (tmp_path / "work").exists() and not list(Path.cwd().iterdir())


def test_a_gguf_of_another_model_is_refused_before_training(store: Path, programs: Path, tmp_path: Path) -> None:
    from tiny_models import build_model

    build_model("llama3", tmp_path / "other")
    forge_json("convert", tmp_path / "other", "-o", tmp_path / "other.gguf")
    ended = run(store, tmp_path, "--base-gguf", tmp_path / "other.gguf")
    assert ended.code == 1 and "--base-gguf" in ended.document["error"]["what"]


def test_the_builtin_trainer_trains_on_the_gguf_and_lands_on_the_base(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    ended = run(
        *(store, tmp_path, "--base-gguf", gguf, "--max-steps", "1", "--max-length", "64", "--rank", "2"),
        *("--adapter-output", "mine", "--prepared-output", "blocks.txt"),
        name="twin",
    )
    assert ended.code == 0, ended.err
    rows = {row["name"]: row for row in forge_json("list", "--store", store)}
    assert rows["twin:latest"]["blob"] == rows["base:latest"]["blob"]
    assert ended.document["plan"]["base_bytes"] == gguf.stat().st_size
    assert (Path.cwd() / "mine" / "adapter_config.json").exists()
    assert (Path.cwd() / "blocks.txt").read_text().startswith("### Instruction:")


def test_axolotl_that_is_not_here_gets_everything_written_and_the_command_is_said(
    store: Path, programs: Path, tmp_path: Path
) -> None:
    ended = run(store, tmp_path, "--trainer", "axolotl", "--rank", "4", "--lr", "1e-3")
    assert ended.code == 1
    error = ended.document["error"]
    config_path = tmp_path / "work" / "axolotl.yaml"
    assert error["kind"] == "missing_extra" and f"axolotl train {config_path}" in error["next"]
    assert "ollama-forge retrain --base base" in error["next"]
    config = yaml.safe_load(config_path.read_text())
    assert (config["adapter"], config["lora_r"], config["lora_alpha"], config["load_in_4bit"]) == ("lora", 4, 8, False)
    assert config["learning_rate"] == 1e-3
    (data,) = config["datasets"]
    first = json.loads(Path(data["path"]).read_text().splitlines()[0])
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"]
    assert (Path(config["base_model"]) / "config.json").exists()
    again = run(store, tmp_path, "--trainer", "axolotl", "--skip-retrain", "--resume")
    assert again.code == 0 and again.document["trained"] is False and again.document["command"][1] == "train"


def test_axolotl_that_is_here_is_run_and_its_adapter_landed(store: Path, programs: Path, tmp_path: Path) -> None:
    write_axolotl(programs)
    ended = run(store, tmp_path, "--trainer", "axolotl", "--rank", "4", name="axolotl")
    assert ended.code == 0, ended.err
    assert ended.document["landed"]["shared_bytes"] > ended.document["landed"]["written_bytes"]
    assert "trained" in ended.err
    assert len(resolve("axolotl", store).adapters) == 1


def test_unsloths_script_trains_and_its_adapter_is_landed(
    store: Path, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_unsloth(tmp_path / "packages")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    ended = run(
        *(store, tmp_path, "--trainer", "unsloth", "--max-steps", "6", "--lr", "2e-2", "--max-length", "64"),
        name="unsloth",
    )
    assert ended.code == 0, ended.err
    assert ended.document["command"][0] == sys.executable
    assert any(pair["before"] != pair["after"] for pair in ended.document["answers"])
    assert len(resolve("unsloth", store).adapters) == 1


def test_unsloths_script_masks_as_the_builtin_trainer_does() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    examples = read_dataset([DATA]).examples[:10]
    ours = tokenize_examples(examples, open_chat_format(DEMO_MODEL), max_length=64).rows
    settings = {"max_length": 64, "learn": "assistant"}
    for example, row in zip(examples, ours, strict=True):
        masked = unsloth_script.mask(example.messages(), None, tokenizer, settings)
        assert (masked["input_ids"], masked["labels"]) == (list(row.input_ids), list(row.labels))


def test_unsloth_that_is_not_here_leaves_a_script_and_settings(store: Path, programs: Path, tmp_path: Path) -> None:
    ended = run(store, tmp_path, "--trainer", "unsloth")
    assert ended.code == 1 and "train_unsloth.py" in ended.document["error"]["next"]
    settings = json.loads((tmp_path / "work" / "unsloth.json").read_text())
    assert Path(settings["data"]).exists() and (Path(settings["base"]) / "model.safetensors").exists()
    compile((tmp_path / "work" / "train_unsloth.py").read_text(), "train_unsloth.py", "exec")


def test_a_folder_base_is_given_to_the_trainer_as_it_is(programs: Path, tmp_path: Path) -> None:
    ended = forge(
        *("finetune", "--data", DATA, "--base", DEMO_MODEL, "--trainer", "axolotl", "--skip-retrain", "--json"),
        *("--workdir", tmp_path / "work"),
    )
    assert ended.code == 0, ended.err
    config = yaml.safe_load((tmp_path / "work" / "axolotl.yaml").read_text())
    assert config["base_model"] == str(DEMO_MODEL) and "special_tokens" not in config
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        *("axolotl.yaml", "train.jsonl", "trainer.json"),
    ]


def test_a_working_folder_belongs_to_one_run_and_one_base(
    store: Path, gguf: Path, programs: Path, tmp_path: Path
) -> None:
    words = ("finetune", "--data", DATA, "--trainer", "axolotl", "--skip-retrain", "--json", "--store", store)
    words = (*words, "--workdir", tmp_path / "work")
    assert forge(*words, "--base", gguf).code == 0
    weights = tmp_path / "work" / "base-hf" / "model.safetensors"
    first = weights.read_bytes()
    assert forge(*words, "--base", gguf).document["error"]["kind"] == "exists"
    assert forge(*words, "--base", gguf, "--resume").code == 0
    assert "asked something else" in forge(*words, "--base", "base", "--resume").document["error"]["what"]
    assert forge(*words, "--base", "base", "--force").code == 0
    assert weights.read_bytes() != first


def test_bad_data_does_not_claim_the_folder(store: Path, programs: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "only"}\n')
    words = ("finetune", "--base", "base", "--store", store, "--trainer", "axolotl", "--skip-retrain", "--json")
    words = (*words, "--workdir", tmp_path / "work", "--data", bad)
    assert forge(*words).document["error"]["kind"] == "dataset"
    bad.write_text('{"instruction": "mended", "output": "yes"}\n')
    assert forge(*words).code == 0


def test_a_trainer_takes_only_its_own_form_of_data(store: Path, programs: Path, tmp_path: Path) -> None:
    ended = run(store, tmp_path, "--trainer", "axolotl", "--format", "llama.cpp")
    assert ended.code == 2 and "--format axolotl" in ended.document["error"]["next"]


def test_what_a_program_writes_arrives_while_it_runs(tmp_path: Path) -> None:
    """The program goes on only when its first words were heard, and these do not end with a line."""
    body = (
        "import sys, time, pathlib\nsys.stdout.write('step 1')\n"
        "while not pathlib.Path('heard').exists():\n    time.sleep(0.01)\nprint(' end')\n"
    )
    (tmp_path / "p.py").write_text(body)
    heard: list[bytes] = []

    def listen(chunk: bytes) -> None:
        heard.append(chunk)
        (tmp_path / "heard").touch()

    command = [sys.executable, "-c", "import runpy; runpy.run_path('p.py')"]
    run_program(command, tmp_path, listen)
    assert b"".join(heard) == b"step 1 end\n"


HOLDER = (
    "import os, subprocess, sys, time\n"
    "held = os.open('pipe', os.O_WRONLY)\n"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], pass_fds=[held])\n"
    "os.write(1, b'started')\ntime.sleep(600)\n"
)
"""A program that holds a pipe open for writing, and so does its child: its end is read only when both are gone."""


def open_pipe(folder: Path) -> int:
    (folder / "p.py").write_text(HOLDER)
    os.mkfifo(folder / "pipe")
    return os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)


def require_end(reader: int) -> None:
    os.set_blocking(reader, True)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_an_interrupted_run_leaves_no_process_behind(tmp_path: Path) -> None:
    reader = open_pipe(tmp_path)

    def interrupt(_chunk: bytes) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program([sys.executable, "p.py"], tmp_path, interrupt)
    require_end(reader)


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path) -> None:
    reader = open_pipe(tmp_path)
    code = (
        "import sys; from pathlib import Path; from ollama_forge.jobs.external_program import run_program\n"
        "run_program([sys.executable, 'p.py'], Path('.'), lambda chunk: print('heard', flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"heard\n"
        child.kill()
    require_end(reader)


def test_a_killed_program_is_told_by_the_signals_name(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="SIGKILL"):
        run_program([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], tmp_path, len)
