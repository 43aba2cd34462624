"""Repos of safetensors imported from a Hub on the loopback, whole and shard by shard."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from hub_fixtures import DEMO_FILES as DEMO_FILES
from hub_fixtures import ggufs as ggufs
from hub_fixtures import hub as hub
from hub_fixtures import store as store
from loopback_hub import Cut, LoopbackHub, Status, Tampered, WholeInstead


def test_a_repo_is_imported_without_its_code_and_pickles_and_equals_its_folder(
    hub: LoopbackHub, store: Path, tmp_path: Path
) -> None:
    extra = {"modeling_demo.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04pickle", "demo.gguf": b"GGUF"}
    commit = hub.add("org/demo", {**DEMO_FILES, **extra})
    done = forge_json("import", "org/demo", "--name", "from-hub", "--quant", "Q4_K_M", "--store", store)
    assert done["commit"] == commit and done["check"]["template"] == "equal"
    assert set(done["files"]) == set(DEMO_FILES)
    here = {path.name for path in (tmp_path / "hf/hub/models--org--demo/snapshots" / commit).iterdir()}
    assert here == set(done["files"])
    folder = tmp_path / "models--org--demo" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in done["files"]:
        (folder / name).write_bytes(DEMO_FILES[name])
    twin = forge_json("import", folder, "--name", "from-folder", "--quant", "Q4_K_M", "--store", store)
    rows = {row["name"]: row for row in forge_json("list", "--store", store)}
    assert twin["types"] == done["types"]
    assert rows["from-hub:latest"]["blob"] == rows["from-folder:latest"]["blob"]


def test_a_revision_is_imported_when_it_is_named(hub: LoopbackHub, store: Path) -> None:
    old = hub.add("org/demo", DEMO_FILES, ref="v1")
    hub.add("org/demo", {"README.md": b"emptied"})
    assert forge("import", "org/demo", "--name", "m", "--store", store).code == 1
    assert forge_json("import", "org/demo", "--revision", "v1", "--name", "m", "--store", store)["commit"] == old
    ended = forge("import", DEMO_MODEL, "--revision", "v1", "--name", "m", "--store", store)
    assert ended.code == 2 and "is a folder" in ended.err
    part = forge("import", "org/demo:Q4_K_M", "--name", "m", "--store", store)
    assert part.code == 2 and "fetch org/demo" in part.err
    missing = forge("import", "hf:org/demo@v7", "--name", "m", "--store", store, "--json")
    assert "no revision 'v7'" in missing.document["error"]["what"]


def test_a_folder_of_that_name_is_meant_before_a_repo(
    hub: LoopbackHub, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "demo").symlink_to(DEMO_MODEL)
    monkeypatch.chdir(tmp_path)
    assert "commit" not in forge_json("import", "org/demo", "--name", "m", "--store", store)
    assert hub.requests == []


def shard_demo(n_shards: int) -> dict[str, bytes]:
    """The demo model in several files with an index, as transformers saves it."""
    whole = DEMO_FILES["model.safetensors"]
    end = 8 + int.from_bytes(whole[:8], "little")
    entries = {name: entry for name, entry in json.loads(whole[8:end]).items() if name != "__metadata__"}
    names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    files = {name: content for name, content in DEMO_FILES.items() if name != "model.safetensors"}
    weight_map = {}
    for number in range(n_shards):
        own = names[number * len(names) // n_shards : (number + 1) * len(names) // n_shards]
        path = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        first = entries[own[0]]["data_offsets"][0]
        header = {
            name: entries[name] | {"data_offsets": [offset - first for offset in entries[name]["data_offsets"]]}
            for name in own
        }
        text = json.dumps(header).encode()
        content = whole[end + first : end + entries[own[-1]]["data_offsets"][1]]
        files[path] = len(text).to_bytes(8, "little") + text + content
        weight_map.update(dict.fromkeys(own, path))
    files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def disk_bytes(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def blob_of(store: Path, name: str) -> str:
    return next(row["blob"] for row in forge_json("list", "--store", store) if row["name"] == f"{name}:latest")


@pytest.mark.parametrize("quant", ["Q4_K_M", "none"])
def test_without_keep_source_two_shards_at_most_are_on_the_disk_and_the_model_is_the_same(
    hub: LoopbackHub, store: Path, tmp_path: Path, quant: str
) -> None:
    files = shard_demo(6)
    hub.add("org/demo", files)
    largest = max(len(content) for name, content in files.items() if name.endswith(".safetensors"))
    small = sum(len(content) for name, content in files.items() if not name.endswith(".safetensors"))
    cache = tmp_path / "hf/hub"
    held: list[int] = []
    hub.on_request = lambda request: held.append(disk_bytes(cache)) if "GET /cdn/" in request.route else None
    done = forge_json("import", "org/demo", "--name", "lean", "--quant", quant, "--no-keep-source", "--store", store)
    assert done["check"]["template"] == "equal" and len(held) >= 6
    slack = small + 40 * 4096
    assert max(held) <= 2 * largest + slack < 4 * largest, "when the next one begins, one more is here, or two are"
    assert disk_bytes(cache) < slack and not list(cache.glob("**/*.safetensors"))
    hub.on_request = lambda _request: None
    forge_json("import", "org/demo", "--name", "plain", "--quant", quant, "--store", store)
    assert blob_of(store, "lean") == blob_of(store, "plain")


def test_a_shard_that_is_cut_or_tampered_with_is_seen_while_it_is_converted(
    hub: LoopbackHub, store: Path, tmp_path: Path
) -> None:
    hub.add("org/demo", shard_demo(3))
    lean = ("import", "org/demo", "--name", "lean", "--no-keep-source", "--store", store)
    third = f"GET /cdn/org/demo/{hub.repos['org/demo'].refs['main']}/model-00003"
    hub.fail(third, Status(500), Cut(0), Cut(20_000))
    assert forge_json(*lean)["check"]["loaded"]
    for_the_header = (WholeInstead(), WholeInstead())
    hub.fail(third, *for_the_header, Tampered())
    ended = forge(*lean, "--force", "--json")
    assert ended.code == 1 and "not what the Hub listed" in ended.document["error"]["what"]
    assert not list((tmp_path / "hf/hub").glob(".ollama-forge-import-*"))
    kept = blob_of(store, "lean")
    forge_json(*lean)
    assert blob_of(store, "lean") == kept


def test_what_killed_imports_left_is_swept(hub: LoopbackHub, store: Path, tmp_path: Path) -> None:
    left = tmp_path / "hf/hub/.ollama-forge-import-99999999-abcd"
    (left / "models--org--x").mkdir(parents=True)
    hub.add("org/demo", shard_demo(2))
    forge_json("import", "org/demo", "--name", "lean", "--no-keep-source", "--store", store)
    assert not left.exists()


def test_a_sharded_repo_is_imported_like_a_whole_one(hub: LoopbackHub, store: Path) -> None:
    hub.add("org/demo", {**shard_demo(3), "model.safetensors": DEMO_FILES["model.safetensors"]})
    done = forge_json("import", "org/demo", "--name", "shards", "--store", store)
    assert "model.safetensors" not in done["files"] and len([f for f in done["files"] if f.endswith("rs")]) == 3
    hub.add("twin/demo", shard_demo(3))
    hub.repos["twin/demo"].commits[hub.repos["twin/demo"].refs["main"]].pop("model-00002-of-00003.safetensors")
    ended = forge("import", "twin/demo", "--name", "broken", "--store", store)
    assert ended.code == 1 and "2 of 3 files" in ended.err


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of this test."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))


@pytest.mark.parametrize("more", [(), ("--no-keep-source",)], ids=["kept", "streamed"])
def test_an_imported_repo_is_made_again_from_the_same_commit(
    hub: LoopbackHub, store: Path, home: None, more: tuple[str, ...]
) -> None:
    commit = hub.add("org/demo", DEMO_FILES)
    forge_json("import", "org/demo", "--name", "m", "--quant", "Q8_0", "--no-check", "--store", store, *more)
    hub.add("org/demo", {**DEMO_FILES, "generation_config.json": b'{"temperature": 0.25}'})
    rebuilt = forge_json("registry", "rebuild", "m")
    assert rebuilt["same"] is True
    (base,) = forge_json("registry", "lineage", "m")["parents"]
    assert (base["ref"], base["commit"]) == ("hf:org/demo", commit)


def test_a_fetched_gguf_is_made_again_from_the_same_file(
    hub: LoopbackHub, store: Path, home: None, ggufs: dict[str, bytes]
) -> None:
    commit = hub.add("org/Demo-GGUF", ggufs)
    forge_json("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--name", "m", "--no-check", "--store", store)
    (base,) = forge_json("registry", "lineage", "m")["parents"]
    assert base["ref"].startswith("hf:org/Demo-GGUF:") and base["commit"] == commit
    assert forge_json("registry", "rebuild", "m")["same"] is True
