"""Plans: exact commands with what they take; they run only while all that they read is what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from hub_fixtures import DEMO_FILES as DEMO_FILES
from hub_fixtures import ggufs as ggufs
from hub_fixtures import hub as hub
from hub_fixtures import store as store
from loopback_hub import LoopbackHub
from shards import write_shards
from tiny_adapters import write_lora

from ollama_forge.jobs.starters import STARTERS
from ollama_forge.store.catalog import open_store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty work folder of the test's own."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model, a GGUF, an adapter, data, a prompt and a recipe."""
    folder = tmp_path_factory.mktemp("origin")
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check", "--store", folder / "store")
    forge_json("convert", DEMO_MODEL, "-o", folder / "f.gguf")
    shutil.copytree(DEMO_MODEL, folder / "model")
    write_lora(folder / "model", folder / "lora")
    shutil.copy(DEMO_MODEL.parent / "finetune.jsonl", folder / "train.jsonl")
    (folder / "prompt.txt").write_text("Answer like a pirate.")
    (folder / "recipe.yaml").write_text("name: built\ncheckpoint: model\nsteps: [{merge: lora}, {quantize: Q4_K_M}]\n")
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, which is the current folder."""
    shutil.copytree(origin, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


S = ("--store", "store", "--no-check")
PLANNED = {
    "create-from-base": ("--base", "base", "--name", "n", "--system", "@prompt.txt", *S),
    "quantize": ("f.gguf", "-o", "q.gguf", "--type", "Q4_K_M"),
    "convert": ("--gguf", "f.gguf", "--name", "n", *S),
    "import": ("model", "--name", "n", "--quant", "Q8_0", *S),
    "merge": ("base", "lora", "-o", "merged.gguf", "--store", "store"),
    "retrain": ("--base", "base", "--adapter", "lora", "--name", "n", *S),
    "build": ("recipe.yaml", *S),
    "auto": ("f.gguf", "--name", "n", *S),
}
CHANGED = {
    "create-from-base": "prompt.txt",
    "quantize": "f.gguf",
    "convert": "f.gguf",
    "import": "model/config.json",
    "merge": "lora/adapter_config.json",
    "retrain": "lora/adapter_config.json",
    "build": "lora/adapter_config.json",
    "auto": "f.gguf",
}


@pytest.mark.parametrize("command", PLANNED)
def test_a_plan_says_what_it_takes_changes_nothing_and_runs_once_its_inputs_are_the_same(
    place: Path, tmp_path: Path, command: str
) -> None:
    plan_path = tmp_path / "plan.json"
    before = tree_hash(place)
    plan = forge_json("plan", "-o", plan_path, command, *PLANNED[command])
    assert tree_hash(place) == before
    (step,) = plan["steps"]
    estimate = step["estimate"]
    assert estimate["disk_bytes"] >= 0 and estimate["memory_bytes"] > 0 and estimate["seconds"] > 0
    assert plan["inputs"] and step["dry_run"] and "--dry-run" not in step["arguments"]
    first = plan_path.read_bytes()
    forge_json("plan", "-o", plan_path, "--force", command, *PLANNED[command])
    assert plan_path.read_bytes() == first
    ended = forge_json("plan", "run", plan_path)
    (done,) = ended["steps"]
    assert done["command"] == [step["command"], *step["arguments"]] and not done["result"].get("dry_run")


@pytest.mark.parametrize("command", PLANNED)
def test_a_plan_whose_inputs_changed_does_not_run(place: Path, tmp_path: Path, command: str) -> None:
    plan_path = tmp_path / "plan.json"
    forge_json("plan", "-o", plan_path, command, *PLANNED[command])
    changed = place / CHANGED[command]
    changed.write_bytes(changed.read_bytes() + b"\n")
    before = tree_hash(place)
    ended = forge("plan", "run", plan_path, "--json")
    assert ended.code == 1 and tree_hash(place) == before
    if command != "build":
        assert ended.document["error"]["kind"] == "recipe" and "was planned" in ended.document["error"]["why"]


def test_a_shard_that_changed_stops_a_plan(place: Path, tmp_path: Path) -> None:
    first, second = write_shards(place / "f.gguf", place)
    forge_json("plan", "-o", tmp_path / "plan.json", "quantize", first, "-o", "q.gguf", "--type", "Q4_K_M")
    second.write_bytes(second.read_bytes()[:-1] + b"!")
    ended = forge("plan", "run", tmp_path / "plan.json", "--json")
    assert ended.code == 1 and "was planned" in ended.document["error"]["why"]
    assert not (place / "q.gguf").exists()


def test_a_base_that_was_replaced_stops_a_plan(place: Path, tmp_path: Path) -> None:
    words = ("create-from-base", "--base", "base", "--name", "n", "--system", "Hi.", *S)
    forge_json("plan", "-o", tmp_path / "plan.json", *words)
    forge_json("create-from-base", "--base", "base", "--name", "base", "--system", "Other.", "--force", *S)
    ended = forge("plan", "run", tmp_path / "plan.json", "--json")
    assert ended.code == 1 and ended.document["error"]["why"].startswith("base: ")


def test_a_finetune_is_planned_with_its_memory_and_disk(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    words = ("finetune", "--data", "train.jsonl", "--base", "base", "--name", "n", "--max-steps", "1", *S)
    plan = forge_json("plan", *words, "-o", tmp_path / "plan.json")
    (step,) = plan["steps"]
    for key in ("memory_bytes", "disk_bytes"):
        assert step["estimate"][key] == step["dry_run"]["plan"][key] > 0
    assert {item["ref"] for item in plan["inputs"]} == {"base", "train.jsonl"} and plan["file"]


def test_the_hub_s_commit_and_file_are_in_the_plan(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    old = hub.add("org/Demo-GGUF", ggufs)
    hub.add("org/demo", DEMO_FILES)
    plan = forge_json("plan", "fetch", "org/Demo-GGUF", "--name", "n", "--store", store, "-o", tmp_path / "p.json")
    (step,) = plan["steps"]
    assert step["arguments"][-4:] == ["--revision", old, "--gguf-file", "Demo-Q8_0.gguf"]
    assert step["estimate"]["download_bytes"] == len(ggufs["Demo-Q8_0.gguf"]) and not store.exists()
    hub.add("org/Demo-GGUF", {**ggufs, "Demo-Q8_0.gguf": ggufs["Demo-Q2_K.gguf"]})
    done = forge_json("plan", "run", tmp_path / "p.json")
    assert done["steps"][0]["result"]["commit"] == old
    commit = hub.repos["org/demo"].refs["main"]
    (imported,) = forge_json("plan", "import", "org/demo", "--name", "i", "--store", store)["steps"]
    assert imported["arguments"][-2:] == ["--revision", commit]
    for row in STARTERS:
        hub.add(row.repo, ggufs)
    (started,) = forge_json("plan", "quickstart", "--profile", "fast", "--quant", "Q2_K", "--store", store)["steps"]
    assert started["command"] == "fetch" and "--num-ctx" in started["arguments"]
    (routed,) = forge_json("plan", "auto", "org/demo", "--name", "i", "--store", store)["steps"]
    assert routed["command"] == "import" and commit in routed["arguments"]


def test_the_best_adapter_is_planned_as_the_command_that_lands_it(
    hub: LoopbackHub, place: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in (place / "lora").iterdir() if path.is_file()}
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": "org/demo"}
    files["adapter_config.json"] = json.dumps(config).encode()
    commit = hub.add("org/lora", files, tags=("base_model:adapter:org/demo",), downloads=5)
    words = ("--base", "base", "--base-repo", "org/demo", "--name", "n", "--store", "store")
    plan = forge_json("plan", "adapters-apply", *words, "-o", tmp_path / "p.json")
    (step,) = plan["steps"]
    assert step["command"] == "fetch-adapter" and step["arguments"][:3] == ["org/lora", "--base", "base"]
    assert commit in step["arguments"]
    forge_json("plan", "run", tmp_path / "p.json")
    assert len(open_store(place / "store").find("n").adapters) == 1


def test_people_see_a_table_and_the_command(place: Path) -> None:
    ended = forge("plan", "quantize", "f.gguf", "-o", "q.gguf", "--type", "Q4_K_M")
    assert ended.code == 0 and "ollama-forge quantize f.gguf -o q.gguf --type Q4_K_M" in ended.out
    assert "Nothing was changed" in ended.out and "reads f.gguf" in ended.out and not Path("q.gguf").exists()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"steps": [{"command": "demo", "arguments": []}]}, "'demo' is no command"),
        ({"steps": [{"command": "rm", "arguments": ["-rf", "/"]}]}, "'rm' is no command"),
        ({"steps": [{"command": "plan", "arguments": ["run", "plan.json"]}]}, "'plan' is no command"),
        ({"steps": ["ollama-forge list"]}, "steps.0"),
        ({"steps": [{"command": "fetch; id", "arguments": []}]}, "is no command"),
        ({"steps": [{"command": "fetch", "arguments": "a b"}]}, "arguments"),
        ({"steps": [], "shell": "id"}, "shell"),
        ({"schema_version": 2, "steps": []}, "schema_version"),
        ([], "Input should be"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, document: object, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    ended = forge("plan", "run", path, "--json")
    assert ended.code == 1 and words in ended.document["error"]["why"], ended.out


def test_arguments_that_no_command_takes_and_inputs_that_nobody_named_are_refused(place: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"steps": [{"command": "quantize", "arguments": ["f.gguf", "--shell", "id"]}]}))
    assert forge("plan", "run", path).code == 2
    arguments = ["f.gguf", "-o", "q.gguf", "--type", "Q4_K_M"]
    path.write_text(json.dumps({"steps": [{"command": "quantize", "arguments": arguments}]}))
    ended = forge("plan", "run", path, "--json")
    assert ended.code == 1 and "the plan does not know it" in ended.document["error"]["why"]
    assert not Path("q.gguf").exists()


def test_the_seeds_other_plans_work_or_name_the_better_way() -> None:
    ended = forge("plan", "continue", "--execute", "--json")
    assert ended.code == 2 and "plan run plan.json" in ended.document["error"]["next"]
    assert forge("plan", "list").code == 2 and forge("plan").code == 2
    assert "fixes" in forge("plan", "doctor-fix", "--json").document
    assert forge("plan", "run").code == 2 and forge("plan", "run", "absent.json").code == 1
