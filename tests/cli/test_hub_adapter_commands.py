"""Adapters of a Hub on the loopback found and landed; the Hugging Face cache looked at and emptied."""

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
from loopback_hub import Cut, LoopbackHub

from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import open_store


def test_an_adapter_lands_on_its_base_as_a_layer_and_merged(hub: LoopbackHub, store: Path, tmp_path: Path) -> None:
    adapter = build_demo_adapter(tmp_path / "adapter")
    hub.add("org/lora", {**adapter, "optimizer.pt": b"pickle", "README.md": b"x"}, tags=("license:apache-2.0",))
    forge_json("import", DEMO_MODEL, "--name", "base", "--store", store)
    done = forge_json("fetch-adapter", "org/lora", "--base", "base", "--name", "tuned", "--store", store)
    assert done["files"] == ["adapter_config.json", "adapter_model.safetensors"] and done["shared_bytes"] > 500_000
    merged = forge_json("fetch-adapter", "org/lora", "--base", "base", "--name", "m", "--merge", "--store", store)
    assert merged["merged"]["edited"] > 0 and merged["downloaded_bytes"] == 0
    wrong = forge("fetch-adapter", "org/none", "--base", "base", "--name", "x", "--store", store)
    assert wrong.code == 1 and "no repo 'org/none'" in wrong.err


