"""Models from a Hub on the loopback into Ollama's store, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from hub_fixtures import hub as hub
from loopback_hub import Cut, LoopbackHub, Stall, Status, Tampered, WholeInstead, sha256

from ollama_forge.jobs.environment import total_memory_bytes
from ollama_forge.jobs.resolve import resolve
from ollama_forge.store.catalog import open_store

FOLDER = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The demo model in three quantizations, as a GGUF repo holds them, with the things that are no models."""
    folder = tmp_path_factory.mktemp("ggufs")
    files = {"README.md": b"# A model", "imatrix.gguf": b"GGUF not a model", "config.json": b"{}"}
    for quant in ("Q8_0", "Q4_K_M", "Q2_K"):
        forge_json("convert", DEMO_MODEL, "-o", folder / f"{quant}.gguf", "--quant", quant)
        files[f"Demo-{quant}.gguf"] = (folder / f"{quant}.gguf").read_bytes()
    return files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_the_best_that_fits_is_fetched_checked_and_shares_the_cache_s_bytes(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    commit = hub.add("org/Demo-GGUF", ggufs, tags=("license:mit",))
    done = forge_json("fetch", "org/Demo-GGUF", "--store", store)
    assert done["name"] == "demo:latest" and done["check"]["loaded"] and done["check"]["stopped"]
    assert (done["quant"], done["files"], done["commit"]) == ("Q8_0", ["Demo-Q8_0.gguf"], commit)
    assert "the best of 3 that fits" in done["why"] and done["licence"] == "mit"
    assert done["downloaded_bytes"] == len(ggufs["Demo-Q8_0.gguf"])
    digest = sha256(ggufs["Demo-Q8_0.gguf"])
    blob = store / "blobs" / f"sha256-{digest}"
    assert blob.samefile(tmp_path / "hf/hub/models--org--Demo-GGUF/blobs" / digest) and not blob.is_symlink()
    assert [request.route for request in hub.requests if "/cdn/" in request.route] == [
        f"GET /cdn/org/Demo-GGUF/{commit}/Demo-Q8_0.gguf"
    ]


def test_people_are_told_what_is_taken_and_why(hub: LoopbackHub, ggufs: dict[str, bytes], store: Path) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    ended = forge("fetch", "org/Demo-GGUF", "--name", "mine", "--store", store)
    assert ended.code == 0
    assert "Demo-Q8_0.gguf: the best of 3 that fits" in ended.err and "others: Q2_K, Q4_K_M (--quant)" in ended.err
    assert "ollama run mine:latest" in ended.err


def test_a_small_machine_gets_a_smaller_file(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    memory = int((len(ggufs["Demo-Q4_K_M.gguf"]) * 1.1 + 600_000_000) / 0.7) + 2
    assert total_memory_bytes() != memory
    monkeypatch.setattr("ollama_forge.jobs.hub_local.total_memory_bytes", lambda: memory)
    assert forge_json("fetch", "org/Demo-GGUF", "--store", store, "--dry-run")["quant"] == "Q4_K_M"


def test_a_quantization_is_taken_exactly_or_those_that_exist_are_listed(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    done = forge_json("fetch", "hf.co/org/Demo-GGUF:q2_k", "--name", "small", "--store", store, "--system", "Be brief.")
    assert done["quant"] == "Q2_K" and done["why"] == ""
    assert forge_json("show", "small", "--store", store)["system"] == "Be brief."
    ended = forge("fetch", "org/Demo-GGUF", "--quant", "Q5_K_M", "--store", store, "--json")
    assert ended.code == 1 and ended.document["error"]["kind"] == "not_found"
    assert ended.document["error"]["why"] == "It has Q8_0, Q4_K_M, Q2_K."
    named = forge_json("fetch", "org/Demo-GGUF", "--gguf-file", "Demo-Q2_K.gguf", "--name", "same", "--store", store)
    assert named["downloaded_bytes"] == 0
    both = forge("fetch", "org/Demo-GGUF", "--gguf-file", "a.gguf", "--quant", "Q2_K", "--store", store)
    assert both.code == 2


def test_a_split_model_is_joined_when_it_lands(
    hub: LoopbackHub, store: Path, tmp_path: Path, ggufs: dict[str, bytes]
) -> None:
    gguf = pytest.importorskip("gguf")
    parts = split_gguf(gguf, tmp_path / "whole.gguf", ggufs["Demo-Q8_0.gguf"], tmp_path)
    hub.add("org/Demo-GGUF", {f"Q8_0/{path.name}": path.read_bytes() for path in parts})
    done = forge_json("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--name", "joined", "--store", store)
    assert len(done["files"]) == 2 and done["check"]["template"] == "equal"
    (row,) = forge_json("list", "--store", store)
    assert row["quantization"] == "Q8_0"


def split_gguf(gguf: object, whole: Path, content: bytes, folder: Path) -> list[Path]:
    """Two parts, as llama-gguf-split writes them, through llama.cpp's own writer."""
    whole.write_bytes(content)
    reader = gguf.GGUFReader(whole)  # type: ignore[attr-defined]
    architecture = reader.fields["general.architecture"].contents()
    paths = [folder / f"Demo-Q8_0-{number:05d}-of-00002.gguf" for number in (1, 2)]
    half = len(reader.tensors) // 2
    for number, (path, tensors) in enumerate(zip(paths, (reader.tensors[:half], reader.tensors[half:]), strict=True)):
        writer = gguf.GGUFWriter(path, architecture)  # type: ignore[attr-defined]
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    sub = field.types[1] if len(field.types) > 1 else None
                    writer.add_key_value(key, field.contents(), field.types[0], sub)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_dry_run_says_what_would_come_and_changes_nothing(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    hub.add("org/demo", FOLDER)
    size = len(ggufs["Demo-Q4_K_M.gguf"])
    done = forge_json("fetch", "org/Demo-GGUF", "--quant", "Q4_K_M", "--store", store, "--dry-run")
    assert (done["dry_run"], done["downloaded_bytes"], done["written_bytes"]) == (True, size, size)
    assert forge_json("import", "org/demo", "--name", "d", "--store", store, "--dry-run")["downloaded_bytes"] > 1e6
    assert not store.exists() and not (tmp_path / "hf/hub").exists() and hub.count("GET /cdn/") == 0


def test_a_taken_name_is_said_before_anything_is_downloaded(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    forge_json("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--name", "mine", "--store", store)
    before = hub.count("GET /cdn/")
    ended = forge("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--name", "mine", "--store", store, "--json")
    assert ended.document["error"]["kind"] == "exists" and hub.count("GET /cdn/") == before
    again = forge_json("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--name", "mine", "--store", store)
    assert again["downloaded_bytes"] == 0
    forced = forge_json("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--name", "mine", "--store", store, "--force")
    assert forced["replaced"]


def test_a_cut_fetch_is_finished_by_the_same_command(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ollama_forge.source.hub_download._WAITS_SECONDS", (0.0,))
    hub.add("org/Demo-GGUF", ggufs)
    hub.fail("GET /cdn/", Cut(500_000), Cut(0), Cut(0))
    ended = forge("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--store", store, "--json")
    assert ended.code == 1 and ended.document["error"]["kind"] == "hub" and not (store / "manifests").exists()
    done = forge_json("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--store", store)
    assert done["downloaded_bytes"] == len(ggufs["Demo-Q8_0.gguf"]) - 500_000


def test_a_killed_fetch_goes_on_where_it_was_and_the_world_s_settings_are_honoured(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    content = ggufs["Demo-Q8_0.gguf"]
    hub.add("org/Demo-GGUF", ggufs, is_gated=True)
    hub.fail("GET /cdn/", Stall(700_000))
    environment = os.environ | {"HF_TOKEN": "hf_good"}
    words = ("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--store", str(store), "--json")
    command = [sys.executable, "-m", "ollama_forge", *words]
    part = tmp_path / "hf/hub/models--org--Demo-GGUF/blobs" / f"{sha256(content)}.incomplete"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size > 500_000) and time.monotonic() < deadline:
            time.sleep(0.01)
        child.kill()
    kept = part.stat().st_size
    assert 500_000 < kept <= 700_000 and not (store / "manifests").exists()
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout)["downloaded_bytes"] == len(content) - kept
    assert hub.requests[-1].range == f"bytes={kept}-" and b"hf_good" not in done.stdout + done.stderr


def test_a_repo_is_imported_without_its_code_and_pickles_and_equals_its_folder(
    hub: LoopbackHub, store: Path, tmp_path: Path
) -> None:
    extra = {"modeling_demo.py": b"raise SystemExit", "pytorch_model.bin": b"\x80\x04pickle", "demo.gguf": b"GGUF"}
    commit = hub.add("org/demo", {**FOLDER, **extra})
    done = forge_json("import", "org/demo", "--name", "from-hub", "--quant", "Q4_K_M", "--store", store)
    assert done["commit"] == commit and done["check"]["template"] == "equal"
    assert set(done["files"]) == set(FOLDER)
    here = {path.name for path in (tmp_path / "hf/hub/models--org--demo/snapshots" / commit).iterdir()}
    assert here == set(done["files"])
    folder = tmp_path / "models--org--demo" / "snapshots" / commit
    folder.mkdir(parents=True)
    for name in done["files"]:
        (folder / name).write_bytes(FOLDER[name])
    twin = forge_json("import", folder, "--name", "from-folder", "--quant", "Q4_K_M", "--store", store)
    rows = {row["name"]: row for row in forge_json("list", "--store", store)}
    assert twin["types"] == done["types"]
    assert rows["from-hub:latest"]["blob"] == rows["from-folder:latest"]["blob"]


def test_a_revision_is_imported_when_it_is_named(hub: LoopbackHub, store: Path) -> None:
    old = hub.add("org/demo", FOLDER, ref="v1")
    hub.add("org/demo", {"README.md": b"emptied"})
    assert forge("import", "org/demo", "--name", "m", "--store", store).code == 1
    assert forge_json("import", "org/demo", "--revision", "v1", "--name", "m", "--store", store)["commit"] == old
    ended = forge("import", DEMO_MODEL, "--revision", "v1", "--name", "m", "--store", store)
    assert ended.code == 2 and "is a folder" in ended.err
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


def test_a_model_argument_may_lie_on_the_hub(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    hub.add("org/demo", FOLDER)
    assert forge_json("show", "hf:org/Demo-GGUF:Q2_K", "--store", store)["quantization"] == "Q2_K"
    assert forge_json("show", "hf:org/Demo-GGUF:Demo-Q8_0.gguf", "--store", store)["quantization"] == "Q8_0"
    written = forge_json("convert", "hf:org/demo", "-o", tmp_path / "m.gguf", "--quant", "Q8_0")
    assert written["sha256"] == sha256(ggufs["Demo-Q8_0.gguf"]) or written["bytes"] > 1_000_000
    made = forge_json("create-from-base", "--base", "hf:org/Demo-GGUF:Q8_0", "--name", "made", "--store", store)
    assert made["name"] == "made:latest"
    (row,) = forge_json("list", "--store", store)
    assert not Path(row["blob"]).is_symlink() and Path(row["blob"]).read_bytes() == ggufs["Demo-Q8_0.gguf"]


def test_offline_the_cache_is_used_and_said(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    forge_json("fetch", "org/Demo-GGUF", "--quant", "Q4_K_M", "--store", store)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    ended = forge("fetch", "org/Demo-GGUF", "--quant", "Q4_K_M", "--name", "again", "--store", store, "--json")
    assert ended.document["offline"] and "The cache's own org/Demo-GGUF" in ended.err and len(hub.requests) == before
    absent = forge("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--store", store)
    assert absent.code == 1 and "It has Q4_K_M." in absent.err


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Status(401, "RepoNotFound"), "no repo 'org/demo' that you may see"),
        (Status(403), "does not let you read"),
        (Status(404, "RevisionNotFound"), "no revision 'main'"),
        (Status(429), "asked too often"),
        (Status(500), "failure of its own"),
    ],
)
@pytest.mark.parametrize("command", [("fetch",), ("import",), ("fetch-adapter", "--base", str(DEMO_MODEL))])
def test_every_command_has_words_for_every_refusal(
    hub: LoopbackHub,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    failure: Status,
    words: str,
) -> None:
    monkeypatch.setattr("ollama_forge.source.hub._WAITS_SECONDS", ())
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.add("org/demo", FOLDER)
    hub.fail("GET /api/models/org/demo", *[failure] * 3)
    ended = forge(*command, "org/demo", "--name", "m", "--store", store, "--json")
    assert ended.code == 1 and words in ended.document["error"]["what"] and ended.document["error"]["next"]
    assert "hf_good" not in ended.out + ended.err and not store.exists()


def test_a_gated_repo_is_explained_and_opened_by_a_token(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/Demo-GGUF", ggufs, is_gated=True)
    ended = forge("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--store", store)
    assert ended.code == 1 and "is gated" in ended.err and "huggingface.co/org/Demo-GGUF" in ended.err
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert forge_json("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--store", store)["check"]["loaded"]


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
    old = hub.add("org/demo", {**FOLDER, "generation_config.json": b'{"old": 1}'})
    resolve("hf:org/demo")
    new = hub.add("org/demo", {**FOLDER, "generation_config.json": b'{"new": 12}'})
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
    assert (cache / "snapshots" / new / "model.safetensors").read_bytes() == FOLDER["model.safetensors"]
    missing = forge("hf-cache", "rm", "org/demo@v9", "--yes")
    assert missing.code == 1 and f"It has {new[:12]}/main." in missing.err
    assert forge_json("hf-cache", "rm", "org/demo", "--yes")["removed"][0]["whole"] and not cache.exists()
    assert forge_json("hf-cache", "ls") == {"cache": str(tmp_path / "hf/hub"), "size": 0, "repos": []}


def test_a_dataset_and_a_copy_with_the_same_commit_are_not_taken_for_the_model(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    commit = hub.add("org/demo", FOLDER)
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
    hub.add("org/demo-lora-adapter-qlora", FOLDER, downloads=900)
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
    hub.add("org/demo", FOLDER)
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
    unknown = forge(*apply, "--name", "again")
    assert unknown.code == 1 and "--base-repo" in unknown.err
    assert forge_json(*apply, "--name", "again", "--base-repo", "org/demo")["name"] == "again:latest"
    assert forge(*apply, "--base-repo", "org/demo").code == 2
    nothing = forge(*apply, "--base-repo", "org/unknown", "--name", "x")
    assert nothing.code == 1 and "No adapter that can be used" in nothing.err


def shard_demo(n_shards: int) -> dict[str, bytes]:
    """The demo model in several files with an index, as transformers saves it."""
    whole = FOLDER["model.safetensors"]
    end = 8 + int.from_bytes(whole[:8], "little")
    entries = {name: entry for name, entry in json.loads(whole[8:end]).items() if name != "__metadata__"}
    names = sorted(entries, key=lambda name: entries[name]["data_offsets"])
    files = {name: content for name, content in FOLDER.items() if name != "model.safetensors"}
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
    hub.add("org/demo", {**shard_demo(3), "model.safetensors": FOLDER["model.safetensors"]})
    done = forge_json("import", "org/demo", "--name", "shards", "--store", store)
    assert "model.safetensors" not in done["files"] and len([f for f in done["files"] if f.endswith("rs")]) == 3
    hub.add("twin/demo", shard_demo(3))
    hub.repos["twin/demo"].commits[hub.repos["twin/demo"].refs["main"]].pop("model-00002-of-00003.safetensors")
    ended = forge("import", "twin/demo", "--name", "broken", "--store", store)
    assert ended.code == 1 and "2 of 3 files" in ended.err


def write_projector(path: Path) -> bytes:
    """A GGUF that says that it is an mmproj, with one tensor."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_tensor("v.patch_embd.weight", np.ones((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_the_projector_of_a_model_that_sees_is_offered_and_landed(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    projector = write_projector(tmp_path / "p.gguf")
    hub.add("org/Demo-GGUF", {**ggufs, "mmproj-Demo-F16.gguf": projector, "mmproj-Demo-F32.gguf": b"GGUF"})
    fetch = ("fetch", "org/Demo-GGUF", "--quant", "Q2_K", "--store", store)
    done = forge_json(*fetch, "--name", "sees")
    assert done["files"] == ["Demo-Q2_K.gguf", "mmproj-Demo-F16.gguf"] and done["projector"] == "mmproj-Demo-F16.gguf"
    landed = open_store(store).find("sees").projector
    assert landed is not None and landed.read_bytes() == projector
    blind = forge(*fetch, "--name", "blind", "--no-projector")
    assert blind.code == 0 and "was left out" in blind.err and open_store(store).find("blind").projector is None
    hub.add("org/plain", ggufs)
    ended = forge("fetch", "org/plain", "--projector", "--quant", "Q2_K", "--store", store)
    assert ended.code == 2 and "has no projector" in ended.err
