"""Training on a disk that is too small: refused before the work, and in the middle of it ended in words."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from small_disk import give_room, small_disk

from ollama_forge.jobs import training_disk

ROWS = [{"prompt": f"Question {number}?", "completion": f" Answer {number}."} for number in range(4)]
STEPS = ("--epochs", "1", "--grad-accum", "1", "--checkpoint-every", "1", "--max-length", "32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, a teacher that differs from it, and data."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    forge_json("convert", DEMO_MODEL, "-o", folder / "teacher.gguf")
    forge_json("quantize", folder / "teacher.gguf", "--type", "Q4_0", "-o", folder / "student.gguf")
    return folder


def words(place: Path, kind: str, workdir: Path) -> list[object]:
    where = ["--store", place / "store", "--workdir", workdir, "--force"]
    common = ["--data", place / "data.jsonl", "--name", "made", *where, *STEPS]
    if kind == "finetune":
        return ["finetune", "--base", place / "student.gguf", *common]
    models = ["--teacher", place / "teacher.gguf", "--student", place / "student.gguf"]
    return ["downsize", "distill", *models, *common, *(["--full"] if kind == "full" else [])]


def result_hash(workdir: Path, kind: str) -> str:
    name = "student.gguf" if kind == "full" else "adapter/adapter_model.safetensors"
    return hashlib.sha256((workdir / name).read_bytes()).hexdigest()


KINDS = ("finetune", "lora", "full")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_says_what_goes_to_disk_and_how_long_it_takes(place: Path, kind: str, tmp_path: Path) -> None:
    dry = forge(*words(place, kind, tmp_path / "run"), "--dry-run")
    assert dry.code == 0 and "of disk (3 x " in dry.err and "free for" in dry.err
    assert "of computing on this processor" in dry.err or "the pace of the card" in dry.err
    assert not (tmp_path / "run").exists()
    plan = forge_json(*words(place, kind, tmp_path / "run"), "--dry-run")["plan"]
    assert plan["seconds"] is None or plan["seconds"] >= 0
    forge_json(*words(place, kind, tmp_path / "run"))
    checkpoints = [
        sum(file.stat().st_size for file in path.iterdir()) for path in (tmp_path / "run").glob("checkpoint-*")
    ]
    assert len(checkpoints) == plan["disk"]["checkpoints"] - 1
    assert max(checkpoints) <= plan["disk"]["checkpoint_bytes"] < 1.2 * max(checkpoints)
    written = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert written <= plan["disk_bytes"]


def test_a_dry_run_over_a_folder_writes_nothing_and_counts_the_converted_base(place: Path, tmp_path: Path) -> None:
    same = words(place, "finetune", tmp_path / "run")
    from_folder = [DEMO_MODEL if word == place / "student.gguf" else word for word in same]
    plans = [forge_json(*some, "--dry-run")["plan"] for some in (from_folder, same)]
    assert plans[0]["disk"]["result_bytes"] > plans[1]["disk"]["result_bytes"] + plans[0]["base_bytes"] // 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_is_refused_before_the_work(
    place: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=900_000))
    for more in ((), ("--dry-run",)):
        ended = forge(*words(place, kind, tmp_path / "run"), *more)
        assert ended.code == 1 and "bytes are missing" in ended.err
        assert str(tmp_path / "run") in ended.err.replace("\n", "") and "--workdir" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_in_the_middle_leaves_a_run_that_goes_on_once_there_is_room(
    place: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forge_json(*words(place, kind, tmp_path / "whole"))
    monkeypatch.setattr(training_disk.TrainingDisk, "require", lambda self: None)  # somebody else takes the room later
    with small_disk(tmp_path / "disk", "40m" if kind == "full" else "5m") as disk:
        again = words(place, kind, disk / "run")
        for more in ((), ("--resume",)):
            ended = forge(*again, *more)
            assert ended.code == 1 and "No space left" in ended.err and "Traceback" not in ended.err, ended.err
            assert "checkpoint-2" in ended.err and "--resume" in ended.err
            assert sorted(path.name for path in disk.glob("run/checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
        give_room(disk, "200m")
        assert forge(*again, "--resume").code == 0
        assert result_hash(disk / "run", kind) == result_hash(tmp_path / "whole", kind)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 192896 vs 192784"),
    ],
)
def test_each_way_in_which_a_writer_says_that_the_disk_is_full_ends_in_the_same_words(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    import torch

    def save(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "save", save)
    ended = forge(*words(place, "finetune", tmp_path / "run"))
    assert ended.code == 1 and "No space left" in ended.err and "No checkpoint is complete" in ended.err
    monkeypatch.undo()
    assert forge(*words(place, "finetune", tmp_path / "run"), "--resume").code == 0
