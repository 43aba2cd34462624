from pathlib import Path

import pytest

from ollama_forge.errors import UsageError
from ollama_forge.source.ref import RefKind, parse_ref


@pytest.mark.parametrize("text", ["llama3.2", "user/model:tag", "hf.co/org/repo:Q4_K_M", "localhost:5000/a/b:c", "a"])
def test_a_plain_word_is_an_ollama_name(text: str) -> None:
    assert parse_ref(text).kind is RefKind.OLLAMA


@pytest.mark.parametrize(
    "text", ["model.gguf", "./folder", "/models/x", "../x", "MODEL.GGUF", "C:\\models\\x", "folder/", "."]
)
def test_what_can_only_be_a_path_is_one(text: str) -> None:
    ref = parse_ref(text)
    assert ref.kind is RefKind.PATH
    assert ref.path == Path(text)


def test_the_home_sign_is_expanded() -> None:
    assert parse_ref("~/m.gguf").path == Path.home() / "m.gguf"


def test_a_hub_reference_keeps_repo_revision_and_file_apart() -> None:
    ref = parse_ref("hf:org/repo.v1@refs/pr/3:sub/model-Q4_K_M.gguf")
    assert (ref.repo, ref.revision, ref.file) == ("org/repo.v1", "refs/pr/3", "sub/model-Q4_K_M.gguf")


@pytest.mark.parametrize(
    "text", ["", "  ", "hf:", "hf:org", "hf:a/b/c", "hf:../x", "hf:a/b:../../etc", "a\0b", "hf:a/b@"]
)
def test_what_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ref(text)
