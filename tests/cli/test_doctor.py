"""`doctor`: what it finds on this machine, on a damaged one, and what it mends; secrets stay secret."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from loopback_ollama import LoopbackOllama

from ollama_forge.jobs.doctor_machine import parse_cards
from ollama_forge.jobs.doctor_store import server_findings

SECRET = "hf_ThisMustNeverBeSeen"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with one model; no Ollama answers, and PATH has nothing but what a test puts there."""
    folder = tmp_path / "models"
    forge_json("import", DEMO_MODEL, "--name", "m", "--no-check", "--store", folder)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    return folder


def findings(*argv: object, code: int = 0) -> dict[str, Any]:
    ended = forge("doctor", "--json", *argv)
    assert ended.code == code, ended.out + ended.err
    return {finding["name"]: finding for finding in ended.document["findings"]}


def add_program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


def test_everything_is_looked_at_and_a_healthy_machine_ends_with_0(store: Path) -> None:
    found = findings("--store", store)
    assert {
        "python",
        "engine",
        "packages",
        "store",
        "store's files",
        "disk",
        "ollama",
        "server",
        "memory",
        "gpu",
    } <= set(found)
    assert {"training", "hub token", "environment", "llama.cpp tools", "command"} <= set(found)
    assert found["store"]["state"] == "ok" and found["store"]["facts"]["models"] == 1
    assert found["packages"]["state"] == "ok" and "xllamacpp" in found["packages"]["detail"]
    assert found["server"]["state"] == "optional" and "127.0.0.1:1" in found["server"]["detail"]
    text = forge("doctor", "--store", store)
    assert text.code == 0 and "next:" in text.out


def test_torch_is_not_imported_to_look(store: Path) -> None:
    script = (
        "import sys\nfrom ollama_forge.cli import main\n"
        f"code = main(['doctor', '--json', '--store', {str(store)!r}])\n"
        "sys.exit(code or ('torch' in sys.modules) * 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_a_token_is_seen_and_never_shown(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{SECRET}@mirror.example/api")
    for ended in (forge("doctor", "--store", store), forge("doctor", "--store", store, "--json")):
        assert SECRET not in ended.out + ended.err
    found = findings("--store", store)
    assert found["hub token"]["facts"] == {"present": True, "where": "HF_TOKEN"}
    assert found["environment"]["facts"]["HF_ENDPOINT"] == "https://mirror.example/api"


def test_a_token_file_that_others_may_read_is_closed_by_fix(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.defpath + os.pathsep + "/usr/bin" + os.pathsep + "/bin")
    token = tmp_path / "token"
    token.write_text(SECRET)
    token.chmod(0o644)
    planned = forge_json("doctor", "--plan", "--store", store)
    assert [fix["command"] for fix in planned["fixes"] if fix["needed"]] == [["chmod", "600", str(token)]]
    refused = forge("doctor", "--fix", "--store", store, "--json")
    assert refused.code == 2 and "--yes" in refused.out
    assert stat.S_IMODE(token.stat().st_mode) == 0o644
    ended = forge("doctor", "--fix", "--yes", "--store", store)
    assert ended.code == 0 and f"$ chmod 600 {token}" in ended.err and SECRET not in ended.out + ended.err
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert "nothing that a command could mend" in forge("check", "--fix", "--yes", "--store", store).out


@pytest.mark.parametrize(
    ("version", "can", "cannot"),
    [("0.33.0", "quantize", "nothing"), ("0.34.1", "create models from uploaded files", "convert safetensors")],
)
def test_a_server_s_version_tells_what_it_can_create(
    store: Path, monkeypatch: pytest.MonkeyPatch, version: str, can: str, cannot: str
) -> None:
    with LoopbackOllama(store, version=version) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        found = findings("--store", store)
    assert found["server"]["facts"]["version"] == version and can in found["server"]["detail"]
    assert ("it cannot" in found["server"]["detail"]) == (version == "0.34.1")
    assert (cannot in found["server"]["detail"].partition("it cannot")[2]) == (version == "0.34.1")
    assert found["server"]["facts"]["quantizes"] is (version == "0.33.0")


