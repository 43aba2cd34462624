"""Importing: from a store, a server, or a listing; nothing wrong, nothing lost, twice the same."""

import os
import time
from pathlib import Path

import pytest
from loopback_ollama import LoopbackOllama, Status
from registry_stores import JINJA_TOOLS, LLAMA, gguf_header, install, install_two_hundred
from tiny_store import install_model, manifest_path

from ollama_forge.errors import ServerError
from ollama_forge.registry.document import Document, RegistryEntry, render_document
from ollama_forge.registry.importing import plan_import, plan_merge
from ollama_forge.registry.inventory import (
    listed_inventory,
    read_server_inventory,
    read_store_inventory,
    take_inventory,
)
from ollama_forge.registry.listing import LINE, ListedModel, parse_json_listing, parse_plain_listing, parse_size
from ollama_forge.store.catalog import Store
from ollama_forge.store.server import OllamaServer

PLAIN = """NAME                       ID              SIZE      MODIFIED
llama3:8b-instruct-q4_K_M  365c0bd3c000    4.7 GB    2 weeks ago
tiny:latest                0123456789ab    512 KB    About a minute ago
gpt-oss:20b-cloud          aabbccddeeff    -         3 days ago
small:latest               00ff00ff00ff    999 B     4 months ago
"""


def test_two_hundred_models_are_all_there_and_each_oddity_is_told_once(tmp_path: Path) -> None:
    install_two_hundred(tmp_path)
    corrupt = manifest_path(tmp_path, "corrupt:latest")
    os.utime(corrupt, (time.time() - 60, time.time() - 60))
    found = read_store_inventory(Store(tmp_path))
    imported = plan_import(Document(), found)
    assert len(imported.added) == len(imported.document.models) == 200
    served = {entry.served_model_id for entry in imported.document.models.values()}
    assert len(served) == 200
    assert {"hf.co/x/Qwen3-8B-GGUF:Q4_K_M", "hf.co/y/Qwen3-8B-GGUF:Q4_K_M", "user/model:7b", "Spelled:latest"} <= served
    assert [odd.kind for odd in sorted(imported.oddities, key=lambda odd: odd.kind)] == [
        "case",
        "manifest",
        "missing",
        "quantization",
    ]
    assert found.unreadable == {"corrupt:latest"}
    again = plan_import(imported.document, read_store_inventory(Store(tmp_path)))
    assert render_document(again.document) == render_document(imported.document)
    assert (again.added, again.updated, again.n_unchanged) == ((), (), 200)


def test_an_entry_has_the_fields_of_the_strategy(tmp_path: Path) -> None:
    install(tmp_path, "llama3:8b-instruct-q4_K_M")
    entry = plan_import(Document(), read_store_inventory(Store(tmp_path))).document.models[
        "llama3-8b-instruct-ollama-gguf-q4_k_m"
    ]
    model = Store(tmp_path).find("llama3:8b-instruct-q4_K_M")
    assert entry.backend == "ollama"
    assert entry.family == "llama3-8b-instruct"
    assert entry.architecture == "llama"
    assert entry.quantization == "q4_k_m"
    assert entry.download_format == "gguf"
    assert entry.download_path == str(model.model_path)
    assert Path(entry.download_path).is_file()
    assert entry.download_size_bytes == model.size_bytes
    assert entry.served_model_id == "llama3:8b-instruct-q4_K_M"
    assert entry.source_provider == "ollama"
    assert entry.roles == ()
    assert entry.presence == "present"
    assert entry.identity.manifest_digest == f"sha256:{model.digest}"
    assert [blob.kind for blob in entry.identity.blobs] == ["model", "config"]
    assert len(entry.identity.metadata_hash) == 64


def test_the_header_counts_more_than_the_name(tmp_path: Path) -> None:
    install(tmp_path, "liar:q8_0")
    found = read_store_inventory(Store(tmp_path))
    entry = plan_import(Document(), found).document.models["liar-ollama-gguf-q8_0"]
    assert entry.quantization == "q4_k_m"
    assert [odd.kind for odd in found.oddities] == ["quantization"]


