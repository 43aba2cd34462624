"""Models from a Hub on the loopback in Ollama's store: fetch, and what all commands have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
from command import DEMO_MODEL, forge, forge_json
from hub_fixtures import DEMO_FILES as DEMO_FILES
from hub_fixtures import ggufs as ggufs
from hub_fixtures import hub as hub
from hub_fixtures import store as store
from loopback_hub import Cut, LoopbackHub, Stall, Status, sha256
from projectors import write_projector

from ollama_forge.jobs.environment import total_memory_bytes
from ollama_forge.store.catalog import open_store


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
    hub.add("org/demo", DEMO_FILES)
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


def test_a_disk_that_fills_up_is_named_and_the_download_goes_on_when_there_is_room(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    words = ("fetch", "org/Demo-GGUF", "--quant", "Q8_0", "--store", str(store), "--json")
    script = (
        "import resource, sys; from ollama_forge.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000)); sys.exit(main(sys.argv[1:]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, *words], capture_output=True)
    assert ended.returncode == 1 and json.loads(ended.stdout)["error"]["kind"] == "disk"
    done = forge_json(*words[:-1])
    assert done["downloaded_bytes"] == len(ggufs["Demo-Q8_0.gguf"]) - 600_000


def test_a_model_argument_may_lie_on_the_hub(
    hub: LoopbackHub, ggufs: dict[str, bytes], store: Path, tmp_path: Path
) -> None:
    hub.add("org/Demo-GGUF", ggufs)
    hub.add("org/demo", DEMO_FILES)
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
    hub.add("org/demo", DEMO_FILES)
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
