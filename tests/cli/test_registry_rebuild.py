"""A model is made again from its record, with the same digest, and nothing else changes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from learnt_model import DEMO_DIR
from tiny_adapters import write_lora
from tiny_gguf import write_tiny_gguf, write_tiny_lora
from tiny_store import snapshot

from ollama_forge.gguf.imatrix import Imatrix, ImatrixEntry, write_imatrix
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.catalog import Store

FAST = ("--lr", "1e-3", "--epochs", "2", "--batch-size", "10", "--grad-accum", "1", "--max-length", "64", "--rank", "4")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An imported and quantized model, and one that is customised from it."""
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.delenv("OLLAMA_FORGE_REGISTRY", raising=False)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q4_K_M", "--no-check")
    wishes = ("--system", 'Be "brief".', "--temperature", "0.5", "--stop", "###")
    forge_json("create-from-base", "--base", "base", "--name", "chat", *wishes, "--no-check")
    return tmp_path / "models"


@pytest.mark.parametrize("options", [(), ("--whole",)], ids=["last step", "whole"])
@pytest.mark.parametrize("name", ["base", "chat"])
def test_a_model_made_again_has_the_same_digest_and_leaves_no_trace(
    models: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    before = snapshot(tmp_path)
    rebuilt = forge_json("registry", "rebuild", name, *options)
    assert rebuilt["same"] is True
    assert rebuilt["digest"] == f"sha256:{Store(models).find(name).digest}"
    assert snapshot(tmp_path) == before
    assert len(rebuilt["steps"]) == (2 if (name, options) == ("chat", ("--whole",)) else 1)


def test_a_quantized_gguf_is_made_again(models: Path, tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    forge_json("convert", "--gguf", gguf, "--name", "small", "--quant", "Q8_0", "--no-check")
    assert forge_json("registry", "rebuild", "small")["same"] is True
    gguf.unlink()
    ended = forge("registry", "rebuild", "small", "--json")
    assert str(gguf) in ended.document["error"]["what"]


def test_of_two_ways_to_the_same_bytes_that_of_the_name_is_taken(models: Path, tmp_path: Path) -> None:
    one, two = write_tiny_gguf(tmp_path / "one.gguf"), write_tiny_gguf(tmp_path / "two.gguf")
    digests = {
        forge_json("convert", "--gguf", path, "--name", path.stem, "--no-check")["digest"] for path in (one, two)
    }
    two.unlink()
    assert len(digests) == 1 and forge_json("registry", "rebuild", "one")["same"] is True
    assert str(two) in forge("registry", "rebuild", "two", "--json").document["error"]["what"]


def test_a_source_that_changed_gives_another_digest(models: Path, tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    forge_json("convert", "--gguf", gguf, "--name", "small", "--quant", "Q8_0", "--no-check")
    write_tiny_gguf(gguf, seed=9)
    ended = forge("registry", "rebuild", "small", "--json")
    assert ended.code == 1
    assert ended.document["same"] is False


def test_a_dry_run_of_a_rebuild_changes_nothing(models: Path, tmp_path: Path) -> None:
    before = tree_hash(tmp_path)
    planned = forge_json("registry", "rebuild", "chat", "--whole", "--dry-run")
    assert [step["step"] for step in planned["steps"]] == ["import", "create"]
    assert tree_hash(tmp_path) == before


def test_a_model_that_ollama_pulled_has_no_record(models: Path, tmp_path: Path) -> None:
    forge_json("registry", "import", "--registry", tmp_path / "other.json")
    ended = forge("registry", "rebuild", "base", "--registry", tmp_path / "other.json", "--json")
    assert ended.document["error"]["kind"] == "not_found"


@pytest.mark.parametrize("more", [(), ("--merge",)], ids=["layer", "merged"])
def test_a_seeded_fine_tune_is_made_again_though_its_folder_is_gone(
    models: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    folder = tmp_path / "work"
    forge_json(
        *("finetune", "--data", DEMO_DIR / "finetune.jsonl", "--base", "base", "--name", "tuned", "--seed", "7"),
        *("--workdir", folder, "--system", "Be brief.", "--no-check", *FAST, *more),
    )
    shutil.rmtree(folder)
    before = snapshot(tmp_path)
    rebuilt = forge_json("registry", "rebuild", "tuned")
    assert rebuilt["same"] is True
    assert [step["step"] for step in rebuilt["steps"]] == ["finetune"]
    assert snapshot(tmp_path) == before


def test_a_fine_tune_of_a_folder_names_the_folder_and_what_was_in_it(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO_MODEL, source)
    data = tmp_path / "data.jsonl"
    data.write_bytes((DEMO_DIR / "finetune.jsonl").read_bytes())
    words = ("--name", "tuned", "--workdir", tmp_path / "work", "--no-check")
    forge_json("finetune", "--data", data, "--base", source, *words, *FAST)
    shutil.rmtree(tmp_path / "work")
    assert forge_json("registry", "rebuild", "tuned")["same"] is True
    for path, named in ((data, data), (source / "config.json", source)):
        kept = path.read_bytes()
        path.write_bytes(kept + b"\n")
        error = forge("registry", "rebuild", "tuned", "--json").document["error"]
        path.write_bytes(kept)
        assert f"{str(named)!r} is another one by now" in error["what"]


def test_a_merge_is_made_again(models: Path, tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    lora = write_tiny_lora(tmp_path / "lora.gguf")
    forge_json("convert", "--gguf", gguf, "--name", "tiny", "--no-check")
    forge_json("merge", "tiny", lora, "--weight", "0.5", "--name", "merged", "--system", "Short.", "--no-check")
    assert forge_json("registry", "rebuild", "merged")["same"] is True
    assert forge_json("registry", "rebuild", "merged", "--whole")["same"] is True


@pytest.mark.parametrize("command", ["retrain", "create-from-base"])
def test_an_adapter_in_another_form_is_recorded_as_it_was_given_and_put_on_again(
    models: Path, tmp_path: Path, command: str
) -> None:
    peft = tmp_path / "my-adapter"
    write_lora(DEMO_MODEL, peft)
    forge_json(command, "--base", "base", "--adapter", peft, "--name", "layered", "--no-check")
    parents = forge_json("registry", "lineage", "layered")["parents"]
    assert [one["ref"] for one in parents if one["role"] == "adapter"] == [str(peft)]
    assert forge_json("registry", "rebuild", "layered")["same"] is True
    (peft / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert str(peft) in forge("registry", "rebuild", "layered", "--json").document["error"]["what"]


def test_a_quantization_with_an_importance_matrix_is_made_again(models: Path, tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    matrix = tmp_path / "imatrix.gguf"
    with open_gguf(gguf) as source:
        entries = {
            name: ImatrixEntry(np.arange(1, 1 + tensor.shape[-1], dtype=np.float32)[None], np.ones(1, np.int64))
            for name, tensor in source.tensors.items()
            if name.startswith("blk.") and len(tensor.shape) == 2
        }
    write_imatrix(matrix, Imatrix(entries, chunk_count=1, chunk_size=1))
    words = ("--quant", "Q4_0", "--imatrix", matrix, "--no-check")
    forge_json("convert", "--gguf", gguf, "--name", "small", *words)
    assert forge_json("registry", "rebuild", "small")["same"] is True
    matrix.write_bytes(matrix.read_bytes() + b"\0")
    assert str(matrix) in forge("registry", "rebuild", "small", "--json").document["error"]["what"]


def test_a_folder_that_changed_is_noticed_before_any_work(models: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(DEMO_MODEL, source)
    forge_json("import", source, "--name", "own", "--no-check")
    digest = forge_json("registry", "lineage", "own")["parents"][0]["digest"]
    assert digest.startswith("sha256:")
    with (source / "config.json").open("a") as stream:
        stream.write("\n")
    assert "another one" in forge("registry", "rebuild", "own", "--json").document["error"]["what"]


def test_an_ollama_model_made_smaller_keeps_what_it_says_and_is_made_again(models: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "full", "--quant", "none", "--system", "Be brief.", "--no-check")
    landed = forge_json("quantize", "full", "--name", "small", "--type", "Q8_0")
    assert landed["check"]["template"] == "equal" and landed["types"]["Q8_0"] > 0
    small, full = Store(models).find("small"), Store(models).find("full")
    assert small.system == full.system == "Be brief." and small.size_bytes < full.size_bytes
    origin = forge_json("registry", "lineage", "small")
    assert (origin["landing"]["step"], origin["parents"][0]["names"]) == ("quantize", ["full:latest"])
    assert forge_json("registry", "rebuild", "small")["same"] is True


def test_a_quantized_file_can_be_landed_too(models: Path, tmp_path: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "full", "--quant", "none", "--no-check")
    output = tmp_path / "small.gguf"
    words = ("quantize", "full", "-o", output, "--name", "small", "--type", "Q4_0", "--no-check")
    assert forge_json(*words)["landed"]["name"] == "small:latest"
    assert output.exists() and Store(models).find("small").model_path is not None
    assert forge("quantize", "full", "--type", "Q4_0").code == 2
    assert "-o" in forge("quantize", "full", "--name", "x", "--fit", "1GB").err
