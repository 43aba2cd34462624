"""A recipe that trains: killed while it does, it goes on from its checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json

from ollama_forge.store.catalog import open_store


def test_a_killed_finetune_step_goes_on_from_its_checkpoint_to_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check", "--store", place / "store")
    shutil.copy(DEMO_MODEL.parent / "finetune.jsonl", place / "train.jsonl")
    recipe = place / "recipe.yaml"
    recipe.write_text(
        "name: taught\nbase: base\nsteps:\n  - finetune:\n      data: train.jsonl\n      max_steps: 5\n      rank: 2\n"
        "      max_length: 64\n      checkpoint_every: 1\n      grad_accum: 2\n",
    )
    words = ["build", str(recipe), "--store", str(place / "store"), "--json"]
    steps = tmp_path / "home" / "builds" / "steps"
    with subprocess.Popen([sys.executable, "-m", "ollama_forge", *words], stdout=subprocess.DEVNULL) as child:
        try:
            deadline = time.monotonic() + 120
            while not any(steps.glob("finetune-*/run/checkpoint-*/complete.json")) and time.monotonic() < deadline:
                assert child.poll() is None
                time.sleep(0.01)
        finally:
            child.kill()
    assert not any(steps.glob("finetune-*/done.json")) and not (place / "recipe.lock").exists()
    kept = {path: path.stat().st_mtime_ns for path in steps.glob("finetune-*/run/checkpoint-1*/complete.json")}
    done = forge_json(*words[:-1])
    (step,) = done["steps"]
    assert step["state"] == "done" and step["facts"]["steps"] == 5
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items() if path.exists())
    assert len(open_store(place / "store").find("taught").adapters) == 1
    lock = json.loads((place / "recipe.lock").read_text())
    assert lock["steps"][0]["options"]["seed"] == 0 and "torch" in lock["versions"]
    assert forge_json(*words[:-1])["up_to_date"]
