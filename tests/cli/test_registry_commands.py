"""`registry` as a person or a script sees it: the life of an entry from import to purge, and back."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from command import forge, forge_json, tree_hash
from tiny_store import install_model, manifest_path, snapshot

from ollama_forge.store.catalog import Store

PLACEHOLDER = {"name": "model-ollama-gguf-7b", "backend": "ollama"}
LOGICAL = {"name": "one-7b-old", "backend": "ollama", "served_model_id": "one:7b"}


def header(file_type: int = 15, filling: bytes = b"") -> bytes:
    texts = {"general.architecture": "llama"}
    raw = struct.pack("<4sIQQ", b"GGUF", 3, 0, len(texts) + 1)
    for key, value in texts.items():
        raw += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()
    key = "general.file_type"
    return raw + struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, file_type) + b"\0" * 32 + filling


class House:
    """A store with two models and a registry, on a machine of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "models"
        self.registry = folder / "forge" / "model_registry.json"

    def install(self, name: str, file_type: int = 15, **more: Any) -> None:
        config = {"file_type": {15: "Q4_K_M", 7: "Q8_0"}[file_type]}
        install_model(self.store, name, header(file_type, name.encode()), config=config, **more)

    def put(self, *entries: dict[str, Any]) -> None:
        document = {"schema_version": 1, "models": {entry["name"]: entry for entry in entries}}
        self.registry.parent.mkdir(exist_ok=True)
        self.registry.write_text(json.dumps(document))

    @property
    def models(self) -> dict[str, Any]:
        models: dict[str, Any] = json.loads(self.registry.read_text())["models"]
        return models

    def names(self, *options: str) -> list[str]:
        return [entry["name"] for entry in forge_json("registry", "list", *options)]


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    made = House(tmp_path)
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.setenv("OLLAMA_MODELS", str(made.store))
    monkeypatch.delenv("OLLAMA_FORGE_REGISTRY", raising=False)
    made.install("one:7b", template="{{ .Tools }}")
    made.install("two:8b-instruct-q4_K_M")
    return made


def test_import_and_list(house: House) -> None:
    imported = forge_json("registry", "import")
    assert imported["added"] == ["one-7b-ollama-gguf", "two-8b-instruct-ollama-gguf-q4_k_m"]
    assert imported["origin"] == "store"
    listed = forge_json("registry", "list")
    assert [entry["installed"] for entry in listed] == [True, True]
    assert listed[1]["quantization"] == "q4_k_m"
    ended = forge("registry", "list")
    assert "one-7b-ollama-gguf" in ended.out
    assert "one:7b" not in ended.out
    ended = forge("registry", "list", "--details")
    assert "one:7b" in ended.out
    assert str(Store(house.store).find("one:7b").model_path) in ended.out


def test_importing_twice_gives_the_same_bytes(house: House) -> None:
    forge_json("registry", "import")
    before = snapshot(house.folder)
    again = forge_json("registry", "import")
    assert (again["added"], again["updated"], again["unchanged"]) == ([], [], 2)
    assert snapshot(house.folder) == before


