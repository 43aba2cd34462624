"""Recipes, `start` and `auto` whose weights or adapters lie on the Hub; the Hub is on the loopback."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from hub_fixtures import DEMO_FILES as DEMO_FILES
from hub_fixtures import ggufs as ggufs
from hub_fixtures import hub as hub
from hub_fixtures import store as store
from loopback_hub import LoopbackHub, Status, sha256
from tiny_adapters import write_lora

from ollama_forge.jobs.starters import PROFILES, STARTERS, TASKS, choose_start
from ollama_forge.store.catalog import open_store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty work folder of the test's own."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A PEFT adapter of the demo model, as its repo holds it."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    write_lora(DEMO_MODEL, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_seeds_recipe_fetches_a_gguf_and_pins_its_commit(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path, home: Path
) -> None:
    commit = hub.add("org/Demo-GGUF", ggufs)
    recipe = write(tmp_path, "name: mine\nhf_repo: org/Demo-GGUF\nquant: q4_k_m\nsystem: Be brief.\nnum_ctx: 512\n")
    done = forge_json("build", recipe, "--store", store)
    assert done["source"]["commit"] == commit and done["downloaded_bytes"] == len(ggufs["Demo-Q4_K_M.gguf"])
    assert forge_json("show", "mine", "--store", store)["quantization"] == "Q4_K_M"
    lock = json.loads((tmp_path / "recipe.lock").read_text())
    assert lock["source"]["files"] == {"Demo-Q4_K_M.gguf": sha256(ggufs["Demo-Q4_K_M.gguf"])}
    before = tree_hash(store), tree_hash(home), hub.count("GET /cdn/")
    assert forge_json("build", recipe, "--store", store)["up_to_date"]
    assert (tree_hash(store), tree_hash(home), hub.count("GET /cdn/")) == before


def test_a_locked_build_takes_the_locked_commit_when_the_branch_has_moved(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    old = hub.add("org/Demo-GGUF", ggufs)
    recipe = write(tmp_path, "name: mine\nhf_repo: org/Demo-GGUF\nquant: Q8_0\n")
    first = forge_json("build", recipe, "--store", store)
    new = hub.add("org/Demo-GGUF", {**ggufs, "Demo-Q8_0.gguf": ggufs["Demo-Q2_K.gguf"]})
    assert old != new
    locked = forge_json("build", recipe, "--locked", "--store", tmp_path / "other")
    assert locked["digest"] == first["digest"] and locked["source"]["commit"] == old
    moved = forge_json("build", recipe, "--store", tmp_path / "third")
    assert moved["digest"] != first["digest"] and moved["source"]["commit"] == new and moved["lock_written"]


def test_safetensors_and_an_adapter_of_the_hub_are_merged_and_quantized(
    hub: LoopbackHub, adapter_files: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    hub.add("org/demo", DEMO_FILES)
    commit = hub.add("org/lora", adapter_files)
    recipe = write(
        tmp_path,
        "name: merged\ncheckpoint: hf:org/demo\nsteps:\n  - merge: hf:org/lora\n  - quantize: Q8_0\n",
    )
    planned = forge_json("build", recipe, "--dry-run", "--store", store)
    assert planned["downloaded_bytes"] > 1_000_000 and hub.count("GET /cdn/") == 0 and not store.exists()
    forge_json("build", recipe, "--store", store)
    assert forge_json("show", "merged", "--store", store)["quantization"] == "Q8_0"
    lock = json.loads((tmp_path / "recipe.lock").read_text())
    assert lock["steps"][0]["commits"] == {"hf:org/lora": commit}
    assert forge_json("build", recipe, "--store", store)["up_to_date"]


def test_quant_makes_safetensors_smaller(hub: LoopbackHub, store: Path, tmp_path: Path) -> None:
    hub.add("org/demo", DEMO_FILES)
    done = forge_json("build", write(tmp_path, "name: m\nhf_repo: org/demo\nquant: Q4_K_M\n"), "--store", store)
    assert [step["kind"] for step in done["steps"]] == ["quantize"]
    assert forge_json("show", "m", "--store", store)["quantization"] == "Q4_K_M"


def test_offline_a_second_build_still_has_nothing_to_do(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    recipe = write(tmp_path, "name: mine\nhf_repo: org/Demo-GGUF\nquant: Q2_K\n")
    forge_json("build", recipe, "--store", store)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    ended = forge("build", recipe, "--store", store, "--json")
    assert ended.document["up_to_date"] and "The cache's own org/Demo-GGUF" in ended.err


def test_validate_recipe_asks_the_hub_when_it_is_told_to(hub: LoopbackHub, tmp_path: Path) -> None:
    recipe = write(tmp_path, "name: m\n\nhf_repo: org/absent\n")
    assert forge("validate-recipe", recipe).code == 0 and not hub.requests
    ended = forge("validate-recipe", recipe, "--validate-remote", "--json")
    assert ended.code == 1 and ended.document["problems"][0]["line"] == 3
    hub.add("org/absent", {"README.md": b""})
    assert forge("validate-recipe", recipe, "--validate-remote").code == 0
    hub.fail("GET /api/models/org/absent", Status(404, "RevisionNotFound"))
    assert "revision" in forge("validate-recipe", recipe, "--validate-remote").out


def test_the_table_of_starters_is_sound() -> None:
    for row in STARTERS:
        assert {"Q4_0", "Q4_K_M", "Q8_0"} <= set(row.megabytes) and set(row.tasks) <= set(TASKS)
        assert row.megabytes["Q4_0"] < row.megabytes["Q4_K_M"] < row.megabytes["Q8_0"]
    for task in TASKS:
        sizes = [row.megabytes["Q4_K_M"] for row in STARTERS if task in row.tasks]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) > 1


def test_more_memory_gets_a_larger_model_and_profiles_keep_their_documented_numbers() -> None:
    chosen = [choose_start("balanced", memory_bytes=gigabytes * 10**9).repo for gigabytes in (1, 8, 16, 64)]
    positions = [[row.repo for row in STARTERS].index(repo) for repo in chosen]
    assert positions == sorted(positions, reverse=True) and len(set(positions)) > 2
    assert "Coder" in choose_start("fast", "coding", memory_bytes=10**10).repo
    documented = {
        "fast": ("Q4_0", 0.8, 2048, 0.9, 1.05),
        "balanced": ("Q4_K_M", 0.7, 4096, 0.9, 1.1),
        "quality": ("Q8_0", 0.6, 8192, 0.95, 1.1),
        "low-vram": ("Q4_0", 0.7, 2048, 0.9, 1.1),
    }
    for name, numbers in documented.items():
        profile = PROFILES[name]
        keys = ("temperature", "num_ctx", "top_p", "repeat_penalty")
        assert (profile.quant, *(profile.parameters[key] for key in keys)) == numbers
        assert choose_start(name).parameters == profile.parameters


def test_start_gets_the_chosen_model_with_the_profile_s_parameters(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path
) -> None:
    for row in STARTERS:
        hub.add(row.repo, ggufs)
    done = forge_json("start", "--store", store)
    chosen = done["start"]["repo"]
    assert chosen in {row.repo for row in STARTERS} and done["repo"] == chosen and done["quant"] == "Q4_K_M"
    shown = forge_json("show", "my-model", "--store", store)
    numbers = shown["modelfile_parameters"]
    assert numbers["num_ctx"] == 4096 and abs(numbers["temperature"] - 0.7) < 1e-6
    coder = forge_json(
        *("quickstart", "--task", "coding", "--quant", "Q2_K", "--name", "c", "--store", store, "--num-ctx", "256"),
        *("--system", "You write code.", "--non-interactive"),
    )
    assert "Coder" in coder["repo"] and coder["quant"] == "Q2_K"
    shown = forge_json("show", "c", "--store", store)
    assert shown["system"] == "You write code." and shown["modelfile_parameters"]["num_ctx"] == 256


def test_start_can_be_planned_takes_a_repo_and_tells_what_to_type_next(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    planned = forge_json("start", "--repo-id", "org/Demo-GGUF", "--plan", "--store", store)
    assert planned["dry_run"] and not store.exists() and planned["command"][:2] == ["fetch", "org/Demo-GGUF"]
    ended = forge("start", "--repo-id", "org/Demo-GGUF", "--name", "mine", "--store", store)
    assert ended.code == 0 and "ollama-forge run mine" in ended.err and "named by you" in ended.err
    absent = forge("start", "--repo-id", "org/Demo-GGUF", "--profile", "fast", "--store", store, "--json")
    assert absent.code == 1 and "It has Q8_0, Q4_K_M, Q2_K." in absent.document["error"]["why"]
    assert forge("start", "--profile", "slow").code == 2


def test_auto_takes_repos_for_what_they_hold(
    hub: LoopbackHub, ggufs: dict[str, bytes], adapter_files: dict[str, bytes], store: Path
) -> None:
    commit = hub.add("org/Demo-GGUF", ggufs)
    hub.add("org/demo", DEMO_FILES)
    hub.add("org/lora", adapter_files, tags=("base_model:adapter:org/demo",))
    hub.add("org/empty", {"README.md": b""})
    got = forge_json("auto", "org/Demo-GGUF", "--quant", "Q2_K", "--system", "Hi.", "--store", store)
    assert (got["kind"], got["name"], got["commit"], got["quant"]) == ("hub gguf", "demo:latest", commit, "Q2_K")
    got = forge_json(
        "auto", "https://huggingface.co/org/demo", "--name", "imported", "--quant", "Q8_0", "--store", store
    )
    assert got["kind"] == "hub safetensors" and got["command"][0] == "import"
    bare = forge("auto", "org/lora", "--store", store, "--json")
    assert bare.code == 2 and "'org/demo'" in bare.document["error"]["why"]
    got = forge_json("auto", "org/lora", "--base", "imported", "--name", "tuned", "--store", store)
    assert got["kind"] == "hub adapter" and len(open_store(store).find("tuned").adapters) == 1
    assert forge("auto", "org/empty", "--store", store).code == 1
    assert forge("auto", "org/absent", "--store", store).code == 1
