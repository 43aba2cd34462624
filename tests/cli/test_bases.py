"""`train-resolve-base`: the file behind a name, why it can or cannot be trained, an origin that is never guessed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import forge, forge_json
from tiny_models import build_model
from tiny_store import install_model, manifest_path

from ollama_forge.convert.plan import ConvertOptions, plan_conversion
from ollama_forge.files import atomic_output
from ollama_forge.gguf.quantize import QuantizeOptions
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.gguf.types import FileType
from ollama_forge.gguf.writer import Field, copy_entry, from_reader, string, uint32, write_gguf
from ollama_forge.jobs.counterpart import find_counterpart, hash_vocabulary, read_named
from ollama_forge.jobs.hf_cache import find_hf_cache, read_hf_cache

CHAT, BASE = "Somebody/Small-Instruct", "Somebody/Small"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one shape and vocabulary (a base and what was made of it), and GGUFs of the second."""
    folder = tmp_path_factory.mktemp("models")
    build_model("qwen2", folder / "base", seed=1)
    build_model("qwen2", folder / "chat", seed=2)
    build_model("qwen2", folder / "wide", seed=2, hidden_size=128)
    for name, quantize in (("q8", QuantizeOptions(FileType.MOSTLY_Q8_0)), ("f16", None)):
        options = ConvertOptions(quantize=quantize, name="Small Instruct")
        with plan_conversion(folder / "chat", options) as plan, atomic_output(folder / f"{name}.gguf") as sink:
            write_gguf(sink, plan.fields, plan.entries)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def put_in_cache(cache: Path, repo: str, source: Path, *, without: str = "") -> Path:
    """A repository as huggingface_hub leaves it: blobs, and a snapshot of links to them."""
    home = cache / ("models--" + repo.replace("/", "--"))
    revision = hashlib.sha1(repo.encode()).hexdigest()
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    for path in source.iterdir():
        blob = home / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
        if path.name == without:
            blob.unlink()
    return snapshot


def with_fields(source: Path, out: Path, *fields: Field, without: str = "\0") -> Path:
    """A copy of a GGUF with more fields."""
    with open_gguf(source) as gguf:
        replaced = {field.key for field in fields}
        kept = [from_reader(f) for key, f in gguf.fields.items() if key not in replaced and not key.startswith(without)]
        with atomic_output(out) as sink:
            write_gguf(sink, [*kept, *fields], [copy_entry(gguf, name) for name in gguf.tensors])
    return out


def base_model(number: int, repo: str) -> Field:
    return string(f"general.base_model.{number}.repo_url", f"https://huggingface.co/{repo}")


def test_an_installed_model_is_its_blob(models: Path, tmp_path: Path) -> None:
    install_model(tmp_path / "s", "small", (models / "q8.gguf").read_bytes())
    found = forge_json("train-resolve-base", "small", "--store", tmp_path / "s")
    blob = Path(found["path"])
    assert blob.read_bytes() == (models / "q8.gguf").read_bytes() and blob.parent.name == "blobs"
    assert (found["name"], found["form"], found["family"], found["quantization"]) == (
        *("small:latest", "gguf", "qwen2", "Q8_0"),
    )
    assert found["found"] and found["single_file"] and found["trainable"] and found["reasons"] == []
    assert found["size"] == blob.stat().st_size and found["parameters"] > 100_000
    assert found["next"] == "ollama-forge finetune --data DATA --base small:latest --name NEW"
    ended = forge("train-resolve-base", "small", "--store", tmp_path / "s")
    assert ended.out.splitlines()[0] == str(blob) and "yes, on its packed blocks" in ended.out


