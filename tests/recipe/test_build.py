"""Recipes built: what comes out, what a second build does, what a killed one leaves, what a lock refuses."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from kill import kill_forks
from loopback_ollama import LoopbackOllama
from tiny_adapters import write_lora

from ollama_forge.registry.registry_file import lock_registry
from ollama_forge.store.catalog import open_store
from ollama_forge.store.verify import verify_store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty work folder of the test's own."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo model as `base`, an adapter that fits it, and the model's own folder."""
    folder = tmp_path_factory.mktemp("origin")
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check", "--store", folder / "store")
    shutil.copytree(DEMO_MODEL, folder / "model")
    write_lora(folder / "model", folder / "lora")
    return folder


@pytest.fixture
def place(origin: Path, tmp_path: Path, home: Path) -> Path:
    """A copy of it for one test."""
    shutil.copytree(origin, tmp_path / "place")
    return tmp_path / "place"


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_base_gets_a_prompt_parameters_messages_and_a_licence(place: Path) -> None:
    (place / "LICENCE.txt").write_text("Do what you like.")
    recipe = write(
        place,
        "name: pirate\nbase: base\nsystem: Answer like a {{ who }}.\nvariables: {who: pirate}\ntemperature: 0\n"
        "parameters: {top_k: 20, stop: [one, two]}\nmessages:\n  - user: Hello\n  - {role: assistant, content: Arr!}\n"
        "licence: '@LICENCE.txt'\n",
    )
    done = forge_json("build", recipe, "--store", place / "store")
    assert done["name"] == "pirate:latest" and done["written_bytes"] < 10_000 and done["lock_written"]
    shown = forge_json("show", "pirate", "--store", place / "store")
    assert shown["system"] == "Answer like a pirate."
    assert shown["modelfile_parameters"] == {"stop": ["one", "two"], "temperature": 0.0, "top_k": 20}
    by_hand = forge_json(
        *("create-from-base", "--base", "base", "--name", "by-hand", "--store", place / "store"),
        *("--system", "Answer like a pirate.", "--temperature", "0", "--param", "top_k=20", "--stop", "one"),
        *("--stop", "two", "--message", "user=Hello", "--message", "assistant=Arr!", "--license", "Do what you like."),
    )
    assert by_hand["digest"] == done["digest"]


def test_steps_make_what_the_commands_make(place: Path, tmp_path: Path) -> None:
    recipe = write(
        place,
        "name: small\ncheckpoint: model\nsteps:\n  - merge: lora\n  - quantize: Q4_K_M\n  - create: {system: Hi.}\n",
    )
    done = forge_json("build", recipe, "--store", place / "store")
    assert [(step["kind"], step["state"]) for step in done["steps"]] == [("merge", "done"), ("quantize", "done")]
    forge_json("merge", place / "model", place / "lora", "-o", tmp_path / "merged")
    written = forge_json("convert", tmp_path / "merged", "-o", tmp_path / "by-hand.gguf", "--quant", "Q4_K_M")
    blob = open_store(place / "store").find("small").model_path
    assert blob is not None and blob.name == f"sha256-{written['sha256']}"
    lineage = forge_json("registry", "lineage", "small")
    assert "build" in json.dumps(lineage)


def test_adapters_become_layers_and_a_gguf_is_quantized(place: Path) -> None:
    forge_json("convert", place / "model", "-o", place / "f.gguf")
    recipe = write(place, "name: layered\ngguf: f.gguf\nquantize: Q8_0\nadapter: lora\nsystem: Hi.\n")
    done = forge_json("build", recipe, "--store", place / "store")
    model = open_store(place / "store").find("layered")
    assert len(model.adapters) == 1 and done["steps_done"] == 2
    assert forge_json("show", "layered", "--store", place / "store")["quantization"] == "Q8_0"


def test_a_model_is_made_to_fit_a_size(place: Path, home: Path) -> None:
    text = "name: fitting\ncheckpoint: model\nsteps:\n  - fit: {size: 1.1MB, context: 256, passes: 8}\n"
    planned = forge_json("build", write(place, text), "--store", place / "store", "--dry-run")
    assert [step["state"] for step in planned["steps"]] == ["planned"]
    done = forge_json("build", write(place, text), "--store", place / "store")
    (step,) = done["steps"]
    assert step["kind"] == "fit" and step["facts"]["context"] == 256 and step["facts"]["kl"] > 0
    blob = open_store(place / "store").find("fitting").model_path
    assert blob is not None and blob.stat().st_size == step["facts"]["bytes"] < 1_100_000
    again = forge_json("build", write(place, text), "--store", place / "store")
    assert again["digest"] == done["digest"] and again["steps_done"] == 0
    refused = forge("build", write(place, text.replace("1.1MB", "a lot")), "--store", place / "store", "--json")
    assert refused.code == 1 and "is not a size" in json.dumps(refused.document)


