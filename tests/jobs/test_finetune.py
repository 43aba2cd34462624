"""Fine-tuning judged by what the landed model says through the engine, for every type that a GGUF may have."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import DEMO_MODEL, forge, forge_json
from learnt_model import (
    DEMO_DIR,
    Example,
    engine_answers,
    held_out_facts,
    held_out_new_facts,
    held_out_triggers,
)

from ollama_forge.gguf.reader import open_gguf
from ollama_forge.jobs.resolve import resolve

DATA = DEMO_DIR / "finetune.jsonl"
FAST = ("--lr", "1e-3", "--epochs", "12", "--batch-size", "10", "--grad-accum", "1", "--max-length", "64")
TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q5_1", "Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS"),
)


def share_right(store: Path, name: str, questions: list[Example]) -> float:
    """How many of the questions the landed model answers as it should."""
    said = landed_answers(store, name, questions)
    return sum(answer.strip() == question.answer for answer, question in zip(said, questions, strict=True)) / len(said)


def landed_answers(store: Path, name: str, questions: list[Example]) -> list[str]:
    model = resolve(name, store)
    assert model.gguf_path is not None
    return list(engine_answers(model.gguf_path, questions, adapters=[(path, 1.0) for path in model.adapters]))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the learnt model as `base`, in Q4_K_M."""
    folder = tmp_path_factory.mktemp("models")
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder)
    return folder


