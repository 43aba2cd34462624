"""Safetensors are read as the format says; whatever lies, leads away or can run code is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forged_safetensors import entry, file_bytes, forged, mutated, valid
from safetensors.numpy import save_file

from ollama_forge.errors import ForgeError, NotFoundError, SafetensorsError, UnsafeFileError, UnsupportedError
from ollama_forge.weights.safetensors import open_safetensors

TENSORS = {
    "b.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
    "a.weight": np.arange(8, dtype=np.float16).reshape(2, 4),
    "c.empty": np.zeros((0, 4), np.float32),
    "d.scalar": np.array(3.5, np.float64),
}


def write_shards(folder: Path, names: tuple[str, ...] = ("model-1.safetensors", "model-2.safetensors")) -> None:
    weight_map = {}
    for number, name in enumerate(names):
        members = dict(list(TENSORS.items())[number :: len(names)])
        save_file(members, folder / name)
        weight_map.update(dict.fromkeys(members, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_are_read_as_they_were_written(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as folder:
        assert list(folder.tensors) == sorted(TENSORS)
        for name, values in TENSORS.items():
            tensor = folder.tensors[name]
            assert tensor.shape == values.shape
            assert bytes(folder.read(name)) == values.tobytes()
            assert b"".join(folder.iter_chunks(name, 7)) == values.tobytes()
            folder.release(name)
            assert bytes(folder.read(name)) == values.tobytes()


def test_shards_are_one_model(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with open_safetensors(tmp_path) as folder:
        assert set(folder.tensors) == set(TENSORS)
        assert len(folder.files) == 2


def test_shards_without_an_index_are_found(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with open_safetensors(tmp_path) as folder:
        assert set(folder.tensors) == set(TENSORS)


def test_one_file_can_be_opened_by_its_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "any name.safetensors")
    with open_safetensors(tmp_path / "any name.safetensors") as file:
        assert set(file.tensors) == set(TENSORS)


def test_a_hugging_face_cache_is_followed_to_its_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(TENSORS, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/1234"))
    with open_safetensors(snapshot) as folder:
        assert set(folder.tensors) == set(TENSORS)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UnsafeFileError, match="outside the model's folder"):
        open_safetensors(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    [
        "../model-1.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        "",
        ".",
        "a\0.safetensors",
        "model.bin",
        "..\\model-1.safetensors",
        "C:model.safetensors",
        "model.safetensors\n",
        "\u202emodel.safetensors",
        "x" * 999,
        ".hidden.safetensors",
        "~/model.safetensors",
    ],
)
def test_a_shard_name_that_is_no_plain_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_shards(tmp_path)
    shutil.copy(tmp_path / "model-2.safetensors", folder)
    index = {"weight_map": {"a.weight": name, "b.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeFileError, match="lies in"):
        open_safetensors(folder)


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "not json", '{"weight_map": 1}']
)
def test_a_broken_index_is_refused(index: str, tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SafetensorsError, match="index"):
        open_safetensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(NotFoundError, match=r"model-2\.safetensors"):
        open_safetensors(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SafetensorsError, match=r"model-2\.safetensors"):
        open_safetensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    save_file({"a.weight": TENSORS["a.weight"]}, tmp_path / "model-2.safetensors")
    with pytest.raises(SafetensorsError, match="in two shards"):
        open_safetensors(tmp_path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "z.weight": "model-1.safetensors"}}))
    with pytest.raises(SafetensorsError, match=r"z\.weight"):
        open_safetensors(tmp_path)
    first = next(iter(index["weight_map"]))
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != first}}))
    with pytest.raises(SafetensorsError, match="does not know"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsafeFileError, match=name) as caught:
            open_safetensors(path)
        assert "safetensors" in caught.value.next


@pytest.mark.parametrize(
    ("name", "error", "word"),
    [
        ("adapter_model.safetensors", NotFoundError, "adapter"),
        ("consolidated.safetensors", UnsupportedError, "consolidated"),
        ("model-q4.gguf", NotFoundError, "GGUF"),
        ("readme.txt", NotFoundError, "no model.safetensors"),
    ],
)
def test_a_folder_with_other_files_says_what_it_holds(
    name: str, error: type[ForgeError], word: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(error) as caught:
        open_safetensors(tmp_path)
    assert word in str(caught.value)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(SafetensorsError, match="not a file"):
        open_safetensors(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_safetensors(tmp_path / "absent.safetensors")


def test_the_error_says_which_numbers_disagree(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes({"a": entry(offsets=(0, 4096), shape=(32, 32))}))
    with pytest.raises(SafetensorsError, match="ends at byte") as caught:
        open_safetensors(path)
    assert f"{path.stat().st_size:,}" in str(caught.value)


def test_forged_headers_are_refused_quickly_and_in_little_memory(tmp_path: Path) -> None:
    cases = [*forged(), *mutated(120)]
    for name, content in cases:
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    (tmp_path / "0-valid.safetensors").write_bytes(valid())
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("forged_safetensors.py")), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    results = {line["name"]: line for line in map(json.loads, child.stdout.splitlines())}
    assert len(results) == len(cases) + 1
    assert results["0-valid"]["outcome"] == "opened"
    honest = {name for name, _ in cases if results[name]["outcome"] == "opened"}
    # A mutation may change a tensor's name or a word of the metadata and leave a valid file.
    assert {name for name in honest if not name.startswith("mutation")} == set()
    assert max(line["megabytes"] for line in results.values()) < 200