def test_a_second_build_writes_nothing_and_says_so(place: Path, home: Path) -> None:
    recipe = write(place, "name: m\ncheckpoint: model\nsteps: [{quantize: Q4_K_M}]\n")
    first = forge_json("build", recipe, "--store", place / "store")
    before = tree_hash(place), tree_hash(home)
    second = forge_json("build", recipe, "--store", place / "store")
    assert (tree_hash(place), tree_hash(home)) == before
    assert second["up_to_date"] and second["digest"] == first["digest"] and not second["lock_written"]
    assert (second["written_bytes"], second["steps_done"], second["steps_cached"]) == (0, 0, 1)
    ended = forge("build", recipe, "--store", place / "store")
    assert ended.code == 0 and "is up to date" in ended.out and "Nothing was written" in ended.out


def test_a_name_that_is_taken_is_taken_in_each_dry_run_and_each_build(place: Path) -> None:
    forge_json("build", write(place, "name: m\nbase: base\nsystem: One.\n"), "--store", place / "store")
    recipe = write(place, "name: m\nbase: base\nsystem: Another.\n")
    for words in ([], ["--dry-run"], []):
        taken = forge("build", recipe, "--store", place / "store", "--json", *words)
        assert taken.code == 1 and taken.document["error"]["kind"] == "exists"


def test_what_changes_is_made_anew_and_only_what_comes_after_it(place: Path) -> None:
    text = "name: m\ncheckpoint: model\nsteps:\n  - merge: lora\n  - quantize: Q4_K_M\n"
    forge_json("build", write(place, text), "--store", place / "store")
    recipe = write(place, text + "system: Something else.\n")
    taken = forge("build", recipe, "--store", place / "store", "--json")
    assert taken.code == 1 and taken.document["error"]["kind"] == "exists"
    words = forge_json("build", recipe, "--store", place / "store", "--force")
    assert [step["state"] for step in words["steps"]] == ["cached", "cached"] and words["landed"]["replaced"]
    other = write(place, text.replace("Q4_K_M", "Q8_0"))
    done = forge_json("build", other, "--store", place / "store", "--force")
    assert [step["state"] for step in done["steps"]] == ["cached", "done"]
    config = place / "model" / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperature": 0.25}))
    done = forge_json("build", other, "--store", place / "store", "--force")
    assert [step["state"] for step in done["steps"]] == ["done", "done"]


def test_a_dry_run_changes_no_byte_and_knows_the_size(place: Path, home: Path) -> None:
    recipe = write(place, "name: m\ncheckpoint: model\nsteps: [{quantize: Q4_K_M}]\n")
    before = tree_hash(place)
    planned = forge_json("build", recipe, "--dry-run", "--store", place / "store")
    assert tree_hash(place) == before and not (home / "builds" / "steps").exists()
    disk = {step["kind"]: step["disk_bytes"] for step in planned["estimate"]["steps"]}
    done = forge_json("build", recipe, "--store", place / "store")
    blob = open_store(place / "store").find("m").model_path
    assert blob is not None and disk["quantize"] == blob.stat().st_size and planned["key"] == done["key"]
    shown = forge("build", write(place, "name: n\ncheckpoint: model\n"), "--dry-run", "--store", place / "store")
    assert "would be made" in shown.out and "create" in shown.out