def test_a_path_and_a_folder_are_bases_too(models: Path) -> None:
    by_path = forge_json("train-resolve-base", models / "q8.gguf")
    assert by_path["path"] == str(models / "q8.gguf") and by_path["trainable"] and by_path["digest"] is None
    folder = forge_json("train-resolve-base", models / "chat")
    assert (folder["form"], folder["family"], folder["quantization"]) == ("folder", "qwen2", "BF16")
    assert folder["trainable"] and folder["parameters"] == by_path["parameters"]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("llama3.2", "ollama pull llama3.2:latest"),
        ("somebody/model:7b", "ollama pull somebody/model:7b"),
        ("hf.co/org/repo:Q4_K_M", "ollama pull hf.co/org/repo:Q4_K_M"),
        ("hf:org/repo", "hf download org/repo"),
        ("hf:org/repo@v1.0", "hf download org/repo --revision v1.0"),
    ],
)
def test_what_is_not_here_comes_with_the_command_that_gets_it(name: str, command: str, tmp_path: Path) -> None:
    ended = forge("train-resolve-base", name, "--store", tmp_path / "s", "--json")
    assert ended.code == 1
    assert (ended.document["found"], ended.document["path"], ended.document["next"]) == (False, None, command)
    assert command in forge("train-resolve-base", name, "--store", tmp_path / "s").out


def test_missing_weights_are_pulled_again(models: Path, tmp_path: Path) -> None:
    install_model(tmp_path / "s", "small", (models / "q8.gguf").read_bytes())
    Path(forge_json("train-resolve-base", "small", "--store", tmp_path / "s")["path"]).unlink()
    ended = forge("train-resolve-base", "small", "--store", tmp_path / "s", "--json")
    assert ended.code == 1 and "missing" in ended.document["reasons"][0]
    assert ended.document["next"] == "ollama pull small:latest"


def test_a_path_where_nothing_is_is_an_error(tmp_path: Path) -> None:
    ended = forge("train-resolve-base", tmp_path / "no.gguf", "--json")
    assert ended.code == 1 and ended.document["error"]["kind"] == "not_found"


def test_a_model_of_the_cloud_has_no_weights_here(models: Path, tmp_path: Path) -> None:
    config = {"remote_model": "huge", "remote_host": "https://ollama.com"}
    path = install_model(tmp_path / "s", "huge", (models / "q8.gguf").read_bytes(), config=config)
    document = json.loads(path.read_text())
    document["layers"] = []
    path.write_text(json.dumps(document))
    ended = forge("train-resolve-base", "huge", "--store", tmp_path / "s", "--json")
    assert ended.code == 1 and "cloud" in ended.document["reasons"][0] and not ended.document["trainable"]


def test_a_model_with_an_adapter_is_not_plain_weights(models: Path, tmp_path: Path) -> None:
    install_model(tmp_path / "s", "tuned", (models / "q8.gguf").read_bytes(), adapters=[b"GGUF adapter"])
    found = forge_json("train-resolve-base", "tuned", "--store", tmp_path / "s")
    assert found["path"] and not found["trainable"] and "1 adapter layer" in found["reasons"][0]


OBSTACLES: dict[str, tuple[tuple[Field, ...], str]] = {
    "an embedding model": ((uint32("qwen2.pooling_type", 1),), "not a model that answers"),
    "a projector": ((string("general.type", "mmproj"),), "not a model that answers"),
    "an unknown family": ((string("general.architecture", "mamba"),), "'mamba'"),
    "an unknown tokenizer": ((string("tokenizer.ggml.model", "bert"),), "'bert'"),
}


@pytest.mark.parametrize("case", OBSTACLES)
def test_obstacles_to_training_are_named(case: str, models: Path, tmp_path: Path) -> None:
    fields, words = OBSTACLES[case]
    found = forge_json("train-resolve-base", with_fields(models / "q8.gguf", tmp_path / "m.gguf", *fields))
    assert not found["trainable"] and words in " ".join(found["reasons"])
    assert words in forge("train-resolve-base", tmp_path / "m.gguf").out


# --- where it comes from ----------------------------------------------------------------------------------------------


def origin_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = forge_json("train-resolve-base", path)["hf"]
    return found


