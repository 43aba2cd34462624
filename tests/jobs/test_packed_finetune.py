"""`finetune --packing` and `--report-to` through the command line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import DEMO_MODEL, forge, forge_json
from safetensors.numpy import load_file
from tiny_models import build_model
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ollama_forge.train.options import LOGGERS

ROWS = [{"prompt": f"Question {number}?", "completion": f" Answer {number}, in words."} for number in range(12)]
LOGGER = """
import json, os
class SummaryWriter:
    def __init__(self, log_dir):
        os.makedirs(log_dir, exist_ok=True)
        self.path = os.path.join(log_dir, "events.jsonl")
    def _write(self, *words):
        with open(self.path, "a") as stream:
            stream.write(json.dumps(words) + "\\n")
    add_text = add_scalar = _write
    def flush(self): ...
    def close(self): ...
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    forge_json("convert", DEMO_MODEL, "-o", folder / "base.gguf")
    return folder


def words(place: Path, workdir: Path, *more: object) -> list[object]:
    where = ["--store", place / "store", "--workdir", workdir, "--skip-retrain"]
    return ["finetune", "--data", place / "data.jsonl", "--base", place / "base.gguf", *where, *more]


def matrices(workdir: Path) -> dict[str, np.ndarray]:
    return dict(load_file(str(workdir / "adapter" / "adapter_model.safetensors")))


def test_a_packed_step_learns_what_a_padded_one_learns(place: Path, tmp_path: Path) -> None:
    one_step = ("--epochs", "1", "--grad-accum", "1", "--max-length", "1024", "--val-split", "0.25")
    packed = forge_json(*words(place, tmp_path / "packed", *one_step, "--packing"))
    padded = forge_json(*words(place, tmp_path / "padded", *one_step, "--batch-size", "9"))
    assert packed["plan"]["rows"] == 1 and packed["steps"] == 1 == padded["steps"]
    assert padded["plan"]["rows"] == padded["plan"]["examples"] == packed["plan"]["examples"] == 9
    for key in ("losses", "base_loss", "final_loss"):
        assert np.allclose(packed[key], padded[key], atol=1e-5), key
    alone = forge_json(*words(place, tmp_path / "alone", *one_step, "--max-steps", "1"))
    assert np.allclose(packed["validation_losses"][0], alone["validation_losses"][0], atol=1e-5)
    there, here = matrices(tmp_path / "packed"), matrices(tmp_path / "padded")
    assert all(np.allclose(there[key], here[key], atol=1e-5) for key in here)


def test_steps_are_those_of_packed_rows_and_a_resumed_run_gives_the_same_adapter(place: Path, tmp_path: Path) -> None:
    many = ("--epochs", "2", "--grad-accum", "1", "--max-length", "64", "--packing", "--checkpoint-every", "1")
    plan = forge_json(*words(place, tmp_path / "whole", *many, "--dry-run"))["plan"]
    assert 1 < plan["rows"] < plan["examples"] and plan["steps"] == 2 * plan["rows"]
    told = forge(*words(place, tmp_path / "whole", *many, "--dry-run"))
    assert f"packed into {plan['rows']} rows" in told.err
    whole = forge_json(*words(place, tmp_path / "whole", *many))
    assert whole["steps"] == plan["steps"]
    forge_json(*words(place, tmp_path / "broken", *many))
    for path in (tmp_path / "broken").glob(f"checkpoint-{plan['steps']}/*"):
        path.unlink()  # as if it had been killed before the last one
    (tmp_path / "broken" / "adapter" / "adapter_model.safetensors").unlink()
    resumed = forge_json(*words(place, tmp_path / "broken", *many), "--resume")
    assert resumed["steps"] == plan["steps"]
    there, here = matrices(tmp_path / "broken"), matrices(tmp_path / "whole")
    assert all(np.array_equal(there[key], here[key]) for key in here)


def test_a_model_that_turns_long_rows_otherwise_is_not_packed_with_a_long_example(tmp_path: Path) -> None:
    build_model("phi3_long", tmp_path / "phi")
    rows = [*ROWS, {"prompt": "Tell me more.", "completion": " word" * 900}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = ["finetune", "--data", tmp_path / "long.jsonl", "--base", tmp_path / "phi", "--skip-retrain", "--dry-run"]
    refused = forge(*run, "--packing")
    assert refused.code == 1 and "phi3" in refused.err and "--max-length 512" in refused.err
    assert forge(*run).code == 0
    plan = forge_json(*run, "--packing", "--max-length", "512")["plan"]
    assert plan["rows"] < plan["examples"] == 13


def test_every_logger_of_transformers_that_needs_one_package_is_known() -> None:
    assert set(LOGGERS) == set(INTEGRATION_TO_CALLBACK) - {"azure_ml", "dagshub", "flyte", "kubeflow"}


@pytest.mark.parametrize("name", ["wandb", "comet_ml"])
def test_a_logger_that_is_not_installed_is_refused_with_its_package(place: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    for more in ((), ("--dry-run",)):
        ended = forge(*words(place, tmp_path / "run", "--report-to", name, *more))
        assert ended.code == 1 and f"pip install {LOGGERS[name][0]}" in ended.err
    models = ("--teacher", place / "base.gguf", "--student", DEMO_MODEL, "--data", place / "data.jsonl", "--name", "s")
    ended = forge("downsize", "distill", *models, "--report-to", name, "--store", place / "store")
    assert ended.code == 1 and f"pip install {LOGGERS[name][0]}" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_logger_hears_every_loss_and_no_token(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "tensorboardX").mkdir(parents=True)
    (tmp_path / "site" / "tensorboardX" / "__init__.py").write_text(LOGGER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    short = ("--epochs", "1", "--grad-accum", "1", "--max-steps", "3")
    result = forge_json(*words(place, tmp_path / "run", *short, "--report-to", "tensorboard"))
    (events,) = (tmp_path / "run").rglob("events.jsonl")
    lines: list[Any] = [json.loads(line) for line in events.read_text(encoding="utf-8").splitlines()]
    heard = [[line[2], line[1]] for line in lines if line[0] == "train/loss"]
    assert heard == result["losses"] and len(heard) == 3
    assert "hf_secret" not in events.read_text(encoding="utf-8")
    forge_json(*words(place, tmp_path / "silent", *short))
    assert not list((tmp_path / "silent").rglob("events.jsonl"))


def test_what_only_the_built_in_trainer_does_is_refused_for_others(place: Path, tmp_path: Path) -> None:
    for option in (("--packing",), ("--report-to", "tensorboard")):
        ended = forge(*words(place, tmp_path / "run", "--trainer", "axolotl", *option))
        assert ended.code == 2 and option[0] in ended.err and "--trainer builtin" in ended.err
