"""A model with a weight that is no number is refused wherever it comes in, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge, forge_json

from ollama_forge.gguf.reader import open_gguf

PATTERNS = {"nan": 0x7FC0, "-nan": 0xFFC0, "inf": 0x7F80, "-inf": 0xFF80}  # BF16


def spoil(path: Path, offset: int, pattern: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(struct.pack("<H", pattern))


def spoiled_folder(folder: Path, tensor: str, pattern: int) -> Path:
    """The demo model with one weight overwritten."""
    shutil.copytree(DEMO_MODEL, folder)
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    start, stop = json.loads(raw[8 : 8 + size])[tensor]["data_offsets"]
    spoil(weights, 8 + size + (start + stop) // 4 * 2, pattern)
    return folder


@pytest.mark.parametrize("word", PATTERNS)
@pytest.mark.parametrize(
    ("tensor", "named"),
    [
        ("layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("layers.0.self_attn.q_proj", "blk.0.attn_q"),
        ("norm", "output_norm"),
    ],
)
def test_a_folder_is_refused_by_the_tensor_in_any_type(tmp_path: Path, tensor: str, named: str, word: str) -> None:
    folder = spoiled_folder(tmp_path / "model", f"model.{tensor}.weight", PATTERNS[word])
    for options in ((), ("--outtype", "f32"), ("--outtype", "f16"), ("--outtype", "q8_0"), ("--quant", "Q4_K_M")):
        ended = forge("convert", folder, "-o", tmp_path / "out.gguf", *options)
        assert ended.code == 1 and f"{named}.weight" in ended.err and "--tensor-type" not in ended.err
    ended = forge("import", folder, "--name", "x", "--quant", "none", "--no-check", "--store", tmp_path / "store")
    assert ended.code == 1 and f"{named}.weight" in ended.err
    assert not (tmp_path / "out.gguf").exists() and not list((tmp_path / "store").rglob("sha256-*"))


def test_a_ready_file_is_taken_back_by_the_check_which_names_it(tmp_path: Path) -> None:
    gguf, store = tmp_path / "spoiled.gguf", tmp_path / "store"
    forge_json("convert", DEMO_MODEL, "-o", gguf)
    forge_json("import", DEMO_MODEL, "--name", "other", "--store", store, "--no-check")
    with open_gguf(gguf) as file:
        offset = file.tensors["blk.0.ffn_down.weight"].offset
    spoil(gguf, offset, PATTERNS["nan"])
    before = sorted(store.rglob("*"))
    ended = forge("convert", "--gguf", gguf, "--name", "new", "--store", store)
    assert ended.code == 1 and "spoiled.gguf" in ended.err and "NaN" in ended.err and "landed" in ended.err
    assert sorted(store.rglob("*")) == before


def test_what_a_refusal_advises_about_types_exists_on_every_command(tmp_path: Path) -> None:
    words = ("import", DEMO_MODEL, "--name", "x", "--quant", "IQ2_XS", "--store", tmp_path)
    ended = forge(*words)
    assert ended.code == 2 and "Q3_K_M" in ended.err and "--type" not in ended.err