def test_a_header_and_a_config_that_differ_are_told(tmp_path: Path) -> None:
    config = {"model_family": "qwen2", "file_type": "Q8_0"}
    install_model(tmp_path, "odd:latest", gguf_header(LLAMA), config=config)
    assert {odd.kind for odd in read_store_inventory(Store(tmp_path)).oddities} == {"family", "quantization"}


@pytest.mark.parametrize(
    ("name", "values", "more", "capabilities"),
    [
        ("llava-vl:latest", LLAMA, {}, ("completion",)),
        ("plain:latest", {**LLAMA, "tokenizer.chat_template": JINJA_TOOLS}, {}, ("completion", "tools")),
        ("go:latest", LLAMA, {"template": "{{ if .Tools }}{{ .Tools }}{{ end }}"}, ("completion", "tools")),
        ("fim:latest", LLAMA, {"template": "{{ .Prompt }}{{ .Suffix }}"}, ("completion", "insert")),
        ("r1:latest", {**LLAMA, "tokenizer.chat_template": "<think>"}, {}, ("completion", "thinking")),
        ("coder:latest", {**LLAMA, "llama.pooling_type": 1}, {}, ("embedding",)),
        ("eyes:latest", {**LLAMA, "llama.vision.block_count": 3}, {}, ("completion", "vision")),
        ("said:latest", LLAMA, {"config": {"capabilities": ["image"]}}, ("completion", "image")),
    ],
)
def test_capabilities_come_from_the_model_not_from_its_name(
    tmp_path: Path, name: str, values: dict[str, object], more: dict[str, object], capabilities: tuple[str, ...]
) -> None:
    install_model(tmp_path, name, gguf_header(values), **more)  # type: ignore[arg-type]
    (found,) = read_store_inventory(Store(tmp_path)).models
    assert found.capabilities == capabilities


def test_a_model_that_is_gone_is_marked_and_comes_back(tmp_path: Path) -> None:
    install(tmp_path, "one:7b")
    two = install(tmp_path, "two:7b")
    first = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    content = two.read_bytes()
    two.unlink()
    gone = plan_import(first, read_store_inventory(Store(tmp_path)))
    assert gone.absent == ("two-7b-ollama-gguf",)
    assert gone.document.models["two-7b-ollama-gguf"].presence == "absent"
    assert plan_import(gone.document, read_store_inventory(Store(tmp_path))).document == gone.document
    two.write_bytes(content)
    assert plan_import(gone.document, read_store_inventory(Store(tmp_path))).document == first


def test_a_model_whose_manifest_broke_is_unknown_not_gone(tmp_path: Path) -> None:
    manifest = install(tmp_path, "one:7b")
    first = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    manifest.write_text("{")
    os.utime(manifest, (1, 1))
    after = plan_import(first, read_store_inventory(Store(tmp_path)))
    assert after.absent == ()
    assert after.document.models["one-7b-ollama-gguf"].presence == "unknown"


def test_a_name_that_got_other_bytes_keeps_its_entry_and_the_old_digest(tmp_path: Path) -> None:
    install(tmp_path, "one:7b")
    first = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    kept = first.models["one-7b-ollama-gguf"].model_copy(update={"roles": ("caption",), "deprecated": True})
    install(tmp_path, "one:7b", file_type=7, filling=b"new")
    after = plan_import(first.with_models({kept.name: kept}), read_store_inventory(Store(tmp_path)))
    entry = after.document.models["one-7b-ollama-gguf"]
    assert after.updated == (entry.name,)
    assert entry.previous_digests == (kept.identity.manifest_digest,)
    assert (entry.quantization, entry.roles, entry.deprecated) == ("q8_0", ("caption",), True)


