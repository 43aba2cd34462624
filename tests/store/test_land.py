"""Landing: a checked model under its name, or the store as it was."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf, write_tiny_lora
from tiny_store import DEFAULT_CONFIG, install_model, layer, manifest_path, snapshot

from ollama_forge.errors import (
    AdapterError,
    CheckError,
    EngineError,
    ExistsError,
    FormatError,
    GGUFError,
    NameInvalidError,
    NotFoundError,
    StoreError,
)
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import digest_of
from ollama_forge.store.installed import InstalledModel
from ollama_forge.store.land import Landed, land, plan_landing, require_free_name, roll_back
from ollama_forge.store.landed import Ingredients
from ollama_forge.store.modelfile import Message, Modelfile
from ollama_forge.store.verify import verify_store

OLD = 1_600_000_000


@pytest.fixture
def store(models_dir: Path) -> Store:
    return Store(models_dir)


def media_types(store: Store, name: str) -> list[str]:
    return [part.media_type.rpartition(".")[2] for part in store.find(name).manifest.layers]


def test_a_gguf_lands_as_ollama_itself_would_store_it(store: Store, gguf: Path) -> None:
    landed = land(store, "tiny", model=gguf)
    path = store.models_dir / "manifests/registry.ollama.ai/library/tiny/latest"
    document = json.loads(path.read_bytes())
    digest = f"sha256:{hashlib.sha256(gguf.read_bytes()).hexdigest()}"
    assert document["layers"] == [
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest, "size": gguf.stat().st_size}
    ]
    config = json.loads(store.blobs.read_bytes(store.find("tiny").manifest.all_layers[-1].digest))
    assert config == {**DEFAULT_CONFIG, "model_type": "41K"}
    assert landed.name.display == "tiny:latest"
    assert landed.digest == hashlib.sha256(path.read_bytes()).hexdigest() == store.find("tiny").digest
    assert verify_store(store).is_whole


def test_only_kilobytes_are_written_for_a_file_on_the_same_disk(store: Store, gguf: Path) -> None:
    landed = land(store, "tiny", model=gguf)
    assert landed.shared_bytes == gguf.stat().st_size
    assert landed.written_bytes < 1000
    assert sum(layer.size_bytes for layer in store.find("tiny").manifest.all_layers) == store.find("tiny").size_bytes


def test_a_model_made_from_another_shares_its_weights_and_says_so(store: Store, gguf: Path) -> None:
    land(store, "base", model=gguf)
    landed = land(store, "mine", model=store.find("base"), modelfile=Modelfile(system="Be kind."))
    assert landed.written_bytes < 2000
    assert landed.shared_bytes > gguf.stat().st_size
    base, mine = store.find("base"), store.find("mine")
    assert mine.model_path == base.model_path
    assert mine.manifest.layers[0].from_name == "base:latest"
    assert mine.system == "Be kind."
    assert base.system is None


def test_layers_come_in_ollamas_order(store: Store, gguf: Path, shared_lora: Path) -> None:
    wishes = Modelfile(
        template="t",
        system="s",
        licenses=("l1", "l2"),
        parameters=(("seed", 1),),
        messages=(Message("user", "hi"),),
        renderer="r",
        parser="p",
        requires="0.14.0",
    )
    land(store, "m", model=gguf, modelfile=wishes, adapters=[shared_lora])
    assert media_types(store, "m") == [
        "model", "adapter", "template", "system", "license", "license", "params", "messages",
    ]  # fmt: skip
    model = store.find("m")
    assert (model.config.renderer, model.config.parser, model.config.requires) == ("r", "p", "0.14.0")
    assert model.modelfile("x") == Modelfile(
        **{**wishes.__dict__, "sources": ("x",), "adapters": (str(model.adapters[0]),)}
    )


def test_wishes_are_merged_with_what_the_base_has(store: Store, shared_gguf: Path) -> None:
    install_model(
        store.models_dir,
        "base",
        shared_gguf.read_bytes(),
        template="old template",
        system="old system",
        params={"temperature": 1, "stop": ["a"], "odd": "kept"},
        messages=[{"role": "user", "content": "old"}],
        licenses=["MIT"],
        config={"renderer": "r", "rootfs": {"diff_ids": []}, "new_field": 1},
    )
    wishes = Modelfile(parameters=(("seed", 5), ("temperature", 0.5)), licenses=("MIT", "Apache"), system="")
    land(store, "mine", model=store.find("base"), modelfile=wishes)
    mine = store.find("mine")
    assert mine.parameters == (("odd", "kept"), ("seed", 5), ("stop", ("a",)), ("temperature", 0.5))
    assert mine.licenses == ("MIT", "Apache")
    assert mine.template == "old template"
    assert mine.system is None
    assert mine.messages == (Message("user", "old"),)
    assert mine.config.renderer == "r" and json.loads(mine.config.extra_json) == {"new_field": 1}


def test_an_empty_list_of_stops_takes_the_bases_away(store: Store, shared_gguf: Path) -> None:
    install_model(store.models_dir, "base", shared_gguf.read_bytes(), params={"stop": ["a"]})
    land(store, "mine", model=store.find("base"), modelfile=Modelfile(parameters=(("stop", ()),)))
    assert store.find("mine").parameters == ()
    assert media_types(store, "mine") == ["model"]


def test_adapters_are_stacked_behind_the_bases_or_replace_them(store: Store, gguf: Path, tmp_path: Path) -> None:
    loras = [write_tiny_lora(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2)]
    land(store, "one", model=gguf, adapters=[loras[0]])
    land(store, "two", model=store.find("one"), adapters=[loras[1]])
    land(store, "other", model=store.find("one"), adapters=[loras[1]], keeps_adapters=False)
    assert [path.read_bytes() for path in store.find("two").adapters] == [path.read_bytes() for path in loras]
    assert [path.read_bytes() for path in store.find("other").adapters] == [loras[1].read_bytes()]


def test_the_same_landing_twice_succeeds_and_is_the_same(store: Store, gguf: Path) -> None:
    first = land(store, "tiny", model=gguf, modelfile=Modelfile(system="s"))
    again = land(store, "tiny", model=gguf, modelfile=Modelfile(system="s"))
    assert again.digest == first.digest
    assert again.written == ()
    assert again.discarded.removed == ()
    assert verify_store(store).is_whole


def test_two_stores_get_the_same_bytes(tmp_path: Path, gguf: Path) -> None:
    wishes = Modelfile(parameters=(("stop", ("b", "a")), ("seed", 1)), messages=(Message("user", "ü<>"),))
    trees = []
    for name in ("a", "b"):
        store = Store(tmp_path / name)
        land(store, "m", model=gguf, modelfile=wishes)
        trees.append(snapshot(store.models_dir))
    assert trees[0] == trees[1]


def test_texts_have_the_digests_that_ollamas_server_gives_them(store: Store, gguf: Path) -> None:
    wishes = Modelfile(parameters=(("stop", ("<x>",)), ("temperature", 0.7)), messages=(Message("user", "hi"),))
    landed = land(store, "m", model=gguf, modelfile=wishes)
    assert digest_of(b'{"stop":["\\u003cx\\u003e"],"temperature":0.7}\n') in landed.written
    assert digest_of(b'[{"role":"user","content":"hi"}]\n') in landed.written


def test_an_existing_name_is_not_taken_without_being_asked(store: Store, gguf: Path, tmp_path: Path) -> None:
    land(store, "tiny", model=gguf)
    before = snapshot(store.models_dir)
    with pytest.raises(ExistsError) as refused:
        land(store, "Tiny", model=write_tiny_gguf(tmp_path / "other.gguf", seed=9))
    assert "--force" in refused.value.next
    assert snapshot(store.models_dir) == before
    with pytest.raises(ExistsError):
        require_free_name(store, "TINY", overwrite=False)
    assert require_free_name(store, "TINY", overwrite=True).display == "tiny:latest"


def test_names_that_differ_only_in_case_become_one(store: Store, gguf: Path) -> None:
    land(store, "bob/Tiny:Q4", model=gguf)
    landed = land(store, "Bob/tiny:q4", model=gguf, modelfile=Modelfile(system="s"), overwrite=True)
    assert landed.name.display == "bob/Tiny:Q4"
    assert [name.display for name in store.names()] == ["bob/Tiny:Q4"]


def test_replacing_frees_what_only_the_old_one_used(store: Store, gguf: Path, tmp_path: Path) -> None:
    land(store, "tiny", model=gguf, modelfile=Modelfile(system="shared text"))
    land(store, "neighbour", model=store.find("tiny"))
    old_blob = store.find("tiny").model_path
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=9)
    land(store, "tiny", model=other, modelfile=Modelfile(system="shared text"), overwrite=True)
    assert old_blob and old_blob.exists()
    land(store, "neighbour", model=other, overwrite=True)
    assert not old_blob.exists()
    report = verify_store(store)
    assert report.is_whole and report.orphans == ()


def test_a_blob_that_somebody_renewed_meanwhile_is_not_freed(store: Store, gguf: Path, tmp_path: Path) -> None:
    land(store, "tiny", model=gguf)
    path = store.find("tiny").model_path
    assert path
    os.utime(store.manifest_path(store.find("tiny").name), (time.time() - 600,) * 2)
    store.blobs.renew(store.find("tiny").manifest.layers[0].digest)  # as Ollama's create does with a blob it will use
    landed = land(store, "tiny", model=write_tiny_gguf(tmp_path / "o.gguf", seed=9), overwrite=True)
    assert path.exists()
    assert store.find("tiny").manifest.layers[0].digest not in landed.discarded.kept
    os.utime(path, (OLD, OLD))
    assert path in verify_store(store).orphans


def test_a_blob_that_a_broken_manifest_names_is_not_freed(store: Store, gguf: Path, tmp_path: Path) -> None:
    land(store, "tiny", model=gguf)
    path = store.find("tiny").model_path
    assert path
    manifest_path(store.models_dir, "tiny:broken").write_text('{"layers":[{"digest":"' + path.name.upper().lower())
    land(store, "tiny", model=write_tiny_gguf(tmp_path / "o.gguf", seed=9), overwrite=True)
    assert path.exists()


def test_ollama_noprune_frees_nothing(
    store: Store, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_NOPRUNE", "yes")
    land(store, "tiny", model=gguf)
    land(store, "tiny", model=write_tiny_gguf(tmp_path / "o.gguf", seed=9), overwrite=True)
    assert len(verify_store(store).orphans) == 1


@pytest.mark.parametrize("keep", [True, False])
def test_a_replaced_model_can_be_had_back(store: Store, gguf: Path, tmp_path: Path, keep: bool) -> None:
    land(store, "tiny", model=gguf, modelfile=Modelfile(system="old", parameters=(("seed", 1),)))
    before = snapshot(store.models_dir)
    model = write_tiny_gguf(tmp_path / "o.gguf", seed=9) if keep else store.find("tiny")
    landed = land(store, "tiny", model=model, modelfile=Modelfile(system="new"), overwrite=True, keep_replaced=keep)
    assert landed.has_replaced
    assert store.find("tiny").system == "new"
    roll_back(landed)
    assert snapshot(store.models_dir) == before


def test_a_new_model_can_be_taken_back_without_a_trace(store: Store, gguf: Path) -> None:
    land(store, "base", model=gguf)
    before = snapshot(store.models_dir)
    roll_back(land(store, "bob/mine:x", model=store.find("base"), modelfile=Modelfile(system="s")))
    assert snapshot(store.models_dir) == before


def test_taking_back_does_not_undo_somebody_elses_work(store: Store, gguf: Path) -> None:
    landed = land(store, "tiny", model=gguf)
    land(store, "tiny", model=store.find("tiny"), modelfile=Modelfile(system="theirs"), overwrite=True)
    with pytest.raises(StoreError, match="changed since"):
        roll_back(landed)
    assert store.find("tiny").system == "theirs"


def test_taking_back_without_the_old_weights_is_refused_and_changes_nothing(
    store: Store, gguf: Path, tmp_path: Path
) -> None:
    gguf.write_bytes(gguf.read_bytes() + b"\0" * (2 << 20))
    land(store, "tiny", model=gguf)
    landed = land(store, "tiny", model=write_tiny_gguf(tmp_path / "o.gguf", seed=9), overwrite=True)
    digest = store.find("tiny").digest
    with pytest.raises(StoreError, match="is gone"):
        roll_back(landed)
    assert store.find("tiny").digest == digest


def test_the_check_sees_the_finished_model_before_anyone_else(store: Store, gguf: Path, shared_lora: Path) -> None:
    seen: list[InstalledModel] = []

    def check(model: InstalledModel) -> dict[str, bool]:
        assert model.model_path and model.model_path.read_bytes() == gguf.read_bytes()
        assert model.system == "s" and model.context_length == 512 and len(model.adapters) == 1
        assert store.names() == []
        seen.append(model)
        return {"loaded": True}

    landed = land(store, "m", model=gguf, modelfile=Modelfile(system="s"), adapters=[shared_lora], check=check)
    assert landed.check == {"loaded": True}
    assert seen[0].digest == landed.digest
    assert seen[0].manifest == store.find("m").manifest


@pytest.mark.parametrize(
    "failure", [CheckError("it babbles"), EngineError("it babbles", next="Look at it."), KeyboardInterrupt()]
)
@pytest.mark.parametrize("replacing", [True, False])
def test_a_failed_check_leaves_the_store_as_it_was(
    store: Store, gguf: Path, tmp_path: Path, failure: BaseException, replacing: bool
) -> None:
    land(store, "tiny" if replacing else "base", model=gguf, modelfile=Modelfile(system="old"))
    before = snapshot(store.models_dir)

    def check(_: InstalledModel) -> None:
        raise failure

    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else CheckError
    with pytest.raises(expected) as raised:
        land(
            store,
            "tiny",
            model=write_tiny_gguf(tmp_path / "o.gguf", seed=9),
            modelfile=Modelfile(system="new"),
            overwrite=True,
            check=check,
        )
    if isinstance(raised.value, CheckError):
        assert "it babbles" in raised.value.what
    assert snapshot(store.models_dir) == before


def test_a_blob_that_vanishes_during_the_landing_comes_back(store: Store, gguf: Path) -> None:
    def prune(model: InstalledModel) -> None:
        for path in (store.models_dir / "blobs").iterdir():
            path.unlink()  # what a starting server without a grace period does to blobs that no manifest names

    land(store, "tiny", model=gguf, modelfile=Modelfile(system="s"), check=prune)
    assert verify_store(store).is_whole
    assert store.find("tiny").system == "s"


def test_a_staged_model_is_not_read_again_and_goes_when_its_check_fails(store: Store, gguf: Path) -> None:
    def check(_: InstalledModel) -> None:
        raise CheckError("no")

    with pytest.raises(CheckError), store.blobs.stage() as staged:
        staged.write(gguf.read_bytes())
        land(store, "tiny", model=staged, check=check)
    assert list((store.models_dir / "blobs").iterdir()) == []
    with store.blobs.stage() as staged:
        staged.write(gguf.read_bytes())
        landed = land(store, "tiny", model=staged)
    assert landed.written_bytes > gguf.stat().st_size
    assert verify_store(store).is_whole


def test_a_blob_that_is_in_the_store_can_be_landed_by_its_digest(store: Store, gguf: Path) -> None:
    digest = store.blobs.add_file(gguf)
    os.utime(store.blobs.path(digest), (OLD, OLD))
    landed = land(store, "tiny", model=digest)
    assert landed.shared == (digest,)
    assert store.blobs.path(digest).stat().st_mtime > OLD
    with pytest.raises(StoreError, match="missing"):
        land(store, "x", model=digest_of(b"nothing"))


def test_a_plan_says_what_landing_then_does_and_writes_nothing(store: Store, gguf: Path, tmp_path: Path) -> None:
    wishes = Modelfile(system="s", parameters=(("seed", 1),))
    before = snapshot(tmp_path)
    plan = plan_landing(store, "tiny", Ingredients(gguf, wishes))
    assert snapshot(tmp_path) == before
    landed = land(store, "tiny", model=gguf, modelfile=wishes)
    assert (plan.name, plan.digest, plan.replaces) == (landed.name, landed.digest, False)
    again = plan_landing(store, "mine", Ingredients(store.find("tiny"), Modelfile(system="other")))
    landed = land(store, "mine", model=store.find("tiny"), modelfile=Modelfile(system="other"))
    assert (again.digest, again.written_bytes) == (landed.digest, landed.written_bytes)


@pytest.mark.parametrize(
    "name",
    ["../../x", "/etc/passwd", "a/../../b", "a\0b", "a:../../x", "m" * 81, "", "a:cloud", "a:local", "nul", "a:b."],
)
def test_a_name_that_cannot_be_written_is_refused_before_any_path_is_made(
    store: Store, gguf: Path, tmp_path: Path, name: str
) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(NameInvalidError):
        land(store, name, model=gguf)
    with pytest.raises(NameInvalidError):
        plan_landing(store, name, Ingredients(gguf))
    assert snapshot(tmp_path) == before


def broken_files(tmp_path: Path, gguf: Path) -> dict[str, Path]:
    content = gguf.read_bytes()
    contents = {"empty": b"", "text": b"hello" * 20, "truncated": content[:-1000], "zip": b"PK\x03\x04" + b"\0" * 60}
    for name, raw in contents.items():
        (tmp_path / f"{name}.gguf").write_bytes(raw)
    return {name: tmp_path / f"{name}.gguf" for name in [*contents, "missing"]}


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "zip", "missing"])
def test_a_file_that_is_no_model_is_named_and_leaves_no_trace(
    store: Store, gguf: Path, tmp_path: Path, kind: str
) -> None:
    path = broken_files(tmp_path, gguf)[kind]
    before = snapshot(tmp_path)
    with pytest.raises((FormatError, NotFoundError)) as refused:
        land(store, "x", model=path)
    assert str(path) in refused.value.what and refused.value.next
    assert snapshot(tmp_path) == before


def test_an_adapter_is_no_model_and_a_model_is_no_adapter(store: Store, gguf: Path, shared_lora: Path) -> None:
    with pytest.raises(GGUFError, match="is an adapter"):
        land(store, "x", model=shared_lora)
    with pytest.raises(AdapterError, match="not a LoRA"):
        land(store, "x", model=gguf, adapters=[gguf])
    with pytest.raises(GGUFError, match="not a projector"):
        land(store, "x", model=gguf, projector=gguf)
    assert store.names() == [] and store.orphans() == []


@pytest.mark.parametrize("filename", ["tiny-Q4_K_M.gguf", "tiny.q8_0.gguf", "tiny-iq4_xs.gguf"])
def test_a_file_called_quantized_that_is_not_is_refused(store: Store, gguf: Path, filename: str) -> None:
    path = gguf.rename(gguf.with_name(filename))
    with pytest.raises(GGUFError, match="is called") as refused:
        land(store, "x", model=path)
    assert filename in refused.value.what and "ollama-forge quantize" in refused.value.next
    assert store.names() == [] and store.orphans() == []


def test_a_header_that_claims_a_quantization_is_not_believed(store: Store, gguf: Path) -> None:
    content = bytearray(gguf.read_bytes())
    key = b"general.file_type"
    at = content.index(key) + len(key) + 4
    content[at : at + 4] = (15).to_bytes(4, "little")
    gguf.write_bytes(content)
    with pytest.raises(GGUFError, match="is called Q4_K_M, and its tensors are F32"):
        land(store, "x", model=gguf)


@pytest.mark.parametrize("filename", ["tiny-f16.gguf", "q4ne.gguf", "tinyQ4_K_M.gguf", "tiny-v1_4.gguf"])
def test_a_name_that_only_looks_like_a_quantization_is_fine(store: Store, gguf: Path, filename: str) -> None:
    land(store, "x", model=gguf.rename(gguf.with_name(filename)))


def test_an_adapter_of_another_model_is_refused(store: Store, shared_lora: Path, tmp_path: Path) -> None:
    qwen = write_tiny_gguf(tmp_path / "qwen.gguf", architecture="qwen2")
    with pytest.raises(AdapterError, match="'llama' models"):
        land(store, "x", model=qwen, adapters=[shared_lora])


def test_a_base_whose_blob_is_gone_is_told(store: Store, gguf: Path) -> None:
    land(store, "base", model=gguf)
    base = store.find("base")
    assert base.model_path
    base.model_path.unlink()
    with pytest.raises(StoreError, match="missing") as refused:
        land(store, "mine", model=base, modelfile=Modelfile(system="s"))
    assert "verify" in refused.value.next
    assert [name.display for name in store.names()] == ["base:latest"]


def test_a_gemma_4_gets_the_renderer_and_stop_that_ollama_gives_it(store: Store, tmp_path: Path) -> None:
    gemma = write_tiny_gguf(tmp_path / "g.gguf", architecture="gemma4")
    land(store, "g", model=gemma)
    land(store, "own", model=gemma, modelfile=Modelfile(parameters=(("stop", ("x",)),), renderer="other"))
    assert store.find("g").parameters == (("stop", ("<turn|>",)),)
    assert (store.find("g").config.renderer, store.find("g").config.parser) == ("gemma4", "gemma4")
    assert store.find("own").parameters == (("stop", ("x",)),)
    assert (store.find("own").config.renderer, store.find("own").config.parser) == ("other", "gemma4")


def test_a_manifest_folder_that_is_pruned_meanwhile_is_made_again(store: Store, gguf: Path) -> None:
    landed = land(store, "a/b:c", model=gguf)
    roll_back(landed)
    assert not (store.models_dir / "manifests/registry.ollama.ai").exists()
    land(store, "a/b:c", model=gguf)
    assert store.find("a/b:c")


PARALLEL = """
import sys
from pathlib import Path
from ollama_forge.store.catalog import Store
from ollama_forge.store.land import land
from ollama_forge.store.modelfile import Modelfile
store = Store(Path(sys.argv[1]))
for turn in range(6):
    wishes = Modelfile(system=f"{sys.argv[4]} {turn}")
    land(store, sys.argv[3], model=Path(sys.argv[2]), modelfile=wishes, overwrite=True)
