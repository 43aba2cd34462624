"""Manifests and configs: read as tolerantly as the server reads them, written in one spelling."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollama_forge.errors import ManifestError
from ollama_forge.gguf.reader import open_gguf
from ollama_forge.store.digest import Digest
from ollama_forge.store.manifest import (
    CONFIG_MEDIA_TYPE,
    MODEL,
    ConfigBlob,
    Layer,
    Manifest,
    config_from_gguf,
    human_number,
    parse_config,
    parse_manifest,
    render_config,
    render_manifest,
)

HEX = "ab" * 32
LAYER = {"mediaType": MODEL, "digest": f"sha256:{HEX}", "size": 7}


def test_a_manifest_is_written_compactly_in_gos_order_without_a_newline() -> None:
    digest = Digest(HEX)
    manifest = Manifest(
        Layer(CONFIG_MEDIA_TYPE, digest, 3),
        (Layer(MODEL, digest, 7, from_name="a<b:latest"), Layer("x", digest, 0, name="t")),
    )
    assert render_manifest(manifest).decode() == (
        '{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.v2+json",'
        f'"config":{{"mediaType":"{CONFIG_MEDIA_TYPE}","digest":"sha256:{HEX}","size":3}},'
        f'"layers":[{{"mediaType":"{MODEL}","digest":"sha256:{HEX}","size":7,"from":"a\\u003cb:latest"}},'
        f'{{"mediaType":"x","digest":"sha256:{HEX}","size":0,"name":"t"}}]}}'
    )


@pytest.mark.parametrize(
    "document",
    [
        {"layers": [LAYER]},
        {"layers": [LAYER], "config": {"digest": ""}},
        {"Layers": [{"MediaType": MODEL, "DIGEST": f"sha256-{HEX.upper()}", "Size": 7, "new": 1}], "config": None},
        {"schemaVersion": 9, "mediaType": "application/vnd.ollama.manifest.v9", "layers": [LAYER], "manifests": [1]},
    ],
)
def test_unknown_fields_other_spellings_and_a_missing_config_are_read(document: dict[str, object]) -> None:
    manifest = parse_manifest(json.dumps(document).encode())
    assert manifest == Manifest(None, (Layer(MODEL, Digest(HEX), 7),))


def test_a_manifest_list_has_no_layers() -> None:
    raw = json.dumps({"mediaType": "application/vnd.ollama.manifest.list.v2+json", "manifests": [LAYER]}).encode()
    assert parse_manifest(raw).layers == ()


@pytest.mark.parametrize(
    "layer",
    [
        {**LAYER, "digest": "sha256:../../../etc/passwd"},
        {**LAYER, "digest": "../x"},
        {**LAYER, "digest": 5},
        {**LAYER, "digest": None},
        {**LAYER, "size": -1},
        {**LAYER, "size": 1 << 63},
        {**LAYER, "size": 1.5},
        {**LAYER, "size": "7"},
        {**LAYER, "size": True},
        {**LAYER, "mediaType": ["x"]},
        {**LAYER, "from": {}},
        "x",
        None,
    ],
)
def test_an_impossible_layer_breaks_the_manifest(layer: object) -> None:
    with pytest.raises(ManifestError) as refused:
        parse_manifest(json.dumps({"layers": [layer]}).encode())
    assert refused.value.next


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"layers": {}}', b"\xff\xfe", b"[" * 10_000, b"\0" * 10])
def test_a_file_that_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(raw)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
LAYERS = st.builds(
    Layer,
    media_type=TEXT,
    digest=st.binary(max_size=8).map(lambda raw: Digest(hashlib.sha256(raw).hexdigest())),
    size_bytes=st.integers(0, (1 << 63) - 1),
    from_name=TEXT,
    name=TEXT,
)


@given(st.builds(Manifest, config=st.none() | LAYERS, layers=st.lists(LAYERS, max_size=5).map(tuple)))
def test_a_manifest_survives_being_written_and_read(manifest: Manifest) -> None:
    raw = render_manifest(manifest)
    assert parse_manifest(raw) == manifest
    assert render_manifest(parse_manifest(raw)) == raw


def test_a_config_is_written_as_ollama_writes_it() -> None:
    config = ConfigBlob(model_family="llama", model_families=("llama",), model_type="1.1B", file_type="Q4_K_M")
    assert render_config(config) == (
        b'{"model_format":"gguf","model_family":"llama","model_families":["llama"],"model_type":"1.1B",'
        b'"file_type":"Q4_K_M","architecture":"amd64","os":"linux"}\n'
    )


def test_a_config_keeps_what_it_does_not_know_and_drops_stale_layers() -> None:
    document = {
        "model_format": "gguf",
        "model_family": "gemma4",
        "model_families": None,
        "model_type": "4B",
        "file_type": "Q8_0",
        "renderer": "gemma4",
        "capabilities": ["vision"],
        "context_length": 8192,
        "draft": {"model_format": "gguf", "architecture": "x"},
        "architecture": "arm64",
        "os": "darwin",
        "rootfs": {"type": "layers", "diff_ids": ["sha256:old"]},
        "from_the_future": {"a": [1, "<>"]},
    }
    config = parse_config(json.dumps(document).encode())
    again = json.loads(render_config(config))
    assert again.pop("from_the_future") == {"a": [1, "<>"]}
    del document["rootfs"], document["from_the_future"]
    assert again == document
    assert list(again)[:5] == ["model_format", "model_family", "model_families", "model_type", "file_type"]


@pytest.mark.parametrize(
    "document", [[], {"model_family": 3}, {"model_families": "x"}, {"context_length": "long"}, {"renderer": ["x"]}]
)
def test_a_config_of_other_types_is_refused(document: object) -> None:
    with pytest.raises(ManifestError):
        parse_config(json.dumps(document).encode())


OLLAMA_NUMBERS = {
    0: "0",
    999: "999",
    1000: "1K",
    12_345: "12K",
    999_999: "1000K",
    1_000_000: "1M",
    494_032_768: "494.03M",
    1_000_000_000: "1B",
    1_100_048_384: "1.1B",
    7_615_616_512: "7.6B",
    70_553_706_496: "70.6B",
}


@pytest.mark.parametrize(("count", "text"), OLLAMA_NUMBERS.items())
def test_numbers_of_parameters_are_said_in_ollamas_words(count: int, text: str) -> None:
    assert human_number(count) == text


def test_the_config_of_a_gguf_comes_from_its_header(gguf) -> None:  # type: ignore[no-untyped-def]
    with open_gguf(gguf) as opened:
        config = config_from_gguf(opened)
        count = sum(tensor.n_elements for tensor in opened.tensors.values())
    assert (config.model_format, config.model_family, config.model_families) == ("gguf", "llama", ("llama",))
    assert (config.model_type, config.file_type) == (human_number(count), "F32")