def test_two_models_that_would_share_a_name_are_told_apart_the_same_way_each_time(tmp_path: Path) -> None:
    install(tmp_path, "registry.ollama.ai/a-b/c/7b", filling=b"1")
    install(tmp_path, "registry.ollama.ai/a/b-c/7b", filling=b"2")
    document = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    assert len({entry.identity.manifest_digest for entry in document.models.values()}) == 2
    assert sorted(document.models)[0] == "a-b-c-7b-ollama-gguf"
    assert document == plan_import(Document(), read_store_inventory(Store(tmp_path))).document


def test_two_stores_do_not_share_an_entry(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        install(tmp_path / folder, "one:7b")
    document = plan_import(Document(), read_store_inventory(Store(tmp_path / "a"))).document
    both = plan_import(document, read_store_inventory(Store(tmp_path / "b"))).document
    assert len(both.models) == 2
    assert plan_import(both, read_store_inventory(Store(tmp_path / "a"))).document == both
    assert plan_import(both, read_store_inventory(Store(tmp_path / "b"))).document == both


def test_placeholders_are_deprecated_when_asked_and_real_models_are_not(tmp_path: Path) -> None:
    install(tmp_path, "model:q4_K_M")
    legacy = RegistryEntry(name="model-ollama-gguf-7b")
    document = Document(models={legacy.name: legacy})
    found = read_store_inventory(Store(tmp_path))
    assert plan_import(document, found).deprecated == ()
    imported = plan_import(document, found, deprecate_placeholders=True)
    assert imported.deprecated == ("model-ollama-gguf-7b",)
    assert not imported.document.models["model-ollama-gguf-q4_k_m"].deprecated
    assert plan_import(imported.document, found, deprecate_placeholders=True).deprecated == ()


def test_the_expression_for_a_line_is_the_strategys_own() -> None:
    assert LINE.pattern == (
        r"^(?P<name>\S+)\s+(?P<id>[0-9a-f]{6,})\s+(?P<size_val>\d+(?:\.\d+)?)\s+(?P<size_unit>[KMGTP]B)\s+"
        r"(?P<modified>.+)$"
    )


def test_a_plain_listing_is_read() -> None:
    listing = parse_plain_listing(PLAIN + "what is this\n")
    assert listing.models == (
        ListedModel("llama3:8b-instruct-q4_K_M", "365c0bd3c000", 4_700_000_000),
        ListedModel("tiny:latest", "0123456789ab", 512_000),
        ListedModel("gpt-oss:20b-cloud", "aabbccddeeff", None),
        ListedModel("small:latest", "00ff00ff00ff", 999),
    )
    assert listing.strange_lines == ("what is this",)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1 KB", 10**3), ("2.5 MB", 2_500_000), ("4.7 GB", 4_700_000_000), ("1.25 TB", 1_250_000_000_000), ("x", None)],
)
def test_sizes_have_decimal_units(text: str, size_bytes: int | None) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "a:7b", "digest": "sha256:%s", "size": 12}]' % ("ab" * 32),
        '{"models": [{"model": "a:7b", "digest": "%s", "size": 12}]}' % ("ab" * 32),
        '{"name": "a:7b", "id": "%s", "size": "12 B"}' % ("ab" * 32),
    ],
)
def test_a_json_listing_is_read_in_every_form(text: str) -> None:
    listing = parse_json_listing(text)
    assert listing is not None
    assert listing.models == (ListedModel("a:7b", "ab" * 32, 12),)


def test_text_is_no_json_listing() -> None:
    assert parse_json_listing(PLAIN) is None
    assert parse_json_listing("") is None


def test_a_listing_gives_a_path_that_says_that_the_store_is_unknown() -> None:
    document = plan_import(Document(), listed_inventory(parse_plain_listing(PLAIN))).document
    entry = document.models["llama3-8b-instruct-ollama-gguf-q4_k_m"]
    assert entry.download_path == "ollama://llama3:8b-instruct-q4_K_M"
    assert entry.quantization == "q4_k_m"
    assert entry.download_size_bytes == 4_700_000_000