"""


@pytest.mark.parametrize("names", [("one", "two", "three"), ("same", "same", "same")])
def test_processes_that_land_at_once_all_succeed(store: Store, gguf: Path, names: tuple[str, ...]) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PARALLEL, str(store.models_dir), str(gguf), name, str(index)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, name in enumerate(names)
    ]
    for child in children:
        _, stderr = child.communicate(timeout=120)
        assert child.returncode == 0, stderr
    assert verify_store(store).is_whole
    assert {name.model for name in store.names()} == set(names)
    for name in set(names):
        assert str(store.find(name).system).endswith(" 5")


def test_a_landing_is_a_value(store: Store, gguf: Path) -> None:
    landed = land(store, "tiny", model=gguf)
    assert isinstance(landed, Landed)
    with pytest.raises(AttributeError):
        landed.digest = "x"  # type: ignore[misc]


def test_a_vision_models_projector_is_carried_along(store: Store, shared_gguf: Path) -> None:
    path = install_model(store.models_dir, "vision", shared_gguf.read_bytes())
    document = json.loads(path.read_text())
    document["layers"].append(layer(store.models_dir, "projector", b"a projector"))
    path.write_text(json.dumps(document))
    land(store, "mine", model=store.find("vision"), modelfile=Modelfile(system="s"))
    projector = store.find("mine").projector
    assert projector and projector.read_bytes() == b"a projector"
