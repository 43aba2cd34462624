"""Every example recipe is valid, and builds: on the demo model, under the names that the examples use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json
from hub_fixtures import DEMO_FILES as DEMO_FILES
from hub_fixtures import hub as hub
from loopback_hub import LoopbackHub
from tiny_adapters import write_lora

EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".json"))
QUICK = {"taught.yaml": ("--set", "steps=1"), "smaller.yaml": ("--set", "steps=1", "--set", "tokens=256")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `llama3.2`, and beside the examples the files that they name."""
    folder = tmp_path_factory.mktemp("examples")
    forge_json("import", DEMO_MODEL, "--name", "llama3.2", "--no-check", "--store", folder / "store")
    shutil.copytree(EXAMPLES, folder / "recipes")
    forge_json("convert", DEMO_MODEL, "-o", folder / "recipes" / "model-f16.gguf")
    forge_json("convert", DEMO_MODEL, "-o", folder / "demo.gguf", "--quant", "Q8_0")
    write_lora(DEMO_MODEL, folder / "recipes" / "my-adapter")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_an_example_builds_and_a_second_time_there_is_nothing_to_do(
    name: str, prepared: Path, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    hub.add("Qwen/Qwen3-0.6B", DEMO_FILES)
    hub.add("Qwen/Qwen3-0.6B-GGUF", {"Qwen3-0.6B-Q8_0.gguf": (prepared / "demo.gguf").read_bytes()})
    adapter = prepared / "recipes" / "my-adapter"
    hub.add("org/my-lora", {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()})
    shutil.copytree(prepared / "store", tmp_path / "store")
    recipe = prepared / "recipes" / name
    words = (recipe, *QUICK.get(name, ()))
    assert forge_json("validate-recipe", *words)["valid"]
    done = forge_json("build", *words, "--store", tmp_path / "store", "--no-check")
    assert done["landed"] and done["lock_written"]
    facts = {step["kind"]: step["facts"] for step in done["steps"]}
    if "abliterate" in facts:
        assert facts["abliterate"]["scores"]["refusal_rate"] <= 0.2 and facts["abliterate"]["matrices"]["ffn_down"] == 3
    if "finetune" in facts:
        assert facts["finetune"]["steps"] == 1 and facts["finetune"]["edited"] > 0
    if "downsize" in facts:
        sizes = {row["name"]: row["size"] for row in forge_json("list", "--store", tmp_path / "store")}
        assert facts["downsize"]["steps"] == 1 and sizes["smaller:latest"] < sizes["llama3.2:latest"]
    again = forge_json("build", *words, "--store", tmp_path / "store", "--no-check")
    assert again["up_to_date"] and again["written_bytes"] == 0
