"""What the step `downsize` can mean, said before any work; its real work is seen in the example recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("{}", "needs 'target', or what to cut"),
        ("{target: 60%}", "'target' needs 'data'"),
        ("{target: 60%, data: train.jsonl, keep: 50%}", "'target' is the whole pipeline"),
        ("{keep: 150%}", "keep"),
        ("{width: {ears: 50%}}", "ears"),
        ("{layers: 2, drop_layers: [1], teacher: base}", "'teacher' needs 'data'"),
        ("{target: lots, data: train.jsonl}", "lots"),
    ],
)
def test_what_downsize_cannot_mean_is_refused_before_any_work(tmp_path: Path, options: str, words: str) -> None:
    (tmp_path / "train.jsonl").write_bytes((DEMO_MODEL.parent / "finetune.jsonl").read_bytes())
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: small\nbase: base\nsteps:\n  - downsize: {options}\n")
    ended = forge("validate-recipe", recipe, "--json")
    assert ended.code == 1 and any(words in f"{item['what']} {item['hint']}" for item in ended.document["problems"])


def test_a_finished_step_keeps_its_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: small\ncheckpoint: {DEMO_MODEL}\nsteps:\n  - downsize: {{drop_layers: 1}}\n")
    done = forge_json("build", recipe, "--no-check", "--store", tmp_path / "store")
    folder = tmp_path / "home" / "builds" / "steps" / f"downsize-{done['steps'][0]['key']}"
    assert {path.name for path in folder.iterdir()} == {"done.json", "model.gguf"}
    assert forge_json("build", recipe, "--store", tmp_path / "store")["up_to_date"]
