"""The digest by which a run knows its base again: of all that the weights lie in."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json
from shards import write_shards

from ollama_forge.errors import NotFoundError
from ollama_forge.jobs.lineage import content_digest, weights_digest


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.gguf"
    forge_json("convert", DEMO_MODEL, "-o", path)
    return path


def spoil(path: Path) -> None:
    """Change the last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_files_digest_is_that_of_its_bytes(whole: Path) -> None:
    assert weights_digest(whole) == hashlib.sha256(whole.read_bytes()).hexdigest()
    assert content_digest(whole) == f"sha256:{weights_digest(whole)}"


def test_every_shard_counts_and_any_of_them_may_be_named(whole: Path, tmp_path: Path) -> None:
    first, second = write_shards(whole, tmp_path)
    before = weights_digest(first)
    assert before == weights_digest(second) != weights_digest(whole)
    spoil(second)
    after = weights_digest(first)
    assert after != before
    spoil(first)
    assert weights_digest(first) not in (before, after)
    second.unlink()
    with pytest.raises(NotFoundError, match="00002-of-00002"):
        weights_digest(first)


def test_a_blobs_digest_is_its_name(tmp_path: Path) -> None:
    blob = tmp_path / f"sha256-{'ab' * 32}"
    blob.write_bytes(b"not read")
    assert weights_digest(blob) == "ab" * 32


def test_a_name_like_a_shards_is_read_as_what_it_is(whole: Path, tmp_path: Path) -> None:
    named = whole.rename(tmp_path / "best-of-all.gguf")
    assert weights_digest(named) == hashlib.sha256(named.read_bytes()).hexdigest()