def build_demo_adapter(folder: Path) -> dict[str, bytes]:
    """A LoRA of the demo model, of the PEFT form."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    width = config["hidden_size"]
    out = config["num_attention_heads"] * config.get("head_dim", width // config["num_attention_heads"])
    draw = np.random.default_rng(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = draw.normal(0, 0.02, (4, width)).astype("float32")
        tensors[f"{stem}.lora_B.weight"] = draw.normal(0, 0.02, (out, 4)).astype("float32")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    settings["base_model_name_or_path"] = "org/demo"
    return {
        "adapter_config.json": json.dumps(settings).encode(),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }


def test_the_cache_is_listed_and_a_revision_removed_without_what_others_share(hub: LoopbackHub, tmp_path: Path) -> None:
    old = hub.add("org/demo", {**DEMO_FILES, "generation_config.json": b'{"old": 1}'})
    resolve("hf:org/demo")
    new = hub.add("org/demo", {**DEMO_FILES, "generation_config.json": b'{"new": 12}'})
    resolve("hf:org/demo")
    listed = forge_json("hf-cache", "ls")
    (repo,) = listed["repos"]
    assert {entry["commit"]: entry["refs"] for entry in repo["revisions"]} == {old: [], new: ["main"]}
    cache = tmp_path / "hf/hub/models--org--demo"
    before = tree_hash(cache)
    dry = forge_json("hf-cache", "rm", f"org/demo@{old[:8]}", "--dry-run")
    assert dry["freed_bytes"] == len(b'{"old": 1}') and tree_hash(cache) == before
    assert forge("hf-cache", "rm", "org/demo").code == 2, "nobody is there to say yes"
    assert tree_hash(cache) == before
    removed = forge_json("hf-cache", "rm", "org/demo", "--revision", old, "--yes")
    assert removed["removed"][0]["revisions"] == [old] and not (cache / "snapshots" / old).exists()
    assert (cache / "snapshots" / new / "model.safetensors").read_bytes() == DEMO_FILES["model.safetensors"]
    missing = forge("hf-cache", "rm", "org/demo@v9", "--yes")
    assert missing.code == 1 and f"It has {new[:12]}/main." in missing.err
    assert forge_json("hf-cache", "rm", "org/demo", "--yes")["removed"][0]["whole"] and not cache.exists()
    assert forge_json("hf-cache", "ls") == {"cache": str(tmp_path / "hf/hub"), "size": 0, "repos": []}


def test_a_dataset_and_a_copy_with_the_same_commit_are_not_taken_for_the_model(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    commit = hub.add("org/demo", DEMO_FILES)
    resolve("hf:org/demo")
    cache = tmp_path / "hf/hub"
    for twin in ("datasets--org--demo", "models--copy--demo"):
        shutil.copytree(cache / "models--org--demo", cache / twin, symlinks=True)
    forge_json("hf-cache", "rm", f"org/demo@{commit}", "--yes")
    assert sorted(path.name for path in cache.glob("*--*")) == ["datasets--org--demo", "models--copy--demo"]
    ended = forge("hf-cache", "rm", "org/demo", "--yes")
    assert ended.code == 1 and "a dataset of that name" in ended.err and "--type dataset" in ended.err
    forge_json("hf-cache", "rm", "org/demo", "--type", "dataset", "--yes")
    assert [path.name for path in cache.glob("*--*")] == ["models--copy--demo"]


def test_unfinished_downloads_are_shown_and_removed(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_forge.source.hub_download._WAITS_SECONDS", ())
    hub.add("org/Demo-GGUF", ggufs)
    hub.fail("GET /cdn/", Cut(400_000))
    assert forge("fetch", "org/Demo-GGUF", "--store", store).code == 1
    (repo,) = forge_json("hf-cache", "ls")["repos"]
    assert (repo["repo"], repo["unfinished"], repo["revisions"]) == ("org/Demo-GGUF", 400_000, [])
    ended = forge("hf-cache", "rm", "org/Demo-GGUF", "--yes")
    assert ended.code == 0 and "400 KB freed" in ended.out
    assert not (tmp_path / "hf/hub/models--org--Demo-GGUF").exists()


def test_what_was_landed_outlives_the_cache(hub: LoopbackHub, ggufs: dict[str, bytes], store: Path) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    forge_json("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--name", "m", "--store", store)
    forge_json("hf-cache", "rm", "org/Demo-GGUF", "--yes")
    assert forge_json("verify", "--store", store)
    (row,) = forge_json("list", "--store", store)
    assert Path(row["blob"]).read_bytes() == ggufs["Demo-Q2_K.gguf"]


def tagged(base: str, *more: str) -> tuple[str, ...]:
    return ("peft", f"base_model:{base}", f"base_model:adapter:{base}", *more)


def test_a_search_shows_adapters_by_what_they_hold(hub: LoopbackHub, tmp_path: Path) -> None:
    adapter = build_demo_adapter(tmp_path / "adapter")
    hub.add("org/demo-sql", adapter, tags=tagged("org/demo", "license:mit"), downloads=50)
    hub.add("org/demo-lora-adapter-qlora", DEMO_FILES, downloads=900)
    pickle = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"}
    hub.add("org/demo-old", pickle, tags=tagged("org/demo"), downloads=9)
    hub.add("org/demo-gguf-lora", {"lora-f16.gguf": b"GGUF"}, tags=tagged("org/demo"), downloads=5)
    found = forge_json("adapters", "search", "demo")
    assert [(hit["repo"], hit["form"]) for hit in found["adapters"]] == [
        ("org/demo-sql", "peft"),
        ("org/demo-old", "pickle"),
        ("org/demo-gguf-lora", "gguf"),
    ]
    assert found["left_out"] == 1 and found["adapters"][0]["licence"] == "mit"
    assert "pickle" in found["adapters"][1]["obstacle"] and found["adapters"][0]["bases"] == ["org/demo"]
    ended = forge("adapters", "search", "nothing")
    assert ended.code == 0 and "No adapter was found." in ended.out


def test_adapters_are_recommended_by_what_they_say_of_their_base_and_the_best_is_landed(
    hub: LoopbackHub, store: Path, tmp_path: Path
) -> None:
    adapter = build_demo_adapter(tmp_path / "adapter")
    other = json.loads(adapter["adapter_config.json"]) | {"base_model_name_or_path": "org/other"}
    hub.add("org/demo", DEMO_FILES)
    hub.add("org/good", adapter, tags=tagged("org/demo"), downloads=5)
    hub.add("org/liar", {**adapter, "adapter_config.json": json.dumps(other).encode()}, tags=tagged("org/demo"))
    hub.repos["org/liar"].downloads = 99
    hub.add("org/elsewhere", adapter, tags=tagged("org/else"), downloads=500)
    found = forge_json("adapters", "recommend", "--base", "hf:org/demo", "--store", store)
    assert [hit["repo"] for hit in found["adapters"]] == ["org/good", "org/liar"]
    assert found["base_repo"] == "org/demo" and found["adapters"][0]["rank"] == 4
    assert "names another base" in found["adapters"][1]["obstacle"] and found["adapters"][0]["size"] > 1000
    assert hub.count("GET /cdn/") == 0, "no weights are downloaded to judge"
    forge_json("import", "org/demo", "--name", "base", "--store", store)
    apply = ("adapters", "recommend", "--base", "base", "--apply", "--store", store)
    done = forge_json(*apply, "--name", "tuned")
    assert done["name"] == "tuned:latest" and done["repo"] == "org/good"
    assert len(open_store(store).find("tuned").adapters) == 1
    forge_json("hf-cache", "rm", "org/demo", "--yes")
    assert forge_json(*apply, "--name", "twin")["repo"] == "org/good", "the base's own file says where it is from"
    forge_json("import", DEMO_MODEL, "--name", "homemade", "--store", store)
    apply = ("adapters", "recommend", "--base", "homemade", "--apply", "--store", store)
    unknown = forge(*apply, "--name", "again")
    assert unknown.code == 1 and "--base-repo" in unknown.err
    assert forge_json(*apply, "--name", "again", "--base-repo", "org/demo")["name"] == "again:latest"
    assert forge(*apply, "--base-repo", "org/demo").code == 2
    nothing = forge(*apply, "--base-repo", "org/unknown", "--name", "x")
    assert nothing.code == 1 and "No adapter that can be used" in nothing.err
