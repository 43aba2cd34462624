"""`imatrix` as a command: its file works in `quantize`, and what cannot be read is refused."""

from __future__ import annotations

from pathlib import Path

import imatrix_sources as sources
import pytest
import tiny_gguf
from command import DEMO_MODEL, forge, forge_json, tree_hash

from ollama_forge.gguf.imatrix import read_imatrix
from ollama_forge.gguf.reader import open_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.write_source(tmp_path_factory.mktemp("imatrix") / "model.gguf", "demo-bf16")


def test_quantize_needs_the_matrix_for_few_bits_and_takes_it(model: Path, tmp_path: Path) -> None:
    words = ("quantize", model, "-o", tmp_path / "small.gguf", "--type", "Q2_K_S")
    refused = forge(*words)
    assert refused.code == 2
    assert "ollama-forge imatrix REF -o imatrix.gguf" in refused.err
    made = forge_json("imatrix", model, "--text", sources.TEXT, "-o", tmp_path / "imatrix.gguf", "--context", 64)
    assert made["entries"] == 3 * 7
    assert made["tokens"] == made["chunks"] * 64 <= made["text_tokens"]
    assert forge_json(*words, "--imatrix", tmp_path / "imatrix.gguf")["tensors"] > 0
    with open_gguf(tmp_path / "small.gguf") as file:
        assert file.metadata["quantize.imatrix.dataset"] == "text.txt"
        assert file.metadata["quantize.imatrix.entries_count"] == 3 * 7
        assert file.metadata["quantize.imatrix.chunks_count"] == made["chunks"]


def test_fewer_chunks_are_read_when_asked_and_a_short_text_is_told(model: Path, tmp_path: Path) -> None:
    ended = forge("imatrix", model, "--text", sources.TEXT, "-o", tmp_path / "i.gguf", "--context", 64, "--chunks", 2)
    assert ended.code == 0
    assert "Only 128 tokens were read" in ended.err
    imatrix = read_imatrix(tmp_path / "i.gguf")
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets) == (2, 64, ("text.txt",))
    assert {int(entry.counts[0]) for entry in imatrix.entries.values()} == {128}


def test_the_same_text_gives_the_same_bytes_from_a_folder_and_from_a_quantized_file_nearly_the_same_numbers(
    model: Path, tmp_path: Path
) -> None:
    flags = ("--text", sources.TEXT, "--context", 64, "--chunks", 3)
    first = forge_json("imatrix", model, "-o", tmp_path / "a.gguf", *flags)
    again = forge_json("imatrix", DEMO_MODEL, "-o", tmp_path / "b.gguf", *flags)
    assert first["sha256"] == again["sha256"]
    forge_json("quantize", model, "-o", tmp_path / "q8.gguf", "--type", "Q8_0")
    forge_json("imatrix", tmp_path / "q8.gguf", "-o", tmp_path / "c.gguf", *flags)
    full, packed = read_imatrix(tmp_path / "a.gguf"), read_imatrix(tmp_path / "c.gguf")
    for name in full.entries:
        assert packed.entries[name].sums.sum() == pytest.approx(full.entries[name].sums.sum(), rel=0.02)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf", "q8.gguf"]


def test_without_a_text_the_package_s_own_is_read(model: Path, tmp_path: Path) -> None:
    made = forge_json("imatrix", model, "-o", tmp_path / "i.gguf", "--chunks", 1)
    assert made["context"] == 512
    assert read_imatrix(tmp_path / "i.gguf").datasets == ("ollama-forge",)


def test_a_dry_run_writes_nothing_and_knows_the_size_roughly(model: Path, tmp_path: Path) -> None:
    words = ("imatrix", model, "--text", sources.TEXT, "-o", tmp_path / "i.gguf", "--context", 64, "--chunks", 1)
    before = tree_hash(tmp_path)
    plan = forge_json(*words, "--dry-run")
    assert tree_hash(tmp_path) == before
    made = forge_json(*words)
    assert plan["entries"] == made["entries"]
    assert plan["bytes"] == pytest.approx(made["bytes"], rel=0.3)
    assert forge(*words).code == 1
    assert forge_json(*words, "--force")["sha256"] == made["sha256"]


@pytest.mark.parametrize(
    ("content", "flags", "code", "said"),
    [
        (b"too short", (), 2, "which is not one chunk of 512"),
        (b"x" * 9000, ("--context", 8), 2, "does not go with this model"),
        (b"x" * 9000, ("--context", 4096), 2, "does not go with this model"),
        (b"\xff\xfe\x00", (), 1, "is not text in UTF-8"),
        (b"  \n \n", (), 1, "holds no text"),
        (None, (), 1, "There is no file"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(
    model: Path, tmp_path: Path, content: bytes | None, flags: tuple[object, ...], code: int, said: str
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    ended = forge("imatrix", model, "--text", text, "-o", tmp_path / "i.gguf", *flags)
    assert ended.code == code
    assert said in ended.err
    assert not (tmp_path / "i.gguf").exists()


def test_a_family_without_rows_is_refused(tmp_path: Path) -> None:
    other = tiny_gguf.write_tiny_gguf(tmp_path / "m.gguf", architecture="falcon")
    ended = forge("imatrix", other, "--text", sources.TEXT, "-o", tmp_path / "i.gguf", "--context", 64)
    assert ended.code == 1
    assert "No family is known for the GGUF architecture 'falcon'" in ended.err