def test_nothing_is_guessed_from_a_name(models: Path, tmp_path: Path) -> None:
    path = with_fields(
        *(models / "q8.gguf", tmp_path / "Qwen2.5-0.5B-Instruct-Q8_0.gguf"),
        *(string("general.name", "Qwen2.5 0.5B Instruct"), string("general.organization", "Qwen")),
    )
    found = origin_of(path)
    assert (found["repo"], found["relation"], found["cached"], found["matches"]) == ("unknown", "", None, [])
    shown = forge_json("show", path)
    assert shown["origin"]["hf_repo"] == "unknown"


def test_keys_of_the_file_name_its_base(models: Path, tmp_path: Path) -> None:
    path = with_fields(
        models / "q8.gguf", tmp_path / "m.gguf", uint32("general.base_model.count", 1), base_model(0, BASE)
    )
    found = origin_of(path)
    assert (found["repo"], found["relation"], found["cached"]) == (BASE, "base_model", None)
    assert found["evidence"] == ["general.base_model.0.repo_url names it"]
    shown = forge_json("show", path)["origin"]
    assert (shown["hf_repo"], shown["hf_repo_evidence"]) == (BASE, "general.base_model.0.repo_url")


def test_the_source_counts_more_than_the_base(models: Path, tmp_path: Path) -> None:
    fields = (string("general.source.huggingface.repository", CHAT), uint32("general.base_model.count", 1))
    found = origin_of(with_fields(models / "q8.gguf", tmp_path / "m.gguf", *fields, base_model(0, BASE)))
    assert (found["repo"], found["relation"]) == (CHAT, "source") and len(found["named"]) == 2


def test_of_several_bases_none_is_chosen(models: Path, tmp_path: Path) -> None:
    fields = (uint32("general.base_model.count", 2), base_model(0, BASE), base_model(1, CHAT))
    found = origin_of(with_fields(models / "q8.gguf", tmp_path / "m.gguf", *fields))
    assert found["repo"] == "unknown" and [name["repo"] for name in found["named"]] == [BASE, CHAT]


@pytest.mark.parametrize("file", ["q8.gguf", "f16.gguf"])
def test_equal_vectors_tell_a_model_from_its_base(file: str, models: Path, cache: Path) -> None:
    put_in_cache(cache, BASE, models / "base")
    snapshot = put_in_cache(cache, CHAT, models / "chat")
    put_in_cache(cache, "Somebody/Wide", models / "wide")
    found = origin_of(models / file)
    assert (found["repo"], found["relation"]) == (CHAT, "weights")
    assert found["cached"] == {
        "revision": snapshot.name,
        "folder": str(snapshot),
        "complete": True,
        "missing": [],
        "size": sum(path.stat().st_size for path in (models / "chat").iterdir()),
    }
    evidence = {match["repo"]: match["evidence"] for match in found["matches"]}
    assert set(evidence) == {BASE, CHAT}
    assert "11 of 11 unquantized vectors" in evidence[CHAT] and "0 of 11" in evidence[BASE]
    text = forge("train-resolve-base", models / file).out
    assert f"{CHAT} (weights)" in text and "in the cache, complete" in text and f"{BASE} in the cache: same" in text


def test_the_same_shape_alone_does_not_make_a_model_another(models: Path, cache: Path) -> None:
    put_in_cache(cache, BASE, models / "base")
    found = origin_of(models / "q8.gguf")
    assert found["repo"] == "unknown" and [match["repo"] for match in found["matches"]] == [BASE]


def test_a_copy_that_is_not_whole_is_said_to_be_so(models: Path, tmp_path: Path, cache: Path) -> None:
    put_in_cache(cache, CHAT, models / "chat", without="model.safetensors")
    path = with_fields(
        models / "q8.gguf", tmp_path / "m.gguf", string("general.source.repo_url", f"https://hf.co/{CHAT}")
    )
    found = origin_of(path)
    assert (found["repo"], found["relation"], found["cached"]["complete"]) == (CHAT, "source", False)
    assert "the weights" in found["cached"]["missing"][0] and "not here to compare" in found["evidence"][1]
    ended = forge("train-resolve-base", f"hf:{CHAT}", "--json")
    assert ended.code == 1 and ended.document["next"] == f"hf download {CHAT}"


