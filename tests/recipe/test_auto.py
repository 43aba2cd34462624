"""`auto`: what lies on this disk, or in Ollama, is known by looking at it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json
from tiny_adapters import write_lora

from ollama_forge.store.catalog import open_store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with `user/base`, a GGUF under a strange name, an adapter, a recipe, and things that are no models."""
    folder = tmp_path_factory.mktemp("place")
    forge_json(
        "import", DEMO_MODEL, "--name", "user/base", "--quant", "Q8_0", "--no-check", "--store", folder / "store"
    )
    forge_json("convert", DEMO_MODEL, "-o", folder / "m.gguf", "--quant", "Q8_0")
    (folder / "m.gguf").rename(folder / "weights.dat")
    write_lora(DEMO_MODEL, folder / "lora")
    forge_json("adapters", "convert", folder / "lora", "-o", folder / "lora.gguf", "--base", DEMO_MODEL)
    (folder / "recipe.json").write_text('{"name": "built", "base": "user/base", "system": "Hi."}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    ("source", "words", "kind", "command"),
    [
        ("weights.dat", ("--name", "a"), "gguf", "convert"),
        ("weights.dat", ("--name", "b", "--quant", "Q8_0"), "gguf", "convert"),
        (str(DEMO_MODEL), ("--name", "c", "--quant", "Q4_K_M"), "folder", "import"),
        ("recipe.json", (), "recipe", "build"),
        ("lora", ("--base", "user/base", "--name", "d"), "adapter", "retrain"),
        ("lora.gguf", ("--base", "user/base", "--name", "e", "--merge"), "adapter", "retrain"),
    ],
)
def test_a_thing_is_known_by_its_content_and_lands(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    words: tuple[str, ...],
    kind: str,
    command: str,
) -> None:
    monkeypatch.chdir(place)
    if "Q8_0" in words:
        forge_json("convert", DEMO_MODEL, "-o", place / "f.gguf", "--force")
        source = "f.gguf"
    done = forge_json("auto", source, *words, "--no-check", "--store", place / "store", "--force")
    assert (done["kind"], done["command"][0]) == (kind, command)
    assert open_store(place / "store").find(done["name"])


def test_an_ollama_name_with_a_slash_is_no_repo(place: Path) -> None:
    done = forge_json("auto", "user/base", "--name", "told", "--system", "Be brief.", "--store", place / "store")
    assert done["kind"] == "ollama" and done["command"][0] == "create-from-base"
    assert forge_json("show", "told", "--store", place / "store")["system"] == "Be brief."
    nameless = forge("auto", "user/base", "--store", place / "store", "--json")
    assert nameless.code == 2 and "it is there already" in nameless.document["error"]["what"]


def test_people_are_told_what_it_is_and_what_is_done(place: Path) -> None:
    ended = forge("auto", DEMO_MODEL, "--name", "seen", "--dry-run", "--store", place / "store")
    assert ended.code == 0 and "is a Hugging Face model (config.json, 1 safetensors file)" in ended.err
    assert "ollama-forge import" in ended.err and "Nothing was changed" in ended.out


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("config.json", 2, "neither a model nor a recipe"),
        ("train.jsonl", 2, "training data"),
        ("pytorch_model.bin", 1, "pickle"),
        ("empty", 2, "no model, no adapter and no recipe"),
        ("absent.gguf", 1, "There is no file or folder"),
        ("lora", 2, "needs the model that it goes on"),
        ("no-such-model", 1, "no-such-model"),
    ],
)
def test_what_is_no_model_is_told_with_a_way_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, source: str, code: int, words: str
) -> None:
    monkeypatch.chdir(place)
    ended = forge("auto", source, "--store", place / "store", "--json")
    assert ended.code == code and words in ended.document["error"]["what"], ended.out


def test_a_wish_that_cannot_be_met_is_refused(place: Path, tmp_path: Path) -> None:
    ended = forge("auto", place / "recipe.json", "--quant", "Q4_0", "--store", tmp_path, "--json")
    assert ended.code == 2 and "--quant does not go with" in ended.document["error"]["what"]
    ended = forge("auto", place / "recipe.json", "--system", "x", "--store", tmp_path)
    assert ended.code == 2 and "--set" in ended.err


def test_import_keeps_the_gguf_where_it_is_told_to(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder)
    words = ("import", folder, "--no-check", "--store", tmp_path / "store", "--output-dir", tmp_path / "out")
    forge_json(*words, "--name", "a", "--quant", "q4_k_m")
    assert forge_json("show", tmp_path / "out" / "model-Q4_K_M.gguf")["quantization"] == "Q4_K_M"
    forge_json(*words, "--name", "b", "--quant", "none")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "model-Q4_K_M.gguf"}
    ended = forge(*words, "--name", "c", "--quant", "none", "--json")
    assert ended.code == 1 and ended.document["error"]["kind"] == "exists"
    assert "c:latest" not in {row["name"] for row in forge_json("list", "--store", tmp_path / "store")}
