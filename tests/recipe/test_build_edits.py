"""Recipes that abliterate and downsize: the same jobs as the commands, kept and done once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from learnt_model import HOUSE_THINGS, VEGETABLES, trained_prompts


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with the demo model, which refuses to talk about vegetables; lists of prompts; a text."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "place"
    forge_json("import", DEMO_MODEL, "--name", "base", "--no-check", "--store", folder / "store")
    for name, nouns in (("harmful", VEGETABLES), ("harmless", HOUSE_THINGS)):
        (folder / f"{name}.txt").write_text("\n".join(trained_prompts(nouns, 48)) + "\n", encoding="utf-8")
    (folder / "train.jsonl").write_bytes((DEMO_MODEL.parent / "finetune.jsonl").read_bytes())
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_abliterate_is_a_step_with_its_evidence(place: Path) -> None:
    text = (
        "name: open\nbase: base\nsystem: Be helpful.\nsteps:\n  - abliterate:\n      harmful: harmful.txt\n"
        "      harmless: harmless.txt\n      num_prompts: 24\n      num_eval_prompts: 6\n      trial_tokens: 16\n"
        "      max_tokens: 32\n"
    )
    recipe = write(place, text)
    planned = forge_json("build", recipe, "--dry-run", "--store", place / "store")
    assert [step["kind"] for step in planned["estimate"]["steps"]] == ["abliterate", "create"]
    done = forge_json("build", recipe, "--no-check", "--store", place / "store")
    (step,) = done["steps"]
    assert step["state"] == "done" and step["facts"]["scores"]["refusal_rate"] <= 0.2
    assert step["facts"]["matrices"]["ffn_down"] == 3
    assert forge_json("show", "open", "--store", place / "store")["system"] == "Be helpful."
    lock = json.loads((place / "recipe.lock").read_text())
    assert set(lock["steps"][0]["inputs"]) == {"harmful.txt", "harmless.txt"}
    assert forge_json("build", recipe, "--store", place / "store")["up_to_date"]


def test_downsize_cuts_and_heals(place: Path) -> None:
    text = (
        "name: small\nbase: base\nsteps:\n  - downsize:\n      layers: 2\n      tokens: 256\n      data: train.jsonl\n"
        "      max_steps: 1\n      rank: 2\n      max_length: 64\n      grad_accum: 1\n"
    )
    recipe = write(place, text)
    done = forge_json("build", recipe, "--no-check", "--store", place / "store")
    (step,) = done["steps"]
    assert step["facts"]["steps"] == 1 and step["facts"]["final_divergence"] >= 0
    sizes = {row["name"]: row["size"] for row in forge_json("list", "--store", place / "store")}
    assert sizes["small:latest"] < sizes["base:latest"]
    assert forge_json("build", recipe, "--store", place / "store")["up_to_date"]


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
def test_what_downsize_cannot_mean_is_refused_before_any_work(place: Path, options: str, words: str) -> None:
    recipe = write(place, f"name: small\nbase: base\nsteps:\n  - downsize: {options}\n")
    ended = forge("validate-recipe", recipe, "--json")
    assert ended.code == 1 and any(words in f"{item['what']} {item['hint']}" for item in ended.document["problems"])