def test_a_locked_build_makes_the_same_and_refuses_drift(place: Path, home: Path) -> None:
    text = "name: m\ncheckpoint: model\nsteps:\n  - merge: {adapters: lora, weights: 0.5}\n  - quantize: Q4_K_M\n"
    recipe = write(place, text)
    absent = forge("build", recipe, "--locked", "--store", place / "store", "--json")
    assert absent.code == 1 and absent.document["error"]["kind"] == "not_found"
    first = forge_json("build", recipe, "--store", place / "store")
    lock = json.loads((place / "recipe.lock").read_text())
    assert str(place) not in (place / "recipe.lock").read_text()
    assert lock["model"]["digest"] == first["digest"] and "ollama-forge" in lock["versions"]
    assert set(lock["steps"][0]["inputs"]) == {
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    }
    shutil.rmtree(home / "builds")
    again = forge_json("build", recipe, "--locked", "--store", place / "other")
    assert again["digest"] == first["digest"] and not again["lock_written"]
    write(place, text.replace("0.5", "0.25"))
    drifted = forge("build", recipe, "--locked", "--store", place / "other", "--force", "--json")
    assert (
        drifted.code == 1
        and "step 1.options.weights: [0.5] was locked, [0.25] is here" in drifted.document["error"]["why"]
    )
    write(place, text)
    weights = place / "lora" / "adapter_model.safetensors"
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    drifted = forge("build", recipe, "--locked", "--store", place / "other", "--force", "--json")
    assert drifted.code == 1 and "lora/adapter_model.safetensors" in drifted.document["error"]["why"]
    (place / "recipe.lock").write_text("[]")
    broken = forge("build", recipe, "--locked", "--store", place / "other", "--json")
    assert broken.code == 1 and broken.document["error"]["kind"] == "recipe"


def test_a_lock_of_other_versions_is_refused(place: Path) -> None:
    recipe = write(place, "name: m\nbase: base\nsystem: Hi.\n")
    forge_json("build", recipe, "--store", place / "store")
    path = place / "recipe.lock"
    lock = json.loads(path.read_text())
    path.write_text(json.dumps({**lock, "versions": {"ollama-forge": "0.0.1"}}))
    ended = forge("build", recipe, "--locked", "--store", place / "store", "--json")
    assert ended.code == 1 and "versions.ollama-forge: 0.0.1 was locked" in ended.document["error"]["why"]


PREPARATION = """
import contextlib, io, os
from ollama_forge.cli import main
import ollama_forge.recipe.build
"""
RUN = """
os.environ["OLLAMA_FORGE_HOME"] = str(ROOT / "home")
with contextlib.redirect_stdout(io.StringIO()):
    words = ["build", ROOT / "recipe.yaml", "--no-check", "--store", ROOT / "store", "--json"]
    status = main([str(word) for word in words])
assert status == 0, status
"""


