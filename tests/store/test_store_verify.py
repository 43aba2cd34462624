"""Verify: every way in which a store can be wrong is found, named, and left alone."""

import json
import os
from pathlib import Path

import pytest
from tiny_store import install_model, layer, manifest_path, snapshot, write_blob, write_manifest

from ollama_forge.errors import NotFoundError
from ollama_forge.store.catalog import Store
from ollama_forge.store.digest import digest_of
from ollama_forge.store.verify import StoreReport, count_bytes, verify_store

GGUF = b"weights " * 100
OLD = 1_600_000_000


@pytest.fixture
def store(models_dir: Path) -> Store:
    install_model(models_dir, "good", GGUF, system="s", params={"seed": 1}, messages=[{"role": "user", "content": "x"}])
    return Store(models_dir)


def kinds(report: StoreReport) -> list[str]:
    return sorted(problem.kind for problem in report.problems)


def test_a_whole_store_is_whole_and_every_byte_was_read(store: Store) -> None:
    seen: list[int] = []
    report = verify_store(store, advance=seen.append)
    assert report.is_whole and report.orphans == () and report.leftovers == ()
    assert [name.display for name in report.models] == ["good:latest"]
    assert report.hashed_bytes == sum(seen) == count_bytes(store) == store.find("good").size_bytes
    assert report.n_blobs == 5


def test_an_empty_and_a_missing_store_are_whole(tmp_path: Path) -> None:
    assert verify_store(Store(tmp_path / "none")).is_whole
    assert not (tmp_path / "none").exists()


def test_looking_changes_nothing(store: Store, models_dir: Path) -> None:
    before = snapshot(models_dir)
    verify_store(store)
    assert snapshot(models_dir) == before


def test_a_changed_byte_is_found_and_its_model_named(store: Store) -> None:
    path = store.blobs.path(digest_of(GGUF))
    path.write_bytes(b"W" + GGUF[1:])
    report = verify_store(store)
    assert kinds(report) == ["content"]
    assert report.problems[0].path == path and "good:latest" in report.problems[0].what
    assert verify_store(store, quick=True).is_whole


def test_a_truncated_blob_is_found_without_reading_it(store: Store) -> None:
    store.blobs.path(digest_of(GGUF)).write_bytes(GGUF[:-1])
    seen: list[int] = []
    report = verify_store(store, quick=True, advance=seen.append)
    assert kinds(report) == ["size"] and seen == [] and report.hashed_bytes == 0
    assert kinds(verify_store(store)) == ["content", "size"]


def test_a_missing_blob_is_found(store: Store) -> None:
    store.blobs.path(digest_of(b"s")).unlink()
    report = verify_store(store)
    assert kinds(report) == ["missing"] and digest_of(b"s").hex in str(report.problems[0].path)


def test_bad_manifests_are_found(store: Store, models_dir: Path) -> None:
    tree = models_dir / "manifests/registry.ollama.ai/library/good"
    (tree / "broken").write_text("{")
    (tree / ".tmp").write_text("{}")
    (tree / "dangling").symlink_to("nowhere")
    os.utime(tree / "broken", (OLD, OLD))
    assert kinds(verify_store(store)) == ["dangling", "manifest", "name"]


def test_a_size_that_lies_is_found(store: Store, models_dir: Path) -> None:
    path = manifest_path(models_dir, "good")
    path.write_text(path.read_text().replace(f'"size":{len(GGUF)}', '"size":7'))
    report = verify_store(store)
    assert kinds(report) == ["size"] and "says 7" in report.problems[0].what


def test_a_digest_that_ollama_would_take_for_unused_is_found(store: Store, models_dir: Path) -> None:
    path = manifest_path(models_dir, "good")
    digest = digest_of(GGUF)
    path.write_text(path.read_text().replace(str(digest), f"sha256-{digest.hex}"))
    assert kinds(verify_store(store)) == ["spelling"]


def test_params_and_messages_that_the_server_refuses_are_found(store: Store, models_dir: Path) -> None:
    install_model(models_dir, "p", GGUF, params={"stop": "not a list"})
    parts = [layer(models_dir, "model", GGUF), layer(models_dir, "messages", b'{"role": 1}')]
    write_manifest(models_dir, "m", {"digest": ""}, parts)
    assert kinds(verify_store(store)) == ["texts", "texts"]


def test_two_names_that_are_one_to_ollama_are_found(store: Store, models_dir: Path) -> None:
    install_model(models_dir, "Good", GGUF)
    assert kinds(verify_store(store)) == ["case"]


def test_orphans_downloads_and_leftovers_are_listed_and_are_no_problem(store: Store, models_dir: Path) -> None:
    write_blob(models_dir, b"nobody needs me")
    blobs = models_dir / "blobs"
    for name in (f"sha256-{'a' * 64}-partial", f"sha256-{'a' * 64}-partial-0", "COPY123", f"sha256-{'A' * 64}"):
        (blobs / name).write_bytes(b"x")
    stage = models_dir / ".ollama-forge-stage-00000000-1-00000000"
    stage.mkdir()
    os.utime(stage, (OLD, OLD))
    report = verify_store(store)
    assert report.is_whole
    assert [path.name for path in report.orphans] == [digest_of(b"nobody needs me").blob_filename]
    assert report.orphan_bytes == 15
    assert len(report.leftovers) == 4
    assert report.stages == (stage,)


def test_some_models_can_be_looked_at_alone(store: Store, models_dir: Path) -> None:
    install_model(models_dir, "bad", b"other weights")
    store.blobs.path(digest_of(b"other weights")).write_bytes(b"x")
    write_blob(models_dir, b"orphan")
    assert verify_store(store, ["GOOD"]).is_whole
    assert verify_store(store, ["GOOD"]).orphans == ()
    assert kinds(verify_store(store, ["bad"])) == ["content", "size"]
    with pytest.raises(NotFoundError):
        verify_store(store, ["nobody"])


def test_a_model_without_its_config_is_told_not_raised(store: Store, models_dir: Path) -> None:
    document = json.loads(manifest_path(models_dir, "good").read_text())
    (models_dir / "blobs" / document["config"]["digest"].replace(":", "-")).unlink()
    assert kinds(verify_store(store, ["good"])) == ["config"]
    assert kinds(verify_store(store)) == ["config"]
    assert verify_store(store).orphans == ()
