"""A model goes to another machine with its history, and nothing damaged comes in."""

import json
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash

from ollama_forge.store.catalog import Store
from ollama_forge.store.verify import verify_store


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a customised model, and from now on another machine."""
    monkeypatch.delenv("OLLAMA_FORGE_REGISTRY", raising=False)
    _move_to(tmp_path / "here", monkeypatch)
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    forge_json("create-from-base", "--base", "base", "--name", "chat", "--system", "Be brief.", "--no-check")
    forge_json("registry", "role", "add", "chat", "caption")
    folder = tmp_path / "bundle"
    dry = forge_json("registry", "export", "chat", "-o", folder, "--dry-run")
    assert not folder.exists()
    assert forge_json("registry", "export", "chat", "-o", folder) == {**dry, "dry_run": False}
    _move_to(tmp_path / "there", monkeypatch)
    return folder


def _move_to(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.mkdir()
    monkeypatch.setenv("OLLAMA_MODELS", str(machine / "models"))
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(machine / "forge"))


def test_a_bundle_arrives_with_the_same_digest_its_roles_and_its_history(bundle: Path, tmp_path: Path) -> None:
    landed = forge_json("registry", "import-bundle", bundle)
    there = Store(tmp_path / "there" / "models")
    assert landed["digest"] == there.find("chat").digest == Store(tmp_path / "here" / "models").find("chat").digest
    assert verify_store(there).is_whole
    entry = forge_json("registry", "show", "chat")
    assert entry["roles"] == ["caption"]
    assert entry["installed"] is True
    assert entry["store"] == str(there.models_dir)
    origin = forge_json("registry", "lineage", "chat")
    assert origin["parents"][0]["landing"]["step"] == "import"
    assert forge_json("registry", "import-bundle", bundle)["digest"] == landed["digest"]


def test_a_bundle_can_have_another_name_and_replaces_nothing_unasked(bundle: Path, tmp_path: Path) -> None:
    forge_json("registry", "import-bundle", bundle, "--name", "other")
    forge_json("create-from-base", "--base", "other", "--name", "taken", "--system", "No.", "--no-check")
    before = Store(tmp_path / "there" / "models").find("taken").digest
    refused = forge("registry", "import-bundle", bundle, "--name", "taken", "--json")
    assert refused.document["error"]["kind"] == "exists"
    assert Store(tmp_path / "there" / "models").find("taken").digest == before
    forge_json("registry", "import-bundle", bundle, "--name", "taken", "--force")
    assert Store(tmp_path / "there" / "models").find("taken").digest != before


def test_a_dry_run_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    before = tree_hash(tmp_path)
    assert forge_json("registry", "import-bundle", bundle, "--dry-run")["name"] == "chat:latest"
    assert tree_hash(tmp_path) == before


def test_damage_of_any_kind_is_refused_before_the_store_is_touched(bundle: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    files = [bundle / "bundle.json", bundle / "manifest.json", *sorted((bundle / "blobs").iterdir())]
    for path in files:
        whole = path.read_bytes()
        for damaged in (whole[:-2], b"", bytes([whole[0] ^ 1]) + whole[1:]):
            path.write_bytes(damaged)
            ended = forge("registry", "import-bundle", bundle, "--json")
            assert ended.code == 1, path
            assert ended.document["error"]["next"]
        path.write_bytes(whole)
    models = there / "models"
    assert not [path for path in models.rglob("*") if path.is_file()]
    assert not (there / "forge").exists()
    assert forge("registry", "import-bundle", bundle).code == 0


def test_a_bundle_that_lies_about_itself_is_refused(bundle: Path) -> None:
    path = bundle / "bundle.json"
    promise = json.loads(path.read_text())
    for change in ({"name": "../../evil"}, {"manifest_digest": "sha256:" + "0" * 64}, {"bundle_version": 99}):
        path.write_text(json.dumps({**promise, **change}))
        assert forge("registry", "import-bundle", bundle, "--json").code == 1


def test_the_modelfile_of_a_bundle_names_its_own_blobs(bundle: Path) -> None:
    lines = (bundle / "Modelfile").read_text().splitlines()
    (source,) = [line.removeprefix("FROM ") for line in lines if line.startswith("FROM ")]
    assert (bundle / source).is_file()
    assert any("Be brief." in line for line in lines)


def test_a_damaged_model_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _move_to(tmp_path / "here", monkeypatch)
    monkeypatch.delenv("OLLAMA_FORGE_REGISTRY", raising=False)
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    path = Store(tmp_path / "here" / "models").find("base").model_path
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    ended = forge("registry", "export", "base", "-o", tmp_path / "bundle", "--json")
    assert ended.document["error"]["kind"] == "store"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["here"]