def test_killed_anywhere_a_build_goes_on_where_it_was(place: Path, tmp_path: Path) -> None:
    write(place, "name: m\ncheckpoint: model\nsteps:\n  - merge: lora\n  - quantize: Q4_K_M\n  - adapter: lora\n")
    whole = tmp_path / "whole"
    shutil.copytree(place, whole)
    (total,) = (outcome.n_events for outcome in kill_forks(PREPARATION, RUN, [(whole, 0)]))
    points = sorted({1 + index * (total - 1) // 11 for index in range(12)})
    roots = [tmp_path / str(point) for point in points]
    for root in roots:
        shutil.copytree(place, root)
    outcomes = kill_forks(PREPARATION, RUN, list(zip(roots, points, strict=True)))
    assert all(outcome.was_killed for outcome in outcomes)
    for root in roots:
        assert verify_store(open_store(root / "store")).is_whole
    for root, again in zip(roots, kill_forks(PREPARATION, RUN, [(root, 0) for root in roots]), strict=True):
        assert again.returncode == 0, again.stderr
        assert open_store(root / "store").find("m").digest == open_store(whole / "store").find("m").digest
        assert verify_store(open_store(root / "store")).is_whole
        assert (root / "recipe.lock").read_bytes() == (whole / "recipe.lock").read_bytes()


def test_every_landing_command_can_write_its_modelfile(place: Path, tmp_path: Path) -> None:
    recipe = write(place, "name: m\nbase: base\nsystem: Hi.\n")
    forge_json("build", recipe, "--store", place / "store", "--out-modelfile", tmp_path / "one")
    words = ("--base", "base", "--name", "n", "--system", "Ho.", "--store", place / "store", "--no-check")
    forge_json("create-from-base", *words, "--out-modelfile", tmp_path / "two")
    assert "Hi." in (tmp_path / "one").read_text() and "Ho." in (tmp_path / "two").read_text()
    assert (tmp_path / "one").read_text().startswith("FROM ")
    taken = forge("create-from-base", *words, "--out-modelfile", tmp_path / "two", "--json")
    assert taken.code == 1 and taken.document["error"]["kind"] == "exists"


def test_a_template_may_come_from_another_model(place: Path) -> None:
    words = ("--base", "base", "--name", "other", "--template", "Q: {{ .Prompt }}", "--store", place / "store")
    forge_json("create-from-base", *words, "--no-check")
    done = forge_json("build", write(place, "name: m\nbase: base\ntemplate_from: other\n"), "--store", place / "store")
    assert done["landed"] and forge_json("show", "m", "--store", place / "store")["template"] == "Q: {{ .Prompt }}"
    ended = forge("build", write(place, "name: x\nbase: base\ntemplate_from: base\n"), "--store", place / "store")
    assert ended.code == 2 and "has no Ollama template" in ended.err


def test_a_recipe_is_built_in_a_running_server(place: Path, tmp_path: Path) -> None:
    with LoopbackOllama(tmp_path / "served") as server:
        there = ("--host", server.url, "--no-check", "--store", place / "store")
        recipe = write(place, "name: far\nbase: base\nsystem: Hi.\nsteps: [{merge: lora}]\n")
        done = forge_json("build", recipe, *there)
        assert done["landed"]["store"] == server.url and not (place / "store" / "manifests" / "far").exists()
        chat = write(place, "name: far-chat\nbase: far\nsystem: Be brief.\n")
        assert forge_json("build", chat, *there)["landed"]["written_bytes"] < 10_000
        refused = forge("build", write(place, "name: x\nbase: far\nquantize: Q4_0\n"), *there, "--json")
        assert refused.code == 1 and "are in the server" in refused.document["error"]["what"]
        shared = forge_json("build", write(place, "name: y\nbase: base\nsystem: Ho.\n"), *there)
        assert shared["landed"]["store"] == server.url
    assert {row["name"] for row in forge_json("list", "--store", place / "store")} == {"base:latest"}


def test_a_quantized_base_is_quantized_again_only_when_the_recipe_says_so(place: Path) -> None:
    text = "name: m\nbase: base\nquantize: Q4_0\n"
    for words in (("--dry-run",), ()):
        ended = forge("build", write(place, text), *words, "--store", place / "store", "--json")
        assert ended.code == 1 and "`allow_requantize: ...`" in ended.document["error"]["next"]
    done = forge_json("build", write(place, text + "allow_requantize: true\n"), "--store", place / "store")
    assert done["steps_done"] == 1 and forge_json("show", "m", "--store", place / "store")["quantization"] == "Q4_0"


def test_the_steps_files_may_go_once_the_model_is_landed(place: Path, home: Path) -> None:
    recipe = write(place, "name: m\ncheckpoint: model\nsteps:\n  - merge: lora\n  - quantize: Q4_K_M\n")
    done = forge_json("build", recipe, "--no-keep-steps", "--store", place / "store")
    assert done["kept_bytes"] == 0 and list((home / "builds" / "steps").iterdir()) == []
    before = tree_hash(place), tree_hash(home)
    again = forge_json("build", recipe, "--store", place / "store")
    assert again["up_to_date"] and again["steps_cached"] == 2 and (tree_hash(place), tree_hash(home)) == before
    (place / "recipe.lock").unlink()
    assert forge_json("build", recipe, "--store", place / "store")["lock_written"]
    assert "outputs" in json.loads((place / "recipe.lock").read_text())["steps"][1]
    assert forge_json("build", recipe, "--locked", "--store", place / "other")["digest"] == done["digest"]


def test_two_builds_do_not_do_the_same_step_at_once(place: Path, home: Path) -> None:
    recipe = write(place, "name: m\ncheckpoint: model\nsteps: [{quantize: Q4_K_M}]\n")
    key = forge_json("build", recipe, "--dry-run", "--store", place / "store")["steps"][0]["key"]
    with lock_registry(home / "builds" / "steps" / f"quantize-{key}" / "step"):
        busy = forge("build", recipe, "--store", place / "store", "--json")
    assert busy.code == 1 and "Another build is doing" in busy.document["error"]["what"]
    assert forge_json("build", recipe, "--store", place / "store")["steps_done"] == 1


def test_the_registry_knows_the_recipe_and_what_it_read(place: Path) -> None:
    recipe = write(place, "name: traced\nbase: base\nsteps: [{merge: lora}]\n")
    forge_json("build", recipe, "--store", place / "store")
    origin = forge_json("registry", "lineage", "traced")
    assert origin["landing"]["step"] == "build" and origin["landing"]["parameters"]["steps"][0]["kind"] == "merge"
    assert {parent["role"] for parent in origin["parents"]} == {"base", "recipe", "adapter"}
    ended = forge("registry", "rebuild", "traced", "--json")
    assert ended.code == 1 and ended.document["error"]["next"] == f"ollama-forge build {recipe} --locked --force"
