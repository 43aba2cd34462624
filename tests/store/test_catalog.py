"""The catalog: what Ollama lists is listed, one bad file hides nothing, and names are found as Ollama finds them."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from command import forge
from tiny_store import install_model, layer, manifest_path, snapshot, write_manifest

from ollama_forge.errors import DigestError, ManifestError, NameInvalidError, NotFoundError, StoreError
from ollama_forge.store.catalog import Store, open_store
from ollama_forge.store.digest import parse_digest
from ollama_forge.store.manifest import MODEL
from ollama_forge.store.modelfile import Message, Modelfile
from ollama_forge.store.name import parse_name

GGUF = b"GGUF is not looked at when models are listed"


def test_a_missing_store_is_an_empty_one_and_stays_missing(models_dir: Path) -> None:
    store = Store(models_dir)
    assert store.models() == [] and store.names() == [] and store.orphans() == []
    with pytest.raises(NotFoundError, match="'x:latest'") as refused:
        store.find("x")
    assert str(models_dir) in refused.value.why and "ollama pull" in refused.value.next
    assert not models_dir.exists()


def test_a_model_is_read_with_all_its_parts(models_dir: Path, shared_gguf: Path, shared_lora: Path) -> None:
    path = install_model(
        models_dir,
        "tiny:q",
        shared_gguf.read_bytes(),
        template="{{ .Prompt }}",
        system="Be kind.",
        params={"temperature": 0.5, "stop": ["a", "b"]},
        messages=[{"role": "user", "content": "hi"}],
        licenses=["MIT", "Apache"],
        adapters=[shared_lora.read_bytes()],
    )
    model = Store(models_dir).find("tiny:q")
    assert model.name.display == "tiny:q"
    assert model.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (model.family, model.parameter_size, model.quantization) == ("llama", "41K", "F32")
    assert model.context_length == 512
    assert model.template == "{{ .Prompt }}"
    assert model.system == "Be kind."
    assert model.parameters == (("stop", ("a", "b")), ("temperature", 0.5))
    assert model.messages == (Message("user", "hi"),)
    assert model.licenses == ("MIT", "Apache")
    assert model.model_path and model.model_path.read_bytes() == shared_gguf.read_bytes()
    assert [path.read_bytes() for path in model.adapters] == [shared_lora.read_bytes()]
    assert model.projector is None and model.draft is None
    document = json.loads(path.read_text())
    assert model.size_bytes == sum(part["size"] for part in [*document["layers"], document["config"]])
    assert abs(model.modified_at.timestamp() - path.stat().st_mtime) < 1e-3


def test_the_modelfile_of_a_model_says_what_it_is(models_dir: Path) -> None:
    install_model(models_dir, "m", GGUF, system="s", params={"seed": 1, "unknown": 2}, config={"renderer": "r"})
    model = Store(models_dir).find("m")
    assert model.modelfile("base") == Modelfile(("base",), system="s", parameters=(("seed", 1),), renderer="r")
    assert model.modelfile().sources == (str(model.model_path),)


def test_of_several_layers_the_last_counts_and_params_are_merged(models_dir: Path) -> None:
    layers = [
        layer(models_dir, "model", b"one"),
        layer(models_dir, "model", b"two"),
        layer(models_dir, "prompt", b"old template"),
        layer(models_dir, "system", b"first"),
        layer(models_dir, "system", b"second"),
        layer(models_dir, "params", b'{"seed": 1, "top_k": 5}'),
        layer(models_dir, "params", b'{"seed": 2}'),
        layer(models_dir, "embed", b"ignored"),
    ]
    write_manifest(models_dir, "m", {"digest": "", "mediaType": "", "size": 0}, layers)
    model = Store(models_dir).find("m")
    assert model.model_path and model.model_path.read_bytes() == b"two"
    assert (model.template, model.system) == ("old template", "second")
    assert model.parameters == (("seed", 2), ("top_k", 5))


def test_models_are_listed_newest_first(models_dir: Path) -> None:
    for age, name in enumerate(["b", "a", "c"]):
        os.utime(install_model(models_dir, name, GGUF), (1_700_000_000 - age,) * 2)
    assert [model.name.model for model in Store(models_dir).models()] == ["b", "a", "c"]


def test_bad_files_are_reported_and_hide_nothing(models_dir: Path) -> None:
    install_model(models_dir, "good", GGUF)
    tree = models_dir / "manifests" / "registry.ollama.ai" / "library" / "good"
    (tree / "broken").write_text("{")
    os.utime(tree / "broken", (1_600_000_000,) * 2)
    (tree / ".DS_Store").write_bytes(b"\0")
    (tree / "dangling").symlink_to("nowhere")
    (tree / "folder").mkdir()
    (models_dir / "manifests" / "stray").write_text("x")
    (models_dir / "manifests" / "loop").symlink_to(models_dir / "manifests")
    no_config = install_model(models_dir, "no-config", GGUF, config={"file_type": "odd"})
    digest = parse_digest(json.loads(no_config.read_text())["config"]["digest"])
    (models_dir / "blobs" / digest.blob_filename).unlink()
    catalog = Store(models_dir).read_catalog()
    assert [model.name.model for model in catalog.models] == ["good"]
    assert {(problem.kind, problem.path.name) for problem in catalog.problems} == {
        ("manifest", "broken"),
        ("manifest", "stray"),  # through the loop it is loop/loop/loop:stray, to Ollama too
        ("name", ".DS_Store"),
        ("dangling", "dangling"),
        ("config", "latest"),
    }


def test_a_model_whose_weights_are_gone_is_still_listed(models_dir: Path) -> None:
    install_model(models_dir, "m", GGUF)
    store = Store(models_dir)
    path = store.find("m").model_path
    assert path
    path.unlink()
    assert [model.name.model for model in store.models()] == ["m"]
    assert store.find("m").context_length is None


def test_a_broken_manifest_is_told_when_its_model_is_asked_for(models_dir: Path) -> None:
    path = install_model(models_dir, "m", GGUF)
    path.write_text('{"layers": [{"digest": "sha256:../../etc/passwd"}]}')
    os.utime(path, (1_600_000_000,) * 2)
    with pytest.raises(ManifestError) as caught:
        Store(models_dir).find("m")
    assert str(path) in caught.value.what and "ollama-forge verify" in caught.value.next


@pytest.mark.parametrize(
    "words",
    [
        ("show", "m"),
        ("run", "m", "hi"),
        ("export", "m", "-o", "x.gguf"),
        ("create-from-base", "--base", "m", "--name", "n"),
    ],
)
def test_every_command_names_the_manifest_that_is_broken(models_dir: Path, words: tuple[str, ...]) -> None:
    path = install_model(models_dir, "m", GGUF)
    path.write_text("{")
    os.utime(path, (1_600_000_000,) * 2)
    ended = forge(*words, "--store", models_dir)
    assert ended.code == 1 and str(path) in ended.err and "is not JSON" in ended.err


def test_a_broken_config_blob_is_named(models_dir: Path) -> None:
    install_model(models_dir, "m", GGUF)
    config = Store(models_dir).find("m").manifest.config
    assert config is not None
    blob = models_dir / "blobs" / config.digest.blob_filename
    blob.write_text("[]")
    with pytest.raises(ManifestError, match=blob.name):
        Store(models_dir).find("m")


def test_case_does_not_matter_when_a_model_is_looked_up(models_dir: Path) -> None:
    install_model(models_dir, "registry.ollama.ai/Bob/Foo/Q4", GGUF)
    assert Store(models_dir).find("bob/FOO:q4").name.display == "Bob/Foo:Q4"


def test_each_part_of_a_fresh_name_takes_the_spelling_that_is_there(models_dir: Path) -> None:
    install_model(models_dir, "registry.ollama.ai/bob/Foo/q4", GGUF)
    install_model(models_dir, "registry.ollama.ai/library/other/Latest", GGUF)
    store = Store(models_dir)
    assert store.canonical("Bob/foo:Q4").display == "bob/Foo:q4"
    assert store.canonical("foo").manifest_parts == ("registry.ollama.ai", "library", "Foo", "Latest")
    assert store.canonical("New:X").display == "New:X"


def test_of_two_spellings_the_exact_one_is_found(models_dir: Path) -> None:
    for name in ("a:x", "A:x"):
        install_model(models_dir, name, name.encode())
    store = Store(models_dir)
    assert [store.find(name).name.display for name in ("a:x", "A:x")] == ["a:x", "A:x"]


def test_names_that_are_alike_are_offered(models_dir: Path) -> None:
    install_model(models_dir, "mistral-small:24b", GGUF)
    with pytest.raises(NotFoundError) as refused:
        Store(models_dir).find("mistral-smal:24b")
    assert "mistral-small:24b" in refused.value.why


def test_a_common_tag_makes_no_two_names_alike(models_dir: Path) -> None:
    install_model(models_dir, "tiny", GGUF)
    install_model(models_dir, "llama3.2", GGUF)
    for typed, alike in (("nothing", False), ("llama3", True)):
        with pytest.raises(NotFoundError) as refused:
            Store(models_dir).find(typed)
        assert ("Like it: llama3.2:latest." in refused.value.why) is alike
        assert ("Like it" in refused.value.why) is alike


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a/../../b", "..", "a\0b", "a:../../x", "C:\\x", "m" * 81, "\u0430", ""]
)
def test_hostile_names_are_refused_before_any_path_is_made(models_dir: Path, tmp_path: Path, name: str) -> None:
    install_model(models_dir, "m", GGUF)
    before = snapshot(tmp_path)
    store = Store(models_dir)
    for ask in (store.find, store.canonical):
        with pytest.raises(NameInvalidError):
            ask(name)
    assert snapshot(tmp_path) == before


def test_a_hostile_digest_in_a_manifest_reads_no_file_outside(models_dir: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for hostile in (
        "sha256:../../secret",
        "../../secret",
        str(secret),
        "sha256:" + "A" * 63,
        "sha256:" + "a" * 64 + "\0",
    ):
        write_manifest(models_dir, "m", {"digest": hostile, "size": 2}, [{"mediaType": MODEL, "digest": hostile}])
        with pytest.raises((ManifestError, DigestError)):
            Store(models_dir).find("m")


def test_references_count_every_manifest_even_a_broken_or_foreign_one(models_dir: Path) -> None:
    install_model(models_dir, "a", GGUF)
    install_model(models_dir, "b", GGUF)
    store = Store(models_dir)
    digest = store.find("a").manifest.layers[0].digest
    assert [name.model for name in store.references(digest)] == ["a", "b"]
    for name in ("a", "b"):
        manifest_path(models_dir, name).unlink()
    assert [path.name for path in store.orphans()].count(digest.blob_filename) == 1
    newer = models_dir / "manifests-v2" / "ollama.com" / "x"
    newer.parent.mkdir(parents=True)
    newer.write_text(f'{{"manifests":[{{"digest":"sha256-{digest.hex.upper()}"')
    assert digest.blob_filename not in {path.name for path in store.orphans()}


def test_a_cloud_model_has_no_weights_here(models_dir: Path) -> None:
    config = layer(models_dir, "application/x", b'{"remote_host":"https://ollama.com:443","remote_model":"big"}')
    write_manifest(models_dir, "big:cloud", config, [])
    model = Store(models_dir).find("big:cloud")
    assert model.config.is_remote and model.model_path is None and model.context_length is None


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "models"
    path.write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        open_store(path)


def test_a_path_given_wins_over_the_environment(tmp_path: Path) -> None:
    store = open_store(tmp_path / "mine", environ={"OLLAMA_MODELS": str(tmp_path / "theirs")})
    assert store.models_dir == tmp_path / "mine"


def test_eighty_models_are_listed_without_opening_their_weights(models_dir: Path, shared_gguf: Path) -> None:
    content = shared_gguf.read_bytes()
    for number in range(80):
        install_model(models_dir, f"m{number}", content)
    store = Store(models_dir)
    assert {model.context_length for model in store.models()} == {512}
    blob = store.find("m1").model_path
    assert blob
    blob.write_bytes(content[: 1 << 12])  # the header's start is all that a listing reads
    assert {model.context_length for model in store.models()} == {512}
    assert len({parse_name(f"m{n}") for n in range(80)} & set(store.names())) == 80