def test_a_server_that_reads_another_store_is_warned_of(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    forge_json("import", DEMO_MODEL, "--name", "other", "--no-check", "--store", elsewhere)
    with LoopbackOllama(elsewhere) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        found = findings("--store", store)["server's store"]
        assert [finding.name for finding in server_findings(elsewhere)] == ["ollama", "server"]
    assert found["state"] == "warning" and found["next"] == f"export OLLAMA_MODELS={elsewhere}"


def test_an_address_that_is_none_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://a b:x")
    assert findings("--store", store)["server"]["state"] == "warning"


def test_a_missing_blob_and_a_strange_owner_are_found(store: Path) -> None:
    blobs = sorted((store / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    if os.geteuid() == 0:
        os.chown(blobs[0], 12345, -1)
        assert "1 files" in findings("--store", store)["ownership"]["detail"]
    else:
        (store / "blobs").chmod(0o555)
        assert "may not write" in findings("--store", store, code=1)["store"]["detail"]
        (store / "blobs").chmod(0o755)
    blobs[-1].unlink()
    found = findings("--store", store)["store's files"]
    assert found["state"] == "warning" and found["next"] == "ollama-forge verify"


def test_tools_are_asked_for_the_flags_that_they_really_have(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    add_program(programs, "llama-quantize", 'echo "usage: [--allow-requantize] [--imatrix FILE]"; exit 1\n')
    add_program(
        programs, "llama-finetune", 'echo "--learning-rate N --file F --epochs N"; echo "version: 8929 (9d34231bb)"\n'
    )
    add_program(programs, "llama-cli", "exit 0\n")
    elsewhere = tmp_path / "relative"
    elsewhere.mkdir()
    add_program(elsewhere, "llama-imatrix", f"echo --chunks; touch {tmp_path / 'was-run'}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"relative{os.pathsep}{programs}")
    found = findings("--store", store)
    assert found["llama-quantize"]["facts"]["skills"] == ["takes an importance matrix"]
    assert found["llama-quantize"]["facts"]["flags"] == ["--allow-requantize", "--imatrix"]
    assert found["llama-finetune"]["facts"]["skills"] == ["trains all weights (float32 only)"]
    assert found["llama-finetune"]["facts"]["build"] == "8929 (9d34231bb)"
    assert found["llama-cli"]["state"] == "warning" and "does not answer" in found["llama-cli"]["detail"]
    assert found["PATH"]["state"] == "warning" and "'relative'" in found["PATH"]["detail"]
    assert "llama-imatrix" not in found and not (tmp_path / "was-run").exists()
    assert forge("setup-llama-cpp", "--use-system").code == 0


def test_a_card_is_described_and_torch_asked_whether_it_can_use_it(store: Path, tmp_path: Path) -> None:
    add_program(tmp_path / "bin", "nvidia-smi", 'echo "NVIDIA H200, 143771, 143000, 580.95.05"\n')
    found = findings("--store", store)
    assert found["gpu"]["facts"]["cards"] == [
        {"name": "NVIDIA H200", "total_bytes": 143771 << 20, "free_bytes": 143000 << 20}
    ]
    assert found["torch"]["detail"].startswith("torch 2")
    assert parse_cards("Failed to initialize NVML: Driver/library version mismatch\n") == []


def test_a_fix_that_fails_says_so_and_ends_with_1(store: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(SECRET)
    token.chmod(0o644)
    add_program(tmp_path / "bin", "chmod", 'echo "chmod: not today"; exit 3\n')
    ended = forge("doctor", "--fix", "--yes", "--store", store)
    assert ended.code == 1 and "exit code 3" in ended.err and "not today" in ended.err


def test_json_of_check_and_doctor_have_the_same_form(store: Path) -> None:
    for command in ("check", "doctor"):
        document = json.loads(forge(command, "--json", "--store", store).out)
        assert document["ok"] is True
        assert all({"name", "state", "detail", "next"} <= set(finding) for finding in document["findings"])
    before = tree_hash(store)
    forge("doctor", "--store", store)
    assert tree_hash(store) == before


def test_packages_that_are_missing_or_too_old_are_named_with_the_command_that_gets_them(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own facts are replaced by those of one that asks for more than is here."""
    info = tmp_path / "site" / "ollama_forge-9.0.dist-info"
    info.mkdir(parents=True)
    wants = ("not-there-at-all>=1", "click>=99", 'also-not-there>=2; extra == "train"')
    lines = ["Metadata-Version: 2.1", "Name: ollama-forge", "Version: 9.0", "Provides-Extra: train"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {want}" for want in wants)]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    found = findings("--store", store, code=1)
    assert found["packages"]["state"] == "missing"
    assert (
        "not installed: not-there-at-all" in found["packages"]["detail"]
        and ">=99 is needed" in found["packages"]["detail"]
    )
    assert found["training"]["detail"] == "not installed: also-not-there"
    fixes = forge("doctor", "--plan", "--json", "--store", store).document["fixes"]
    assert fixes[0]["command"][-2:] == ["not-there-at-all>=1", "click>=99"] and fixes[0]["needed"]
    assert fixes[-1]["command"][-1] == "also-not-there>=2" and not fixes[-1]["needed"]
    wanted = forge("doctor", "--plan", "--fix-extra", "train", "--json", "--store", store).document["fixes"]
    assert all(fix["needed"] for fix in wanted)
