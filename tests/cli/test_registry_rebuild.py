"""A model is made again from its record, with the same digest, and nothing else changes."""

from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from tiny_gguf import write_tiny_gguf
from tiny_store import snapshot

from ollama_forge.store.catalog import Store


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
