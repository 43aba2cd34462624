"""`export --format hf`: the whole folder or none of it, and a dry run that knows every byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from kill import kill_forks
from tiny_store import install_model

from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.catalog import open_store

PREPARATION = """
import contextlib, io
from ollama_forge.cli import main
import ollama_forge.jobs.export
"""
RUN = """
with contextlib.redirect_stdout(io.StringIO()):
    status = main([str(w) for w in ["export", ROOT / "m.gguf", "--format", "hf", "-o", ROOT / "out", "--force"]])
assert status == 0, status
"""
POINTS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds the demo model as `base`, in 16 bits."""
    folder = tmp_path_factory.mktemp("models")
    forge_json("convert", DEMO_MODEL, "-o", folder / "m.gguf")
    landing = ("--name", "base", "--store", folder / "s", "--no-check", "--system", "Be brief.")
    forge_json("convert", "--gguf", folder / "m.gguf", *landing)
    return folder / "s"


def blob_of(store: Path) -> Path:
    path = open_store(store).find("base").model_path
    assert path is not None
    return path


def test_a_model_leaves_as_a_folder_that_comes_back_as_the_same_model(store: Path, tmp_path: Path) -> None:
    exported = forge_json("export", "base", "--format", "hf", "-o", tmp_path / "model", "--store", store)
    assert exported["family"] == "llama" and exported["warnings"] == [] and not exported["dry_run"]
    assert sorted(exported["files"]) == sorted(path.name for path in (tmp_path / "model").iterdir())
    landed = forge_json("import", tmp_path / "model", "--name", "again", "--quant", "Q8_0", "--store", tmp_path / "s")
    assert landed["check"]["loaded"] and landed["check"]["template"] == "equal" and landed["check"]["stopped"]
    forge_json("convert", tmp_path / "model", "-o", tmp_path / "again.gguf")
    with open_gguf(blob_of(store)) as one, open_gguf(tmp_path / "again.gguf") as two:
        assert {name: bytes(one.read(name)) for name in one.tensors} == {
            name: bytes(two.read(name)) for name in two.tensors
        }


def test_transformers_answers_with_the_folder_as_the_engine_does_with_the_model(store: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    forge_json("export", "base", "--format", "hf", "-o", tmp_path / "out", "--dtype", "f32", "--store", store)
    question = (DEMO_MODEL.parent / "questions.txt").read_text().splitlines()[0]
    said = forge_json("run", blob_of(store), question, "--param", "temperature=0", "--param", "num_predict=40")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0][prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == said["text"].strip() != ""


def test_a_dry_run_knows_the_files_and_the_bytes_and_changes_nothing(store: Path, tmp_path: Path) -> None:
    argv = ("export", "base", "--format", "hf", "-o", tmp_path / "out", "--dtype", "f16", "--modelfile", "--store")
    before = tree_hash(store)
    planned = forge_json(*argv, store, "--dry-run")
    assert list(tmp_path.iterdir()) == [] and tree_hash(store) == before
    written = forge_json(*argv, store)
    assert {**planned, "dry_run": False, "seconds": written["seconds"]} == written
    sizes = [path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sum(sizes) == planned["bytes"]
    assert "SYSTEM" in (tmp_path / "out/Modelfile").read_text() and planned["dtype"] == "F16"


def test_shards_are_as_small_as_asked_for(store: Path, tmp_path: Path) -> None:
    argv = ("export", blob_of(store), "--format", "hf", "-o", tmp_path / "out", "--max-shard-size", "700KB")
    written = forge_json(*argv)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and "model.safetensors" not in written["files"]


def test_a_folder_that_is_there_stays_unless_forced(store: Path, tmp_path: Path) -> None:
    argv = ("export", "base", "--format", "hf", "--store", store, "-o")
    forge_json(*argv, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("mine")
    for more in ((), ("--dry-run",)):
        ended = forge(*argv, tmp_path / "out", "--json", *more)
        assert ended.code == 1 and ended.document["error"]["kind"] == "exists"
    forge_json(*argv, tmp_path / "out", "--force")
    assert not (tmp_path / "out/notes.txt").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("mine")
    ended = forge(*argv, tmp_path / "letters", "--force", "--json")
    assert ended.code == 1 and (tmp_path / "letters/dear.txt").exists()


def test_a_model_with_an_adapter_is_not_exported_without_it(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "s")
    install_model(tmp_path / "s", "tuned", blob_of(store).read_bytes(), adapters=[b"GGUF adapter"])
    ended = forge("export", "tuned", "--format", "hf", "-o", tmp_path / "out", "--store", tmp_path / "s", "--json")
    assert ended.code == 2 and "1 adapter layer" in ended.document["error"]["what"]
    assert "ollama-forge merge" in ended.document["error"]["next"] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--dtype", "f16", "-o", "x.gguf"), "belong to --format hf"),
        (("--max-shard-size", "1GB", "-o", "x.gguf"), "belong to --format hf"),
        (("--format", "hf", "--max-shard-size", "huge", "-o", "x"), "'huge' is not a size"),
        (("--format", "safetensors", "-o", "x"), "not one of"),
    ],
)
def test_options_that_mean_nothing_are_refused(argv: tuple[str, ...], words: str, store: Path) -> None:
    ended = forge("export", "base", *argv, "--store", store, "--json")
    assert ended.code == 2 and words in ended.document["error"]["what"]


def test_a_folder_is_a_folder_already(tmp_path: Path) -> None:
    ended = forge("export", DEMO_MODEL, "--format", "hf", "-o", tmp_path / "out", "--json")
    assert ended.code == 2 and "already" in ended.document["error"]["what"]


def test_killed_anywhere_it_leaves_the_old_folder_or_the_new_one(store: Path, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    shutil.copyfile(blob_of(store), origin / "m.gguf")
    (origin / "out").mkdir()
    (origin / "out/config.json").write_text("{}")
    whole = tmp_path / "whole"
    shutil.copytree(origin, whole)
    (total,) = (outcome.n_events for outcome in kill_forks(PREPARATION, RUN, [(whole, 0)]))
    new = contents(whole / "out")
    points = sorted({1 + index * (total - 1) // (POINTS - 1) for index in range(POINTS)})
    roots = [tmp_path / str(point) for point in points]
    for root in roots:
        shutil.copytree(origin, root)
    outcomes = kill_forks(PREPARATION, RUN, list(zip(roots, points, strict=True)))
    assert all(outcome.was_killed for outcome in outcomes)
    for root in roots:
        assert not (root / "out").exists() or contents(root / "out") in (new, contents(origin / "out"))
    for root, again in zip(roots, kill_forks(PREPARATION, RUN, [(root, 0) for root in roots]), strict=True):
        assert again.returncode == 0, again.stderr
        assert contents(root / "out") == new
        assert sorted(path.name for path in root.iterdir()) == ["m.gguf", "out"]
        shutil.rmtree(root)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