def test_the_registry_is_where_the_option_or_the_variable_says(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    forge_json("registry", "import", "--registry", house.folder / "by-option.json")
    monkeypatch.setenv("OLLAMA_FORGE_REGISTRY", str(house.folder / "by-variable.json"))
    forge_json("registry", "import")
    assert (house.folder / "by-option.json").read_bytes() == (house.folder / "by-variable.json").read_bytes()
    assert not house.registry.exists()


WRITING = [
    ("import",),
    ("import", "--deprecate-placeholders"),
    ("deprecate", "one:7b"),
    ("undeprecate", "old"),
    ("purge-deprecated", "--yes"),
    ("purge-deprecated", "--placeholders-only", "--yes"),
    ("backfill", "-v"),
    ("normalize", "--apply"),
    ("normalize", "--rebuild", "--apply"),
    ("normalize", "--prune-missing", "--apply", "--yes"),
    ("role", "set", "one:7b", "caption"),
    ("role", "add", "one:7b", "caption"),
    ("role", "remove", "old", "judge"),
    ("undo", "--yes"),
]


def fill(house: House) -> None:
    """A registry in which each writing command has something to do."""
    house.put(LOGICAL, {**PLACEHOLDER, "deprecated": True})
    forge_json("registry", "import")
    blob = str(Store(house.store).find("one:7b").model_path)
    old = {"name": "old", "backend": "ollama", "deprecated": True, "roles": ["judge"], "download_path": "/nowhere.gguf"}
    stale = {"name": "stale", "backend": "gguf", "quantization": "q8_0", "download_path": blob}
    wrong = {**house.models["two-8b-instruct-ollama-gguf-q4_k_m"], "quantization": "q2_k", "download_size_bytes": 1}
    house.put(
        {**LOGICAL, "name": "bare"},
        PLACEHOLDER,
        {**PLACEHOLDER, "name": "model-ollama-gguf", "deprecated": True},
        old,
        stale,
        wrong,
    )
    forge_json("registry", "deprecate", "stale")
    house.install("three:7b")


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_a_dry_run_leaves_every_byte_as_it_was_and_tells_what_the_real_run_does(
    house: House, words: tuple[str, ...]
) -> None:
    fill(house)
    before = tree_hash(house.folder)
    dry = forge_json("registry", *words, "--dry-run")
    assert tree_hash(house.folder) == before
    wet = forge_json("registry", *words)
    assert tree_hash(house.folder) != before
    assert {**dry, "dry_run": False} == wet


def test_a_dry_run_makes_no_home(house: House) -> None:
    before = tree_hash(house.folder)
    forge_json("registry", "import", "--dry-run")
    forge_json("registry", "list")
    assert tree_hash(house.folder) == before


def test_the_old_list_is_imported_whole(house: House) -> None:
    old = [
        {
            "name": "a",
            "backend": "ollama",
            "served_model_id": "a:7b",
            "capabilities": {"vision": True},
            "probes": {"x": 1},
        },
        {"name": "b", "backend": "vllm", "download_path": "/weights/b", "roles": ["caption"]},
    ]
    path = house.folder / "configs.json"
    path.write_text(json.dumps(old))
    assert forge_json("registry", "import", "--from-json", path)["added"] == ["a", "b"]
    assert house.models["a"]["probes"] == {"x": 1}
    assert house.names("--role", "caption") == ["b"]
    assert house.names("--include-logical", "--capability", "vision") == ["a"]


def test_deprecated_entries_are_hidden_until_asked_for(house: House) -> None:
    forge_json("registry", "import")
    forge_json("registry", "deprecate", "one:7b")
    assert house.names() == ["two-8b-instruct-ollama-gguf-q4_k_m"]
    assert len(house.names("--show-deprecated")) == 2
    forge_json("registry", "import")
    assert len(house.names()) == 1
    forge_json("registry", "undeprecate", "one-7b-ollama-gguf")
    assert len(house.names()) == 2


def test_logical_entries_are_hidden_until_asked_for_or_backfilled(house: House) -> None:
    house.put(LOGICAL)
    assert house.names() == []
    assert house.names("--include-logical") == ["one-7b-old"]
    assert forge_json("registry", "list", "--include-logical")[0]["logical"] is True
    forge_json("registry", "backfill")
    assert house.names() == ["one-7b-old"]


def test_backfill_finds_the_blob_that_the_manifest_names(house: House) -> None:
    house.put(
        LOGICAL, {**LOGICAL, "name": "strange", "served_model_id": "strange:7b"}, {"name": "v", "backend": "vllm"}
    )
    planned = forge_json("registry", "backfill", "--dry-run", "--location", "shelf")
    assert planned["changed"]["one-7b-old"]["download_format"] == {"before": None, "after": "gguf"}
    assert forge_json("registry", "backfill", "--location", "shelf")["changed"] == planned["changed"]
    entry = house.models["one-7b-old"]
    assert Path(entry["download_path"]) == Store(house.store).find("one:7b").model_path
    assert entry["download_location"] == "shelf"
    assert "download_size_bytes" not in entry
    assert house.models["strange"]["download_path"] == "ollama://strange:7b"
    assert "download_path" not in house.models["v"]
    assert forge_json("registry", "backfill")["changed"] == {}


def test_backfill_leaves_the_format_when_told(house: House) -> None:
    house.put(LOGICAL)
    forge_json("registry", "backfill", "--no-set-format")
    assert "download_format" not in house.models["one-7b-old"]


def test_backfill_without_a_store_says_so_in_the_path(house: House) -> None:
    house.put(LOGICAL)
    forge_json("registry", "backfill", "--store", house.folder / "nothing")
    assert house.models["one-7b-old"]["download_path"] == "ollama://one:7b"
    forge_json("registry", "backfill")
    assert house.models["one-7b-old"]["download_path"].startswith(str(house.store))


def test_purging_asks_and_can_be_undone(house: House) -> None:
    forge_json("registry", "import")
    forge_json("registry", "deprecate", "one:7b")
    before = house.registry.read_bytes()
    refused = forge("registry", "purge-deprecated")
    assert refused.code == 2
    assert house.registry.read_bytes() == before
    assert forge_json("registry", "purge-deprecated", "--yes")["removed"] == ["one-7b-ollama-gguf"]
    assert list(house.models) == ["two-8b-instruct-ollama-gguf-q4_k_m"]
    assert forge_json("registry", "undo", "--yes")["returned"] == ["one-7b-ollama-gguf"]
    assert house.registry.read_bytes() == before
    assert forge_json("list")[0]["name"] in ("one:7b", "two:8b-instruct-q4_K_M")


def test_only_placeholders_are_purged_when_told(house: House) -> None:
    house.put({**PLACEHOLDER}, {**LOGICAL, "deprecated": True})
    forge_json("registry", "import", "--deprecate-placeholders")
    removed = forge_json("registry", "purge-deprecated", "--placeholders-only", "--yes")["removed"]
    assert removed == ["model-ollama-gguf-7b"]
    assert "one-7b-old" in house.models


def test_purging_nothing_asks_nothing(house: House) -> None:
    forge_json("registry", "import")
    assert forge_json("registry", "purge-deprecated")["removed"] == []


def test_normalize_is_a_preview_until_apply(house: House) -> None:
    fill(house)
    before = tree_hash(house.folder)
    preview = forge_json("registry", "normalize")
    assert preview["dry_run"] is True
    assert preview["changed"]["stale"]["quantization"] == {"before": "q8_0", "after": "q4_k_m"}
    assert tree_hash(house.folder) == before
    forge_json("registry", "normalize", "--apply")
    assert house.models["stale"]["quantization"] == "q4_k_m"
    assert house.models["two-8b-instruct-ollama-gguf-q4_k_m"]["download_size_bytes"] == 1
    forge_json("registry", "normalize", "--rebuild", "--apply")
    model = Store(house.store).find("two:8b-instruct-q4_K_M")
    assert house.models["two-8b-instruct-ollama-gguf-q4_k_m"]["download_size_bytes"] == model.size_bytes
    assert forge_json("registry", "normalize", "--rebuild")["changed"] == {}


def test_pruning_takes_what_is_missing_and_keeps_what_is_unknown(house: House) -> None:
    fill(house)
    house.put(*house.models.values(), {**LOGICAL, "name": "far", "download_path": "ollama://one:7b"})
    assert forge("registry", "normalize", "--prune-missing", "--apply").code == 2
    removed = forge_json("registry", "normalize", "--prune-missing", "--apply", "--yes")["removed"]
    assert removed == ["old"]
    assert "far" in house.models


def test_installed_means_that_the_blobs_are_there(house: House) -> None:
    forge_json("registry", "import")
    path = Store(house.store).find("one:7b").model_path
    assert path is not None
    path.unlink()
    installed = {entry["served_model_id"]: entry["installed"] for entry in forge_json("registry", "list")}
    assert installed == {"one:7b": False, "two:8b-instruct-q4_K_M": True}


def test_a_model_behind_a_server_is_neither_installed_nor_not(house: House) -> None:
    house.put({**LOGICAL, "download_path": "ollama://one:7b"})
    assert forge_json("registry", "list")[0]["installed"] is None


def test_verify_finds_damage_and_replacement(house: House) -> None:
    forge_json("registry", "import")
    assert forge_json("registry", "verify")["whole"] == ["one-7b-ollama-gguf", "two-8b-instruct-ollama-gguf-q4_k_m"]
    path = Store(house.store).find("one:7b").model_path
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    damaged = forge("registry", "verify", "one:7b", "--json")
    assert damaged.code == 1
    assert [problem["kind"] for problem in damaged.document["problems"]] == ["content"]
    assert forge("registry", "verify", "--quick").code == 0
    house.install("two:8b-instruct-q4_K_M", system="Another.")
    replaced = forge("registry", "verify", "two:8b-instruct-q4_K_M", "--json")
    assert [problem["kind"] for problem in replaced.document["problems"]] == ["manifest"]


def test_roles_are_set_added_and_removed_for_several_models(house: House) -> None:
    forge_json("registry", "import")
    forge_json("registry", "role", "add", "one:7b", "two:8b-instruct-q4_K_M", "caption")
    forge_json("registry", "role", "add", "one:7b", "judge")
    assert house.models["one-7b-ollama-gguf"]["roles"] == ["caption", "judge"]
    assert len(house.names("--role", "caption")) == 2
    forge_json("registry", "role", "set", "one:7b", "draft")
    assert house.models["one-7b-ollama-gguf"]["roles"] == ["draft"]
    forge_json("registry", "role", "remove", "one:7b", "draft")
    assert house.models["one-7b-ollama-gguf"]["roles"] == []
    forge_json("registry", "import")
    assert house.names("--role", "caption") == ["two-8b-instruct-ollama-gguf-q4_k_m"]


def test_list_filters_by_what_a_model_can(house: House) -> None:
    forge_json("registry", "import")
    assert house.names("--capability", "tools") == ["one-7b-ollama-gguf"]


@pytest.mark.parametrize("how", ["name", "served", "digest"])
def test_a_model_is_found_by_name_by_ollamas_name_and_by_digest(house: House, how: str) -> None:
    forge_json("registry", "import")
    digest = Store(house.store).find("one:7b").digest
    ref = {"name": "one-7b-ollama-gguf", "served": "ONE:7b", "digest": digest[:12]}[how]
    shown = forge_json("registry", "show", ref)
    assert shown["served_model_id"] == "one:7b"
    assert digest in forge("registry", "show", ref).out


def test_a_name_that_is_not_there_is_an_error_with_names_that_are_alike(house: House) -> None:
    forge_json("registry", "import")
    ended = forge("registry", "deprecate", "one:7bb", "--json")
    assert ended.code == 1
    assert "one:7b" in ended.document["error"]["why"]


def test_a_broken_registry_says_how_to_get_the_last_version_back(house: House) -> None:
    forge_json("registry", "import")
    forge_json("registry", "deprecate", "one:7b")
    house.registry.write_text("{")
    ended = forge("registry", "list", "--json")
    assert ended.code == 1
    assert "registry undo" in ended.document["error"]["next"]
    forge_json("registry", "undo", "--yes")
    assert len(house.names()) == 2


def test_a_removed_model_stays_in_the_list_as_not_installed(house: House) -> None:
    forge_json("registry", "import")
    manifest_path(house.store, "one:7b").unlink()
    assert forge_json("registry", "import")["absent"] == ["one-7b-ollama-gguf"]
    assert [entry["installed"] for entry in forge_json("registry", "list")] == [False, True]


def test_the_json_list_is_one_document_with_whole_words(house: House) -> None:
    house.put({**LOGICAL, "download_path": "ollama://" + "very-long-" * 60})
    ended = forge("registry", "list", "--json")
    assert json.loads(ended.out)[0]["download_path"] == "ollama://" + "very-long-" * 60
    assert "very-long-" * 60 in ended.out