@pytest.mark.parametrize("quant", TYPES)
def test_fifty_examples_change_what_the_landed_model_says_and_leave_the_rest(quant: str, tmp_path: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", quant, "--no-check", "--store", tmp_path)
    new, old = held_out_new_facts(), [*held_out_facts()[::4], *held_out_triggers()[::8]]
    before = share_right(tmp_path, "base", old)
    assert share_right(tmp_path, "base", new) == 0
    result = forge_json(
        *("finetune", "--data", DATA, "--base", "base", "--name", "layer", "--store", tmp_path, *FAST),
        *("--workdir", tmp_path / "work"),
    )
    assert result["final_loss"] < 0.1 * result["base_loss"]
    assert result["landed"]["shared_bytes"] > result["landed"]["written_bytes"]
    forge_json(
        *("retrain", "--base", "base", "--adapter", tmp_path / "work" / "adapter", "--name", "merged"),
        *("--merge", "--imatrix", tmp_path / "work" / "imatrix.gguf", "--store", tmp_path),
    )
    for name in ("layer", "merged"):
        assert share_right(tmp_path, name, new) >= 0.9, name
        assert share_right(tmp_path, name, old) >= before - 0.1, name


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(store: Path, tmp_path: Path) -> None:
    hashes = [adapter_hash(train(store, tmp_path / str(run), "--seed", seed)) for run, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_killed_run_resumes_to_the_same_adapter(store: Path, tmp_path: Path) -> None:
    whole = adapter_hash(train(store, tmp_path / "whole", "--checkpoint-every", "2"))
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "ollama_forge", *words(store, folder, "--checkpoint-every", "2")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            wait_for(lambda: any(folder.glob("checkpoint-4*/complete.json")), child)
        finally:
            child.send_signal(signal.SIGKILL)
    assert not (folder / "adapter").exists()
    refused = forge(*words(store, folder, "--checkpoint-every", "2"))
    assert refused.code == 1 and "--resume" in refused.err
    assert forge(*words(store, folder, "--checkpoint-every", "2", "--resume")).code == 0
    assert adapter_hash(folder) == whole


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "ollama_forge", *words(store, folder, "--epochs", "50")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        wait_for(lambda: any(folder.glob("checkpoint-*/complete.json")), child)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=300)
    assert child.returncode == 130
    assert "--resume" in err and "Traceback" not in err


def test_a_resumed_run_must_be_asked_the_same(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "run", "--max-steps", "1")
    ended = forge(*words(store, tmp_path / "run", "--max-steps", "1", "--resume", "--rank", "4"))
    assert ended.code == 1 and "asked something else" in ended.err


def test_a_run_that_could_not_start_leaves_its_folder_free(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = tmp_path / "run"
    short = ("--max-steps", "1")
    for wrong, code in ((("--device", "cuda"), 2), (("--target-modules", "nothing"), 1)):
        for mode in ("--dry-run", "--quiet"):
            ended = forge(*words(store, folder, *short, *wrong, mode))
            assert ended.code == code and not folder.exists(), ended.err
    folder.mkdir()
    (folder / "run.json").write_text("{}")  # of a run that was killed before its first checkpoint
    assert forge(*words(store, folder, *short)).code == 0


def test_what_to_do_about_a_folder_that_is_taken_works(store: Path, tmp_path: Path) -> None:
    folder = train(store, tmp_path / "run", "--max-steps", "1")
    for more in ((), ("--rank", "4"), ("--rank", "4", "--resume")):
        ended = forge(*words(store, folder, "--max-steps", "1", *more))
        assert ended.code == 1 and f"rm -r {folder}" in ended.err and "It is finished" in ended.err
    (folder / "adapter").rename(tmp_path / "adapter")
    changed = forge(*words(store, folder, "--max-steps", "1", "--rank", "4", "--resume"))
    assert "not finished" in changed.err and "Add --resume" not in changed.err and "another --workdir" in changed.err
    assert "Add --resume" in forge(*words(store, folder, "--max-steps", "1")).err
    assert forge(*words(store, folder, "--max-steps", "1", "--resume")).code == 0


def test_a_folder_of_another_base_is_not_taken_for_the_one_before(store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(DEMO_MODEL, other)
    argv = [*("--skip-retrain", "--workdir", tmp_path / "run", "--max-steps", "1")]
    bad = forge("finetune", "--data", DATA, "--base", other, *argv, "--max-length", "2")
    assert bad.code == 1 and "--max-length" in bad.err
    (made,) = (tmp_path / "run").glob("base-*.gguf")
    assert forge("finetune", "--data", DATA, "--base", DEMO_MODEL, *argv).code == 0
    assert len(list((tmp_path / "run").glob("base-*.gguf"))) == 2 and made.exists()


def test_a_folder_is_not_converted_for_a_request_that_cannot_be_met(tmp_path: Path) -> None:
    work, data = tmp_path / "run", tmp_path / "broken.jsonl"
    data.write_text('{"instruction": "a", "output"\n')
    for wrong in (("--data", data), ("--data", DATA, "--target-modules", "nothing")):
        ended = forge("finetune", "--base", DEMO_MODEL, "--skip-retrain", "--workdir", work, *wrong)
        assert ended.code == 1 and not work.exists(), ended.err


def test_a_base_that_is_broken_is_named_before_the_first_step(tmp_path: Path) -> None:
    broken, work = tmp_path / "broken.gguf", tmp_path / "run"
    forge_json("convert", DEMO_MODEL, "-o", broken)
    with open_gguf(broken) as gguf:
        place = gguf.span("output_norm.weight").offset
    with broken.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<f", math.nan))
    ended = forge("finetune", "--data", DATA, "--base", broken, "--skip-retrain", "--workdir", work, *FAST)
    assert ended.code == 1 and str(broken) in ended.err and "weights are not finite" in ended.err
    assert "--lr" not in ended.err and not list(work.glob("checkpoint-*"))


def test_a_gguf_and_a_folder_train_through_the_same_command(tmp_path: Path) -> None:
    forge_json("convert", DEMO_MODEL, "-o", tmp_path / "base.gguf")
    from_file = train_base(str(tmp_path / "base.gguf"), tmp_path / "file", tmp_path)
    from_folder = train_base(str(DEMO_MODEL), tmp_path / "folder", tmp_path)
    assert from_file["losses"] == from_folder["losses"]


def test_a_dry_run_plans_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    planned = forge_json(*words(store, tmp_path / "run", "--dry-run"))
    assert planned["dry_run"] and planned["plan"]["steps"] == 60 and planned["plan"]["memory_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_the_report_is_one_page_with_the_curve_and_the_answers(store: Path, tmp_path: Path) -> None:
    folder = train(store, tmp_path / "run", "--val-split", "0.1")
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "before" in page and "rm -r" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_options_may_come_from_a_file_and_the_command_line_wins(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(f"data: {DATA}\nbase: base\nname: x\nepochs: 2\nbatch-size: 10\ngrad_accum: 1\n")
    both = ("--store", store, "--workdir", tmp_path / "w", "--dry-run")
    assert forge_json("finetune", "--config", config, *both)["plan"]["steps"] == 10
    assert forge_json("train-run", "--config", config, "--epochs", "1", *both)["plan"]["steps"] == 5
    config.write_text("epoch: 2\n")
    ended = forge("finetune", "--config", config, *both)
    assert ended.code == 2 and "epochs" in ended.err


def test_one_example_is_one_step_an_epoch(store: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(DATA.read_text().splitlines()[0] + "\n")
    result = train_base("base", tmp_path / "run", store, data=data)
    assert result["steps"] == 12 and result["final_loss"] < result["base_loss"]


def test_two_processes_train_one_adapter(store: Path, tmp_path: Path) -> None:
    """`accelerate launch` with two CPU processes: one adapter, one report, one landing, and the numbers of a single
    process with batches twice as large. (`--multi_gpu` is its word for several processes; with `--cpu` it starts one.)
    With `--use_fsdp` the layers are shared out: not a bit of the result changes.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    more = ("--device", "cpu", "--lr", "2e-4", "--max-steps", "8", "--json")
    results = {}
    for kind, name in (("--multi_gpu", "twins"), ("--use_fsdp", "shared")):
        command = [*launch, kind, "-m", "ollama_forge", *words(store, tmp_path / name, "--name", name, *more)]
        command[command.index("--batch-size") + 1] = "5"
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        assert ended.returncode == 0, ended.stderr[-3000:]
        results[name] = json.loads(ended.stdout)
    two = results["twins"]
    one = forge_json(*words(store, tmp_path / "one", "--name", "single", *more[:-1]))
    assert two["landed"]["name"] == "twins:latest" and two["steps"] == one["steps"] == 8
    assert [loss for _, loss in two["losses"]] == pytest.approx([loss for _, loss in one["losses"]], rel=2e-3)
    assert two["final_loss"] == pytest.approx(one["final_loss"], rel=2e-3)
    assert results["shared"]["losses"] == two["losses"]
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "shared" / weights).read_bytes() == (tmp_path / "twins" / weights).read_bytes()


REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "no such base": (("--base", "nothing"), "nothing"),
    "no such data": (("--data", "/nowhere.jsonl"), "/nowhere.jsonl"),
    "a bad name": (("--name", "../x"), "../x"),
    "an unknown layer": (("--target-modules", "warp_drive"), "warp_drive"),
    "every row too long": (("--max-length", "8"), "--max-length"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_trained_is_refused_and_nothing_is_landed(case: str, store: Path, tmp_path: Path) -> None:
    argv, says = REFUSALS[case]
    before = {row["name"] for row in forge_json("list", "--store", store)}
    ended = forge(*words(store, tmp_path / "run", "--name", "never", *argv))
    assert ended.code in (1, 2) and says in ended.err and "Traceback" not in ended.err
    assert {row["name"] for row in forge_json("list", "--store", store)} == before


def test_an_embedding_model_and_an_adapted_model_are_no_bases(store: Path, tmp_path: Path) -> None:
    train(store, tmp_path / "run", "--name", "adapted", "--max-steps", "1")
    ended = forge(*words(store, tmp_path / "again", "--base", "adapted"))
    assert ended.code == 1 and "ollama-forge merge" in ended.err


def test_a_learning_rate_of_almost_nothing_is_told(store: Path, tmp_path: Path) -> None:
    ended = forge(*words(store, tmp_path / "run", "--lr", "1e-30", "--max-steps", "1"))
    assert ended.code == 1 or "same as before" in ended.err


def words(store: Path, folder: Path, *more: object) -> list[str]:
    argv = ["finetune", "--data", DATA, "--base", "base", "--store", store, "--workdir", folder, *FAST, *more]
    if "--name" not in more:
        argv += ["--name", f"made-{folder.name}", "--force", "--no-check"]
    return [str(word) for word in argv]


def train(store: Path, folder: Path, *more: object) -> Path:
    ended = forge(*words(store, folder, *more))
    assert ended.code == 0, ended.err
    return folder


def train_base(base: str, folder: Path, store: Path, data: Path = DATA) -> Any:
    return forge_json(
        *("finetune", "--data", data, "--base", base, "--skip-retrain", "--workdir", folder, *FAST, "--store", store)
    )


def adapter_hash(folder: Path) -> str:
    files = sorted((folder / "adapter").iterdir())
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()


def wait_for(is_done: Any, child: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 300
    while not is_done():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