def test_a_named_repository_that_does_not_fit_is_contradicted(models: Path, tmp_path: Path, cache: Path) -> None:
    put_in_cache(cache, CHAT, models / "wide")
    path = with_fields(
        models / "q8.gguf", tmp_path / "m.gguf", string("general.source.repo_url", f"https://hf.co/{CHAT}")
    )
    assert "other dimensions" in origin_of(path)["evidence"][1]


def test_a_repository_of_the_cache_is_a_base(models: Path, cache: Path) -> None:
    snapshot = put_in_cache(cache, CHAT, models / "chat")
    for revision in ("", "@main", f"@{snapshot.name[:10]}"):
        found = forge_json("train-resolve-base", f"hf:{CHAT}{revision}")
        assert (found["form"], found["path"], found["trainable"]) == ("folder", str(snapshot), True)
    assert forge("train-resolve-base", f"hf:{CHAT}@other").code == 1


def test_files_that_are_shared_in_the_cache_count_once(models: Path, cache: Path) -> None:
    snapshot = put_in_cache(cache, CHAT, models / "chat")
    (snapshot / "copy.json").symlink_to((snapshot / "config.json").readlink())
    (cached,) = read_hf_cache()
    assert cached.size_bytes == sum(path.stat().st_size for path in (models / "chat").iterdir())


def test_what_is_no_model_in_the_cache_is_passed_over(models: Path, cache: Path) -> None:
    put_in_cache(cache, CHAT, models / "chat")
    for name in ("datasets--a--b", "models--only", "models--a--b", "version.txt", ".locks"):
        (cache / name).mkdir()
    (cache / "models--c--d/snapshots/not-a-commit").mkdir(parents=True)
    broken = cache / "models--e--f/snapshots" / ("0" * 40)
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{broken")
    assert [model.repo for model in read_hf_cache()] == [CHAT, "e/f"]
    with open_gguf(models / "q8.gguf") as gguf:
        assert find_counterpart(gguf, read_hf_cache()).repo == CHAT


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/a/b", "HF_HOME": "/c"}, "/a/b"),
        ({"HUGGINGFACE_HUB_CACHE": "/a/b"}, "/a/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
    ],
)
def test_the_cache_lies_where_huggingface_hub_puts_it(environment: dict[str, str], folder: str) -> None:
    assert find_hf_cache(environment) == Path(folder)


@pytest.mark.parametrize(
    ("value", "repo"),
    [
        ("https://huggingface.co/Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("https://hf.co/a/b/", "a/b"),
        ("https://huggingface.co/a/b/tree/main", "a/b"),
        ("https://example.org/a/b", None),
        ("https://huggingface.co/a", None),
        ("a/b", None),
        ("../../etc", None),
        (7, None),
    ],
)
def test_only_addresses_on_the_hub_name_a_repository(value: object, repo: str | None) -> None:
    names = [found.repo for found in read_named({"general.source.url": value})]
    assert names == ([repo] if repo else [])


def test_the_vocabulary_hash_ignores_rows_that_only_fill_the_embedding() -> None:
    assert hash_vocabulary(["a", "b"]) == hash_vocabulary(["a", "b", "[PAD2]", "[PAD3]"])
    assert hash_vocabulary(["a", "b"]) != hash_vocabulary(["ab"])
    assert hash_vocabulary(["a", "b"]) != hash_vocabulary(["a", "b", "[PAD7]"])


def test_a_manifest_that_is_broken_is_an_error(tmp_path: Path) -> None:
    path = manifest_path(tmp_path / "s", "broken")
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert forge("train-resolve-base", "broken", "--store", tmp_path / "s").code == 1
