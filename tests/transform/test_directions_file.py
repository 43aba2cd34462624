"""Files of directions: what is written is read, and what is something else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ollama_forge.errors import ForgeError, FormatError, UsageError
from ollama_forge.transform.directions import Directions, orthonormal, read_directions, write_directions


def some(n_layers: int = 3, n_directions: int = 2, hidden: int = 8) -> Directions:
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((n_layers, n_directions, hidden)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    means = draw.standard_normal((n_layers, hidden)).astype(np.float32)
    return Directions(vectors, 1, True, means, {"method": "mean", "note": "ünïcode"})


def test_what_is_written_is_read_and_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    directions = some()
    write_directions(path, directions)
    found = read_directions(path)
    assert np.array_equal(found.vectors, directions.vectors)
    assert np.array_equal(found.harmless_means, directions.harmless_means)
    assert (found.best_layer, found.per_layer, dict(found.facts)) == (1, True, dict(directions.facts))
    assert np.array_equal(load_file(path)["directions"], directions.vectors)
    write_directions(tmp_path / "again.safetensors", found)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def changed(path: Path, **metadata: str) -> Path:
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "ollama-forge directions 1", "best_layer": "1", **metadata})
    return path


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_directions(path, some())
    assert read_directions(changed(path)).best_layer == 1
    for wrong in ({"best_layer": "3"}, {"best_layer": "-1"}, {"best_layer": "one"}, {"format": "pt"}):
        with pytest.raises(FormatError, match="no file of directions"):
            read_directions(changed(path, **wrong))
    tensors = load_file(path)
    metadata = {"format": "ollama-forge directions 1", "best_layer": "1"}
    for name, values in (
        ("directions", tensors["directions"] * 2),
        ("directions", tensors["directions"] * np.float32("nan")),
        ("directions", tensors["directions"][0]),
        ("directions", tensors["directions"].astype(np.float16)),
        ("harmless_means", tensors["harmless_means"][:2]),
        ("harmless_means", tensors["harmless_means"] * np.float32("inf")),
    ):
        save_file({**tensors, name: values}, path, metadata=metadata)
        with pytest.raises(FormatError, match="no file of directions"):
            read_directions(path)
    save_file({"weight": tensors["directions"]}, path, metadata=metadata)
    with pytest.raises(FormatError, match="no tensor 'directions'"):
        read_directions(path)


def test_broken_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    write_directions(path, some())
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:header_end])
    header["directions"]["shape"] = [3, 2, 9]
    forged = json.dumps(header).encode()
    for content in (
        whole[:-4],
        whole[:20],
        b"",
        len(forged).to_bytes(8, "little") + forged + whole[header_end:],
        (1 << 60).to_bytes(8, "little") + whole[8:],
    ):
        path.write_bytes(content)
        with pytest.raises(ForgeError):
            read_directions(path)


def test_a_basis_is_orthonormal_and_spans_what_it_was_made_of() -> None:
    draw = np.random.default_rng(1)
    rows = draw.standard_normal((3, 16))
    basis = orthonormal(np.concatenate([rows, rows[:1] * 2, np.zeros((1, 16))]))
    assert basis.shape == (3, 16)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(rows @ basis.T @ basis, rows, atol=1e-5)
    with pytest.raises(UsageError, match="zero"):
        orthonormal(np.zeros((2, 4)))
    with pytest.raises(UsageError):
        orthonormal(np.full((1, 4), np.nan))


def test_layers_that_are_not_there_and_missing_means_are_errors() -> None:
    directions = some()
    for layer in (-1, 2.5, 3, float("nan")):
        with pytest.raises(UsageError, match="no layer"):
            directions.at(layer)
    bare = Directions(directions.vectors, 0)
    with pytest.raises(UsageError, match="no mean"):
        bare.at(0, projected=True)
    assert abs(directions.at(1, projected=True) @ directions.harmless_means[1]).max() < 1e-5
