"""Removing and copying: what others need stays, what nobody needs goes."""

import json
import os
import time
from pathlib import Path

import pytest
from tiny_store import install_model, layer, manifest_path, snapshot, write_manifest

from ollama_forge.errors import ExistsError, NameInvalidError, NotFoundError
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import digest_of, parse_digest
from ollama_forge.store.discard import copy_model, discard_unused, is_pruning_allowed, remove_model
from ollama_forge.store.stage import STAGE_PREFIX
from ollama_forge.store.verify import verify_store

GGUF = b"weights"
OLD = 1_600_000_000


@pytest.fixture
def store(models_dir: Path) -> Store:
    install_model(models_dir, "one", GGUF, system="first")
    install_model(models_dir, "bob/two".join(["registry.ollama.ai/", "/x"]), GGUF, system="second")
    return Store(models_dir)


def test_a_removed_model_takes_only_its_own_blobs_along(store: Store) -> None:
    model = store.find("one")
    removed = remove_model(store, "ONE")
    assert removed.name.display == "one:latest"
    assert removed.discarded.removed == (digest_of(b"first"),)
    assert set(removed.discarded.kept) == {part.digest for part in model.manifest.all_layers} - {digest_of(b"first")}
    assert removed.discarded.freed_bytes == 5
    assert not (store.manifests_dir / "registry.ollama.ai" / "library").exists()
    assert verify_store(store).is_whole and verify_store(store).orphans == ()
    remove_model(store, "bob/two:x")
    assert list(store.blobs.blobs_dir.iterdir()) == []
    assert store.manifests_dir.is_dir()


def test_a_model_that_is_not_there_cannot_be_removed(store: Store, models_dir: Path) -> None:
    before = snapshot(models_dir)
    with pytest.raises(NotFoundError):
        remove_model(store, "three")
    with pytest.raises(NameInvalidError):
        remove_model(store, "../../x")
    assert snapshot(models_dir) == before


def test_a_broken_model_can_be_removed(store: Store, models_dir: Path) -> None:
    manifest_path(models_dir, "one").write_text('{"layers":[{"digest":"sha256:' + digest_of(b"first").hex)
    os.utime(store.blobs.path(digest_of(b"first")), (OLD, OLD))
    assert remove_model(store, "one").discarded.removed == (digest_of(b"first"),)
    assert [name.display for name in store.names()] == ["bob/two:x"]


def test_a_hostile_manifest_deletes_nothing_outside(store: Store, models_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    hostile = {"mediaType": "x", "digest": "sha256:../../victim", "size": 1}
    write_manifest(models_dir, "evil", hostile, [hostile, {**hostile, "digest": str(victim)}])
    remove_model(store, "evil")
    assert victim.read_text() == "mine"


def test_a_copy_shares_everything_and_is_the_same_model(store: Store) -> None:
    before = {path.name for path in store.blobs.blobs_dir.iterdir()}
    copied = copy_model(store, "one", "copies/Mine:v1")
    assert copied.digest == store.find("one").digest
    assert {path.name for path in store.blobs.blobs_dir.iterdir()} == before
    with pytest.raises(ExistsError):
        copy_model(store, "bob/two:x", "copies/mine:v1")
    replaced = copy_model(store, "bob/two:x", "copies/mine:v1", overwrite=True)
    assert replaced.name.display == "copies/Mine:v1" and replaced.system == "second"
    with pytest.raises(NameInvalidError):
        copy_model(store, "one", "x:cloud")


def test_a_blob_that_another_process_holds_is_kept(store: Store, models_dir: Path) -> None:
    loose, _ = parse_digest(str(layer(models_dir, "system", b"loose")["digest"])), None
    with store.blobs.stage() as staged:
        (staged.path.parent / loose.blob_filename).touch()
        assert discard_unused(store, [loose], untouched_since=time.time()).kept == (loose,)
    assert discard_unused(store, [loose], untouched_since=time.time()).removed == (loose,)


@pytest.mark.parametrize(
    ("age_seconds", "brought_seconds_ago", "goes"),
    [(10, 0, True), (10, 600, False), (4000, 5000, True), (600, 600, True), (599, 600, True), (500, 600, False)],
)
def test_a_blob_renewed_since_is_kept_for_an_hour(
    store: Store, models_dir: Path, age_seconds: int, brought_seconds_ago: int, goes: bool
) -> None:
    loose = parse_digest(str(layer(models_dir, "system", b"loose")["digest"]))
    now = time.time()
    os.utime(store.blobs.path(loose), (now - age_seconds,) * 2)
    discarded = discard_unused(store, [loose], untouched_since=now - brought_seconds_ago)
    assert (discarded.removed == (loose,)) is goes


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("", True), ("0", True), ("false", True), (" 'F' ", True), ("1", False), ("true", False), ("yes", False)],
)
def test_ollama_noprune_is_read_as_ollama_reads_it(text: str, allowed: bool) -> None:
    assert is_pruning_allowed({"OLLAMA_NOPRUNE": text}) is allowed


def test_a_stage_is_no_model_to_a_server_that_lists(store: Store, models_dir: Path) -> None:
    with store.blobs.stage() as staged:
        staged.write(b"x")
        listed = [path for path in models_dir.glob("manifests/*/*/*/*") if path.is_file()]
        assert len(listed) == 2
        assert staged.path.parent.parent == models_dir and staged.path.parent.name.startswith(STAGE_PREFIX)
        assert all(json.loads(path.read_text())["schemaVersion"] == 2 for path in listed)
