"""OLLAMA_HOST is read as Ollama reads it (the cases of its own config_test.go, and the client's side of it)."""

import subprocess
import sys

import pytest

from ollama_forge.errors import UsageError
from ollama_forge.store.server_address import find_address, parse_address
from ollama_forge.store.server_features import features_of

ADDRESSES = {
    "": "http://127.0.0.1:11434",
    "1.2.3.4": "http://1.2.3.4:11434",
    ":1234": "http://127.0.0.1:1234",
    "1.2.3.4:1234": "http://1.2.3.4:1234",
    "example.com": "http://example.com:11434",
    "example.com:1234": "http://example.com:1234",
    ":66000": "http://127.0.0.1:11434",
    ":-1": "http://127.0.0.1:11434",
    "host:port": "http://host:11434",
    "host:": "http://host:11434",
    "[::1]": "http://[::1]:11434",
    "[::]": "http://[::1]:11434",
    "::1": "http://[::1]:11434",
    "[::1]:1337": "http://[::1]:1337",
    "[0001:002:003:0004::1]:1337": "http://[1:2:3:4::1]:1337",
    "0.0.0.0": "http://127.0.0.1:11434",
    "0.0.0.0:8080": "http://127.0.0.1:8080",
    " 1.2.3.4 ": "http://1.2.3.4:11434",
    '"1.2.3.4"': "http://1.2.3.4:11434",
    " '1.2.3.4' ": "http://1.2.3.4:11434",
    "http://1.2.3.4": "http://1.2.3.4:80",
    "http://1.2.3.4:4321": "http://1.2.3.4:4321",
    "https://1.2.3.4": "https://1.2.3.4:443",
    "https://1.2.3.4:4321": "https://1.2.3.4:4321",
    "https://[::1]": "https://[::1]:443",
    "https://example.com/ollama/": "https://example.com:443/ollama",
    "example.com:56789/path": "http://example.com:56789/path",
    "ollama.com": "https://ollama.com:443",
}


@pytest.mark.parametrize(("text", "url"), ADDRESSES.items())
def test_an_address_is_read_as_ollama_reads_it(text: str, url: str) -> None:
    assert parse_address(text).url == url


@pytest.mark.parametrize("text", ["ftp://1.2.3.4", "http://user:secret@host", "user:secret@host", "my host"])
def test_what_is_no_address_is_refused_without_showing_a_password(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_address(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("", True),
        ("localhost:1", True),
        ("127.8.0.1", True),
        ("[::1]:1", True),
        ("0.0.0.0", True),
        ("LOCALHOST", True),
        ("192.168.1.5", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("127.0.0.1.example.com", False),
    ],
)
def test_only_this_machines_names_are_local(text: str, local: bool) -> None:
    assert parse_address(text).is_local is local


def test_the_environment_names_the_address() -> None:
    assert find_address({"OLLAMA_HOST": "10.0.0.1"}).url == "http://10.0.0.1:11434"
    assert find_address({}).url == "http://127.0.0.1:11434"


@pytest.mark.parametrize(
    ("version", "has", "lacks"),
    [
        ("0.5.4", (), ("creates_from_blobs", "creates_adapters", "quantizes")),
        ("0.24.0", ("creates_adapters", "quantizes", "converts", "takes_renderer"), ("uses_native_templates",)),
        ("0.33.0-rc2", ("creates_adapters", "uses_native_templates", "takes_split_gguf"), ()),
        ("0.34.0", ("creates_adapters", "quantizes"), ()),
        ("0.34.1", ("creates_from_blobs", "uses_native_templates"), ("creates_adapters", "quantizes", "converts")),
        ("0.34.1-rc0", ("creates_from_blobs",), ("creates_adapters",)),
        ("v1.0.0+build", ("takes_requires",), ("quantizes",)),
        ("0.0.0", ("creates_from_blobs", "uses_native_templates"), ("creates_adapters", "is_known")),
        ("main-abc", ("creates_from_blobs",), ("quantizes", "is_known")),
    ],
)
def test_a_version_says_what_a_server_does(version: str, has: tuple[str, ...], lacks: tuple[str, ...]) -> None:
    features = features_of(version)
    assert [getattr(features, name) for name in has] == [True] * len(has)
    assert [getattr(features, name) for name in lacks] == [False] * len(lacks)


def test_the_clients_are_imported_only_when_something_is_asked() -> None:
    script = (
        "import sys, ollama_forge.store.server as s, ollama_forge.engine; s.OllamaServer('h').close(); "
        "sys.exit(bool({'ollama', 'httpx', 'pydantic', 'numpy', 'xllamacpp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
