"""Every landing leaves a record, and the records are a tree that can be looked at and compared."""

import json
import re
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json, tree_hash
from loopback_ollama import LoopbackOllama
from tiny_gguf import write_tiny_gguf, write_tiny_lora

from ollama_forge.errors import CheckError
from ollama_forge.jobs.land_options import LandOptions
from ollama_forge.jobs.landing import land_gguf
from ollama_forge.jobs.lineage import Ingredient, working
from ollama_forge.registry.document import Document, Landing, Parent, RegistryEntry
from ollama_forge.registry.lineage import render_page, render_tree, trace_origin
from ollama_forge.store.catalog import Store
from ollama_forge.store.modelfile import Modelfile


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_FORGE_HOME", str(tmp_path / "forge"))
    monkeypatch.delenv("OLLAMA_FORGE_REGISTRY", raising=False)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_each_landing_is_recorded_with_its_parents_by_digest(store: Path, tmp_path: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    forge_json("create-from-base", "--base", "base", "--name", "chat", "--system", "Be brief.", "--no-check")
    origin = forge_json("registry", "lineage", "chat")
    assert origin["digest"] == f"sha256:{Store(store).find('chat').digest}"
    assert origin["landing"]["step"] == "create"
    assert "SYSTEM" in origin["landing"]["parameters"]["modelfile"]
    assert origin["landing"]["versions"]["ollama-forge"]
    (base,) = origin["parents"]
    assert (base["role"], base["names"]) == ("base", ["base:latest"])
    assert base["digest"] == f"sha256:{Store(store).find('base').digest}"
    assert base["landing"]["step"] == "import"
    assert base["landing"]["parameters"]["conversion"]["quantize"]["file_type"] == "MOSTLY_Q8_0"
    assert base["parents"][0]["ref"] == str(DEMO_MODEL)
    text = forge("registry", "lineage", "chat").out
    assert "base: base:latest" in text
    assert forge_json("registry", "list")[0]["installed"] is True
    assert forge_json("registry", "show", "chat")["lineage"][0]["step"] == "create"


def test_a_merge_names_its_base_and_its_adapters(store: Path, tmp_path: Path) -> None:
    gguf, lora = write_tiny_gguf(tmp_path / "tiny.gguf"), write_tiny_lora(tmp_path / "lora.gguf")
    forge_json("convert", "--gguf", gguf, "--name", "tiny", "--no-check")
    forge_json("merge", "tiny", lora, "--name", "merged", "--no-check")
    origin = forge_json("registry", "lineage", "merged")
    assert origin["landing"]["step"] == "merge"
    assert [parent["role"] for parent in origin["parents"]] == ["base", "adapter"]
    assert origin["parents"][0]["names"] == ["tiny:latest"]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", origin["parents"][1]["digest"])


def test_landing_the_same_again_adds_no_second_record(store: Path) -> None:
    for _ in range(2):
        forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check", "--force")
    assert len(forge_json("registry", "show", "base")["lineage"]) == 1


def test_a_dry_run_and_a_failed_landing_record_nothing(store: Path, tmp_path: Path) -> None:
    before = tree_hash(tmp_path)
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--dry-run")
    assert tree_hash(tmp_path) == before
    template = "{{ raise_exception('no') }}"
    gguf = write_tiny_gguf(tmp_path / "bad.gguf", chat_template=template + "{% endfor %}")
    with pytest.raises(CheckError):
        land_gguf(gguf, "bad", Modelfile(), LandOptions())
    assert not (tmp_path / "forge").exists()


@pytest.mark.parametrize("content", ["{", '{"schema_version": 99}', "folder"])
def test_a_registry_that_cannot_be_written_costs_no_landing(store: Path, tmp_path: Path, content: str) -> None:
    registry = tmp_path / "forge" / "model_registry.json"
    if content == "folder":
        registry.mkdir(parents=True)
    else:
        registry.parent.mkdir()
        registry.write_text(content)
    landed = forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    assert any("registry" in warning for warning in landed["warnings"])
    assert Store(store).find("base").digest == landed["digest"]
    assert content == "folder" or registry.read_text() == content


def test_outer_work_gives_the_step_and_inner_work_adds(store: Path, tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    data = Ingredient("data", "d.jsonl", "sha256:" + "1" * 64)
    with working("finetune", [Ingredient("base", "llama"), data], {"loss": 0.5}, seed=0, rank=8):
        land_gguf(gguf, "tuned", Modelfile(system="Hi."), LandOptions(check=False))
    landing = forge_json("registry", "show", "tuned")["lineage"][0]
    assert landing["step"] == "finetune"
    assert [(one["role"], one["ref"]) for one in landing["parents"]] == [("base", "llama"), ("data", "d.jsonl")]
    assert landing["parameters"]["seed"] == 0
    assert "Hi." in landing["parameters"]["modelfile"]
    assert landing["scores"] == {"loss": 0.5}


def test_the_page_loads_nothing_and_escapes_what_it_shows(store: Path, tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    landing = Landing(name="x", step="<script>", parameters={"k": "</td><b>"})
    entry = RegistryEntry.model_validate({"name": "x", "identity": {"manifest_digest": digest}})
    page = render_page(trace_origin(Document(models={"x": entry}).with_landing(digest, landing), "x"))
    assert "<script" not in page
    assert "</td><b>" not in page
    assert not re.search(r"(src|href)=", page)
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    forge_json("registry", "lineage", "base", "--html", tmp_path / "page.html")
    assert "base:latest" in (tmp_path / "page.html").read_text()
    assert forge("registry", "lineage", "base", "--html", tmp_path / "page.html").code == 1


def test_loops_and_shared_parents_end() -> None:
    digests = ["sha256:" + f"{number:064x}" for number in range(40)]
    document = Document()
    for number, digest in enumerate(digests):
        parents = [Parent(role="base", digest=digests[(number + step) % 40]) for step in (1, 1, 2)]
        document = document.with_landing(digest, Landing(name=f"m{number}", step="merge", parents=tuple(parents)))
    origin = trace_origin(document, digests[3])
    assert len(render_tree(origin)) < 400
    assert origin.ref == "m3"


def test_diff_says_what_two_models_do_not_share(store: Path) -> None:
    forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    forge_json("create-from-base", "--base", "base", "--name", "chat", "--system", "Be brief.", "--no-check")
    rows = forge_json("registry", "diff", "base", "chat")
    assert rows["blobs.system"]["a"] == []
    assert "blobs.model" not in rows
    assert rows["made.step"] == {"a": "import", "b": "create"}
    assert forge_json("registry", "diff", "base", "base") == {}


def test_a_model_that_was_replaced_is_still_found_by_its_digest(store: Path) -> None:
    first = forge_json("import", DEMO_MODEL, "--name", "base", "--quant", "Q8_0", "--no-check")
    forge_json("create-from-base", "--base", "base", "--name", "base", "--system", "Hi.", "--no-check", "--force")
    old = forge_json("registry", "lineage", first["digest"][:12])
    assert old["landing"]["step"] == "import"
    entry = forge_json("registry", "show", "base")
    assert entry["previous_digests"] == [f"sha256:{first['digest']}"]
    assert json.loads(json.dumps(forge_json("registry", "lineage", "base")))["parents"][0]["digest"].endswith(
        first["digest"]
    )


def test_what_is_made_on_a_server_is_recorded_too(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LoopbackOllama(tmp_path / "served") as loopback:
        gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
        forge_json("convert", "--gguf", gguf, "--name", "far", "--host", loopback.url, "--no-check")
        words = ("--base", "far", "--name", "far-chat", "--system", "Be brief.", "--host", loopback.url, "--no-check")
        landed = forge_json("create-from-base", *words)
    assert landed["warnings"] == []
    origin = forge_json("registry", "lineage", "far-chat")
    assert (origin["landing"]["step"], origin["parents"][0]["names"]) == ("create", ["far:latest"])
    assert origin["parents"][0]["parents"][0]["ref"] == str(gguf)
    assert forge_json("registry", "show", "far-chat")["store"] == loopback.url
