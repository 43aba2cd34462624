"""A file tells where its model came from, also after it was changed."""

import shutil
from pathlib import Path

import pytest
from command import DEMO_MODEL, forge_json
from tiny_gguf import write_tiny_gguf

from ollama_forge.gguf.reader import open_gguf
from ollama_forge.transform.apply import plan_gguf_edit
from ollama_forge.transform.origin import source_repo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """The demo's model as a snapshot of org/Demo-1M, converted."""
    snapshot = tmp_path / "models--org--Demo-1M" / "snapshots" / COMMIT
    shutil.copytree(DEMO_MODEL, snapshot)
    output = tmp_path / "demo.gguf"
    forge_json("convert", snapshot, "-o", output)
    return output


def test_a_snapshot_of_the_hub_leaves_its_address_in_the_file(converted: Path) -> None:
    with open_gguf(converted) as file:
        assert file.metadata["general.source.repo_url"] == "https://huggingface.co/org/Demo-1M"
        assert file.metadata["general.source.url"] == f"https://huggingface.co/org/Demo-1M/tree/{COMMIT}"
        assert source_repo(file.metadata) == "org/Demo-1M"


def test_an_edited_model_names_its_source_as_its_base(converted: Path) -> None:
    with open_gguf(converted) as file:
        fields = {field.key: field.value for field in plan_gguf_edit(file, []).fields if "tokenizer" not in field.key}
        kept = set(file.metadata) - {"general.source.url", "general.source.repo_url"}
        assert kept <= {field.key for field in plan_gguf_edit(file, []).fields}
    assert not [key for key in fields if key.startswith("general.source.")]
    assert fields["general.base_model.count"] == 1
    assert fields["general.base_model.0.name"] == "Demo-1M"
    assert fields["general.base_model.0.repo_url"] == "https://huggingface.co/org/Demo-1M"


def test_a_model_of_unknown_origin_keeps_its_fields_as_they_are(tmp_path: Path) -> None:
    with open_gguf(write_tiny_gguf(tmp_path / "tiny.gguf")) as file:
        assert [field.key for field in plan_gguf_edit(file, []).fields] == list(file.fields)


@pytest.mark.parametrize(
    ("value", "repo"),
    [
        ("org/model", "org/model"),
        ("https://huggingface.co/org/model", "org/model"),
        ("https://huggingface.co/org/model/tree/main", "org/model"),
        ("https://example.org/org/model", ""),
        ("a model", ""),
        (7, ""),
    ],
)
def test_only_a_repo_of_the_hub_counts_as_a_source(value: object, repo: str) -> None:
    assert source_repo({"general.source.url": value}) == repo