def test_a_listing_does_not_forget_what_the_store_told(tmp_path: Path) -> None:
    install(tmp_path, "one:7b")
    document = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    digest = document.models["one-7b-ollama-gguf"].identity.manifest_digest.removeprefix("sha256:")
    listing = parse_plain_listing(f"one:7b  {digest[:12]}  1.2 KB  now\n")
    assert plan_import(document, listed_inventory(listing)).document == document


def test_a_server_tells_the_same_models_as_its_store(tmp_path: Path) -> None:
    install(tmp_path, "one:7b", template="{{ .Prompt }}")
    in_store = plan_import(Document(), read_store_inventory(Store(tmp_path))).document
    with LoopbackOllama(tmp_path) as loopback, OllamaServer(loopback.url) as server:
        found = read_server_inventory(server)
        assert found.store == loopback.url
        from_server = plan_import(Document(), found).document
        assert plan_import(in_store, found).document.models.keys() == in_store.models.keys()
    entry = from_server.models["one-7b-ollama-gguf"]
    assert entry.download_path == "ollama://one:7b"
    assert entry.identity.manifest_digest == in_store.models[entry.name].identity.manifest_digest
    later = plan_import(from_server, read_store_inventory(Store(tmp_path))).document
    assert later.models[entry.name].identity == in_store.models[entry.name].identity
    assert later.models[entry.name].store == str(tmp_path)


def test_a_model_that_the_server_cannot_show_is_imported_and_told(tmp_path: Path) -> None:
    install(tmp_path, "one:7b")
    with LoopbackOllama(tmp_path) as loopback, OllamaServer(loopback.url) as server:
        loopback.fail("POST /api/show", Status(500))
        found = read_server_inventory(server)
    assert [odd.kind for odd in found.oddities] == ["show"]
    assert len(found.models) == 1


@pytest.fixture
def no_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a store and without a server; `ollama` may be put into the folder that is returned."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "nothing"))
    return programs


def write_program(folder: Path, script: str) -> None:
    path = folder / "ollama"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)


def test_the_program_is_asked_for_json_first(no_ollama: Path) -> None:
    write_program(no_ollama, """[ "$2" = --format ] && echo '[{"name": "a:7b", "size": 5}]'\n""")
    found = take_inventory()
    assert (found.origin, [model.served_model_id for model in found.models]) == ("cli-json", ["a:7b"])


def test_a_program_without_json_is_asked_for_its_table(no_ollama: Path) -> None:
    script = '[ "$2" = --format ] && { echo "Error: unknown flag: --format" >&2; exit 1; }\n'
    write_program(no_ollama, script + f"cat <<'END'\n{PLAIN}END\n")
    found = take_inventory()
    assert found.origin == "cli-text"
    assert len(found.models) == 4


def test_without_any_ollama_nothing_is_invented(no_ollama: Path) -> None:
    with pytest.raises(ServerError) as caught:
        take_inventory()
    assert "--store" in caught.value.next


def test_another_registry_adds_what_is_not_here_and_replaces_nothing() -> None:
    mine = RegistryEntry(name="a", roles=("mine",))
    document = Document(models={"a": mine})
    other = Document(models={"a": RegistryEntry(name="a", roles=("theirs",)), "b": RegistryEntry(name="b")})
    merged = plan_merge(document, other, "other.json")
    assert (merged.added, merged.skipped) == (("b",), ("a",))
    assert merged.document.models["a"] is mine
    assert plan_merge(merged.document, other, "other.json").document == merged.document


def test_entries_of_the_predecessor_are_adopted_by_ollamas_name(tmp_path: Path) -> None:
    install(tmp_path, "qwen3:8b")
    old = RegistryEntry(name="qwen3_8b_(Q4_K_M)", served_model_id="qwen3:8b", roles=("caption",))
    imported = plan_import(Document(models={old.name: old}), read_store_inventory(Store(tmp_path)))
    assert imported.added == ()
    assert imported.document.models[old.name].roles == ("caption",)
    assert imported.document.models[old.name].identity.manifest_digest
