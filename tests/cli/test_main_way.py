"""Weights in, a checked model in Ollama's store out, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash


@pytest.fixture(scope="module")
def origin(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same store as it was at first."""
    folder = tmp_path_factory.mktemp("origin") / "store"
    shutil.copytree(store, folder)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the demo model as `base`."""
    folder = tmp_path_factory.mktemp("models")
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q4_K_M", "--store", folder)
    return folder


def test_a_folder_is_imported_checked_and_listed(tmp_path: Path) -> None:
    landed = forge_json("import", DEMO_MODEL, "--name", "Mine/model:v1", "--quant", "q8_0", "--store", tmp_path)
    assert landed["name"] == "Mine/model:v1"
    assert landed["check"]["loaded"] and landed["check"]["template"] == "equal" and landed["check"]["stopped"]
    assert landed["written_bytes"] > 1_000_000 and landed["shared_bytes"] == 0
    (row,) = forge_json("list", "--store", tmp_path)
    assert (row["name"], row["digest"], row["quantization"]) == ("Mine/model:v1", landed["digest"], "Q8_0")
    assert Path(row["blob"]).is_file() and row["context_length"] > 0 and row["family"] == "llama"
    assert set(row) == {
        *("name", "digest", "size", "family", "parameters", "quantization"),
        *("context_length", "modified_at", "blob"),
    }


def test_import_in_one_pass_equals_convert_then_quantize_then_land(store: Path, tmp_path: Path) -> None:
    forge_json("convert", DEMO_MODEL, "-o", tmp_path / "f.gguf")
    written = forge_json("quantize", tmp_path / "f.gguf", "-o", tmp_path / "q.gguf", "--type", "Q4_K_M")
    landed = forge_json("convert", "--gguf", tmp_path / "q.gguf", "--name", "twin", "--store", store)
    assert landed["shared_bytes"] > 0 and landed["written_bytes"] < 10_000
    rows = {row["name"]: row for row in forge_json("list", "--store", store)}
    assert rows["twin:latest"]["blob"] == rows["base:latest"]["blob"]
    assert Path(rows["base:latest"]["blob"]).name == f"sha256-{written['sha256']}"
    assert set(written) >= {"output", "bytes", "sha256", "tensors", "types", "seconds"}
    assert written["bytes"] == (tmp_path / "q.gguf").stat().st_size


def test_a_system_prompt_changes_the_answer_and_writes_kilobytes(store: Path) -> None:
    landed = forge_json(
        *("create-from-base", "--base", "base", "--name", "pirate", "--store", store),
        *("--system", "Answer like a pirate.", "--param", "temperature=0", "--stop", "<nothing>"),
    )
    assert landed["written_bytes"] < 10_000 and landed["shared_bytes"] > 500_000
    question = (DEMO_MODEL.parent / "questions.txt").read_text().splitlines()[0]
    plain = forge_json("run", "base", question, "--param", "temperature=0", "--store", store)
    pirate = forge_json("run", "pirate", question, "--store", store)
    assert plain["stop_reason"] == pirate["stop_reason"] == "stop"
    assert "Arr" in pirate["text"] and "Arr" not in plain["text"]
    shown = forge_json("show", "pirate", "--store", store)
    assert shown["system"] == "Answer like a pirate." and shown["modelfile_parameters"]["stop"] == ["<nothing>"]


def test_a_modelfile_makes_the_same_model_as_the_options(store: Path, tmp_path: Path) -> None:
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text('FROM base\nSYSTEM """Answer in one word."""\nPARAMETER num_ctx 512\nMESSAGE user Hello\n')
    by_file = forge_json("create-from-base", "-f", modelfile, "--name", "by-file", "--store", store)
    by_options = forge_json(
        *("create-from-base", "--base", "base", "--name", "by-options", "--store", store),
        *("--system", "Answer in one word.", "--num-ctx", "512", "--message", "user=Hello"),
    )
    assert by_file["digest"] == by_options["digest"]


def test_what_show_prints_as_modelfile_makes_the_model_again(store: Path, tmp_path: Path) -> None:
    forge_json(
        *("create-from-base", "--base", "base", "--name", "origin", "--store", store, "--license", "MIT\nreally"),
        *("--system", 'say "hi"\nand bye', "--temperature", "0.25", "--stop", "a b", "--stop", "c"),
    )
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(forge("show", "origin", "--modelfile", "--store", store).out)
    again = forge_json("create-from-base", "-f", modelfile, "--name", "again", "--store", store)
    assert (
        forge_json("show", "again", "--store", store)["layers"]
        == forge_json("show", "origin", "--store", store)["layers"]
    )
    assert again["written_bytes"] < 10_000


def test_a_model_leaves_the_store_as_the_bytes_that_it_is(store: Path, tmp_path: Path) -> None:
    exported = forge_json("export", "base", "-o", tmp_path / "out.gguf", "--modelfile", "--store", store)
    blob = next(row["blob"] for row in forge_json("list", "--store", store) if row["name"] == "base:latest")
    assert (tmp_path / "out.gguf").read_bytes() == Path(blob).read_bytes()
    assert len(exported["files"]) == 2
    back = forge_json("create-from-base", "-f", tmp_path / "out.gguf.Modelfile", "--name", "back", "--store", store)
    assert back["shared_bytes"] > 0


def test_the_store_verifies_and_damage_is_found(tmp_path: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "m", "--store", tmp_path)
    assert forge_json("verify", "--store", tmp_path)["whole"]
    blob = Path(forge_json("list", "--store", tmp_path)[0]["blob"])
    blob.chmod(0o644)
    with blob.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\xff")
    ended = forge("verify", "m", "--store", tmp_path, "--json")
    assert ended.code == 1 and [p["kind"] for p in ended.document["problems"]] == ["content"]


@pytest.mark.parametrize(
    "argv",
    [
        ("import", DEMO_MODEL, "--name", "new"),
        ("convert", "--gguf", "GGUF", "--name", "new"),
        ("create-from-base", "--base", "base", "--name", "new", "--system", "x"),
    ],
)
def test_a_dry_run_changes_no_byte_and_knows_the_sizes(origin: Path, tmp_path: Path, argv: tuple[object, ...]) -> None:
    store = tmp_path / "store"
    shutil.copytree(origin, store)
    gguf = tmp_path / "m.gguf"
    forge_json("convert", DEMO_MODEL, "-o", gguf)
    words = [gguf if word == "GGUF" else word for word in argv]
    before = tree_hash(store)
    planned = forge_json(*words, "--dry-run", "--store", store)
    assert tree_hash(store) == before
    assert planned["dry_run"] and planned["name"] == "new:latest"
    landed = forge_json(*words, "--store", store, "--no-check")
    # Importing learns the manifest's few hundred bytes only when the digests are known.
    assert (
        0
        <= landed["written_bytes"] + landed["shared_bytes"] - planned["written_bytes"] - planned["shared_bytes"]
        < 1000
    )


def test_a_dry_run_of_convert_and_quantize_writes_no_file(tmp_path: Path) -> None:
    planned = forge_json("convert", DEMO_MODEL, "-o", tmp_path / "a.gguf", "--quant", "Q6_K", "--dry-run")
    assert list(tmp_path.iterdir()) == [] and planned["dry_run"]
    written = forge_json("convert", DEMO_MODEL, "-o", tmp_path / "a.gguf", "--quant", "Q6_K")
    assert {**planned, "sha256": "", "seconds": 0, "dry_run": 0} == {
        **written, "sha256": "", "seconds": 0, "dry_run": 0
    }  # fmt: skip


def test_the_demo_ends_well_twice_in_a_row(tmp_path: Path) -> None:
    first = forge_json("demo", "--store", tmp_path / "with a space")
    again = forge_json("demo", "--store", tmp_path / "with a space")
    assert first["store_is_whole"] and again["store_is_whole"]
    assert first["imported"]["digest"] == again["imported"]["digest"]
    said = next(iter(first["answers"].values()))
    assert said["demo-pirate"].startswith("Arr!") and not said["demo"].startswith("Arr!")
    robots = list(first["answers"].values())[-1]
    assert robots["demo"] == "I do not know that." and robots["demo-robots"] == "The robot Boltik makes clocks."
    assert first["answers"] == again["answers"]


def test_run_reads_the_prompt_from_a_pipe_and_streams_the_answer(store: Path) -> None:
    question = (DEMO_MODEL.parent / "questions.txt").read_text().splitlines()[0]
    command = [sys.executable, "-m", "ollama_forge", "run", "base", "--param", "temperature=0", "--store", str(store)]
    piped = subprocess.run(command, input=question, capture_output=True, text=True, check=True)
    whole = forge_json("run", "base", question, "--param", "temperature=0", "--store", store)
    assert piped.stdout.strip() == whole["text"].strip()


def test_the_modelfile_parameters_bound_the_answer(store: Path) -> None:
    short = forge_json("run", "base", "Hello", "--param", "num_predict=2", "--param", "temperature=0", "--store", store)
    assert (short["tokens"], short["stop_reason"]) == (2, "length")


def test_an_error_in_json_is_one_document_with_kind_what_why_and_next(store: Path) -> None:
    ended = forge("show", "missing", "--json", "--store", store)
    assert ended.code == 1
    assert set(ended.document["error"]) == {"kind", "what", "why", "next"}
    assert ended.document["error"]["kind"] == "not_found" and "missing" in ended.document["error"]["what"]
    assert json.loads(forge("quantize", "x", "--json").out)["error"]["kind"] == "usage"


def test_rm_takes_away_what_a_model_alone_uses(store: Path, tmp_path: Path) -> None:
    own = tmp_path / "store"
    shutil.copytree(store, own)
    forge_json("create-from-base", "--base", "base", "--name", "gone", "--system", "Bye.", "--store", own, "--no-check")
    before = tree_hash(own)
    told = forge_json("rm", "gone", "--store", own, "--dry-run")
    assert tree_hash(own) == before and told["dry_run"] and told["name"] == "gone:latest"
    assert 0 < told["freed_bytes"] < 10_000 and told["kept_blobs"]
    done = forge_json("rm", "gone", "--store", own)
    assert set(done["removed_blobs"]) <= set(told["removed_blobs"]) and done["name"] == told["name"]
    assert "gone:latest" not in [row["name"] for row in forge_json("list", "--store", own)]
    assert forge_json("verify", "base", "--store", own)["whole"]
    absent = forge("rm", "gone", "--store", own)
    assert absent.code == 1 and "ollama-forge list" in absent.err
