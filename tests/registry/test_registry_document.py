"""The registry's document: one spelling, every version read, nothing lost."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ollama_forge.errors import RegistryError
from ollama_forge.registry.document import (
    MIGRATIONS,
    SCHEMA_VERSION,
    BlobRecord,
    Document,
    Identity,
    Landing,
    Parent,
    RegistryEntry,
    parse_document,
    render_document,
)

DIGEST = "sha256:" + "ab" * 32


def entry(name: str, **values: object) -> RegistryEntry:
    return RegistryEntry.model_validate({"name": name, **values})


def document(*entries: RegistryEntry) -> Document:
    return Document(models={one.name: one for one in entries})


def test_entries_in_another_order_are_the_same_bytes() -> None:
    one, two = entry("one", roles=("b", "a")), entry("two", family="llama3")
    assert render_document(document(one, two)) == render_document(document(two, one))


def test_what_is_written_is_read_back() -> None:
    landing = Landing(name="a", step="quantize", parents=(Parent(role="base", digest=DIGEST),), seconds=1.5)
    identity = Identity(manifest_digest=DIGEST, blobs=(BlobRecord(kind="model", digest=DIGEST, size_bytes=3),))
    written = document(entry("a", identity=identity, scores={"kld": 0.25})).with_landing(DIGEST, landing)
    assert parse_document(render_document(written)) == written


def test_a_field_of_a_later_tool_is_kept() -> None:
    raw = json.dumps({"schema_version": 1, "models": {"a": {"name": "a", "mood": {"x": 1}}}, "note": "hi"}).encode()
    kept = json.loads(render_document(parse_document(raw)))
    assert kept["models"]["a"]["mood"] == {"x": 1}
    assert kept["note"] == "hi"


def test_the_bytes_hold_no_time_but_the_one_of_a_landing() -> None:
    text = render_document(document(entry("a", served_model_id="a:latest"))).decode()
    assert not any(word in text for word in ("_at", "time", "date"))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(), st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3))
def test_any_text_survives(text: str, scores: dict[str, float]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    written = document(entry("a", display_name=text, scores=scores, served_model_id=text))
    assert parse_document(render_document(written)) == written


def test_the_same_work_is_recorded_once() -> None:
    first = Landing(name="a", step="import", seconds=1.0, landed_at="2030-01-01T00:00:00+00:00")
    again = first.model_copy(update={"seconds": 9.0, "landed_at": "2031-01-01T00:00:00+00:00"})
    other = first.model_copy(update={"step": "quantize"})
    known = Document().with_landing(DIGEST, first)
    assert known.with_landing(DIGEST, again) is known
    assert [landing.step for landing in known.with_landing(DIGEST, other).lineage[DIGEST]] == ["import", "quantize"]


def test_every_older_version_has_a_way_to_this_one() -> None:
    assert sorted(MIGRATIONS) == list(range(SCHEMA_VERSION))


def test_version_0_the_list_of_the_predecessor_is_read() -> None:
    old = [
        {
            "name": "qwen3_8b_(Q4_K_M)",
            "display_name": None,
            "backend": "ollama",
            "backend_config": {"port": 1, "extra_args": ["--num-ctx", "4096"]},
            "capabilities": {"text": True, "vision": False, "tools": True},
            "download_path": "ollama:/qwen3:8b",
            "served_model_id": "qwen3:8b",
            "roles": ["caption"],
            "deprecated": True,
        },
        {"name": "other", "backend": "vllm"},
    ]
    read = parse_document(json.dumps(old).encode())
    first = read.models["qwen3_8b_(Q4_K_M)"]
    assert first.download_path == "ollama://qwen3:8b"
    assert first.capabilities == ("text", "tools")
    assert first.roles == ("caption",)
    assert first.deprecated
    assert first.model_extra == {"backend_config": old[0]["backend_config"]}
    assert read.models["other"].backend == "vllm"
    assert read.schema_version == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"{}", "schema_version"),
        (b"3", "schema_version"),
        (b'{"schema_version": true}', "schema_version"),
        (b'{"schema_version": -1}', "schema"),
        (b'{"schema_version": 1, "models": {"a": {"name": "b"}}}', "another name"),
        (b'{"schema_version": 1, "models": {"a": {"name": "a", "roles": 3}}}', "models.a.roles"),
        (b'[{"name": ""}]', "Entry 1"),
        (b'[{"name": "a"}, {"name": "a"}]', "Two entries"),
        (b"\xff\xfe", "JSON"),
    ],
)
def test_what_is_no_registry_is_refused_with_the_reason(raw: bytes, word: str) -> None:
    with pytest.raises(RegistryError) as caught:
        parse_document(raw)
    assert word in caught.value.why


def test_a_registry_of_a_newer_tool_is_left_alone() -> None:
    with pytest.raises(RegistryError) as caught:
        parse_document(b'{"schema_version": 99, "models": {}}')
    assert "newer" in caught.value.what
