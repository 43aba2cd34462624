"""Digests: every spelling that Ollama reads is read, one is written, and nothing else becomes a path."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.errors import DigestError
from ollama_forge.store.digest import Digest, digest_of, find_mentions, parse_digest

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize("text", [f"sha256:{HEX}", f"sha256-{HEX}", f"sha256:{HEX.upper()}", f"sha256-{HEX.upper()}"])
def test_every_spelling_that_ollama_reads_gives_the_canonical_one(text: str) -> None:
    digest = parse_digest(text)
    assert str(digest) == f"sha256:{HEX}"
    assert digest.blob_filename == f"sha256-{HEX}"


HOSTILE_DIGESTS = [
    "",
    HEX,
    f"sha256:{HEX[:-1]}",
    f"sha256:{HEX}0",
    f"sha256:{HEX}\n",
    f"\nsha256:{HEX}",
    f"SHA256:{HEX}",
    f"sha512:{HEX}",
    f"sha256_{HEX}",
    f"sha256:{HEX[:-1]}g",
    f"sha256:{HEX[:-1]}\u0661",
    f"sha256:{HEX[:-1]}\0",
    "sha256:../../../../etc/passwd",
    f"sha256:../{HEX[3:]}",
    f"sha256:/{HEX[1:]}",
    f"sha256-{HEX}/../x",
    f" sha256:{HEX}",
]


@pytest.mark.parametrize("text", HOSTILE_DIGESTS)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DigestError):
        parse_digest(text)


@pytest.mark.parametrize("text", [HEX.upper(), HEX[:-1], HEX + "\n", "../" + HEX[3:], ""])
def test_a_digest_cannot_be_made_around_the_parser(text: str) -> None:
    with pytest.raises(DigestError):
        Digest(text)


@given(st.binary(max_size=200))
def test_a_digest_survives_being_written_and_read(content: bytes) -> None:
    digest = digest_of(content)
    assert digest.hex == hashlib.sha256(content).hexdigest()
    assert parse_digest(str(digest)) == digest == parse_digest(digest.blob_filename)


@given(st.text(max_size=90))
def test_text_is_refused_or_round_trips(text: str) -> None:
    try:
        digest = parse_digest(text)
    except DigestError:
        return
    assert text.lower().replace("-", ":") == str(digest)


def test_mentions_are_found_in_broken_and_foreign_manifests() -> None:
    raw = f'{{"manifests":[{{"digest":"sha256-{HEX.upper()}"}}], "layers":[{{"digest": "sha256:{"1" * 64}"'.encode()
    assert find_mentions(raw) == {Digest(HEX), Digest("1" * 64)}


def test_a_longer_run_of_digits_is_no_mention() -> None:
    assert find_mentions(f"sha256:{HEX}0".encode()) == frozenset()
