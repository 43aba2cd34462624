"""The client of a running Ollama, over the true protocol: a loopback server, and a real one where it is installed."""

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loopback_ollama import Cut, EarlyEnd, ErrorLine, LoopbackOllama, Redirect, Slow, Status
from real_ollama import OLLAMA, start_ollama
from tiny_gguf import write_tiny_gguf, write_tiny_lora

from ollama_forge.errors import NotFoundError, ServerError
from ollama_forge.store.digest import Digest
from ollama_forge.store.modelfile import Message, Modelfile
from ollama_forge.store.server import OllamaServer, Progress


@pytest.fixture(params=["loopback", *(["ollama"] if OLLAMA else [])])
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OllamaServer]:
    if request.param == "loopback":
        with LoopbackOllama(tmp_path / "models") as loopback, OllamaServer(loopback.url) as server:
            yield server
    else:
        with start_ollama(tmp_path) as url, OllamaServer(url) as server:
            yield server


@pytest.fixture
def loopback(tmp_path: Path) -> Iterator[LoopbackOllama]:
    with LoopbackOllama(tmp_path / "models") as server:
        yield server


@pytest.fixture
def server(loopback: LoopbackOllama) -> Iterator[OllamaServer]:
    with OllamaServer(loopback.url, answer_timeout_seconds=10, work_timeout_seconds=10) as client:
        yield client


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def create_tiny(
    server: OllamaServer, model_path: Path, name: str = "tiny", modelfile: Modelfile | None = None
) -> Digest:
    digest = server.upload_blob(model_path)
    server.create_from_blobs(name, files={"tiny.gguf": digest}, modelfile=modelfile)
    return digest


def test_a_model_goes_all_the_way_from_blobs_to_deleted(
    any_server: OllamaServer, model_path: Path, tmp_path: Path
) -> None:
    assert any_server.tags() == []
    create_tiny(any_server, model_path, modelfile=Modelfile(system="Be brief.", parameters=(("temperature", 0.0),)))
    (listed,) = any_server.tags()
    assert (listed.name, listed.family, len(listed.digest)) == ("tiny:latest", "llama", 64)
    assert listed.size_bytes > 100_000
    shown = any_server.show("tiny")
    assert shown.metadata["llama.block_count"] == 2
    assert "temperature" in shown.parameters
    assert "completion" in shown.capabilities
    assert any_server.find_models_dir() == tmp_path / "models"
    any_server.copy("tiny", "mine/other:v2")
    assert any_server.has("mine/other:v2")
    any_server.delete("tiny")
    assert [model.name for model in any_server.tags()] == ["mine/other:v2"]
    any_server.delete("mine/other:v2")
    assert any_server.find_models_dir() is None


def test_blobs_are_sent_once_and_known_by_their_digest(any_server: OllamaServer, model_path: Path) -> None:
    sent: list[int] = []
    digest = any_server.upload_blob(model_path, advance=sent.append)
    assert any_server.has_blob(digest)
    assert sum(sent) == model_path.stat().st_size
    assert not any_server.has_blob(Digest("0" * 64))


def test_a_model_that_is_not_there_is_not_found(any_server: OllamaServer) -> None:
    for ask in (any_server.show, any_server.delete, lambda name: any_server.copy(name, "b")):
        with pytest.raises(NotFoundError, match="no-such-model"):
            ask("no-such-model")
    with pytest.raises(NotFoundError):
        any_server.generate("no-such-model", "hi")
    assert not any_server.has("no-such-model")


def test_the_version_is_told(any_server: OllamaServer) -> None:
    assert any_server.features().version == any_server.version()
    assert any_server.is_local


def test_a_blob_that_the_server_has_is_not_sent_again(
    loopback: LoopbackOllama, server: OllamaServer, model_path: Path
) -> None:
    sent: list[int] = []
    digest = server.upload_blob(model_path)
    server.upload_blob(model_path, digest, sent.append)
    assert [route for route in loopback.routes if route.startswith("POST")] == [f"POST /api/blobs/{digest}"]
    assert sent == [model_path.stat().st_size]


def test_bytes_that_are_not_the_digests_are_refused(server: OllamaServer, model_path: Path) -> None:
    with pytest.raises(ServerError, match="digest mismatch"):
        server.upload_blob(model_path, Digest("0" * 64))


def test_a_missing_file_is_not_found_before_anything_is_sent(
    loopback: LoopbackOllama, server: OllamaServer, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match=r"none\.gguf"):
        server.upload_blob(tmp_path / "none.gguf", Digest("0" * 64))
    assert loopback.routes == []


def test_all_that_a_modelfile_says_arrives(loopback: LoopbackOllama, server: OllamaServer, model_path: Path) -> None:
    modelfile = Modelfile(
        template="{{ .Prompt }}",
        system="Be brief.",
        licenses=("MIT", "and more"),
        parameters=(("stop", ("a", "b")), ("temperature", 0.5)),
        messages=(Message("user", "hi"), Message("assistant", "yo")),
        renderer="gemma4",
        parser="gemma4",
        requires="0.20.0",
    )
    create_tiny(server, model_path, modelfile=modelfile)
    assert loopback.texts("tiny", "template") == ["{{ .Prompt }}"]
    assert loopback.texts("tiny", "system") == ["Be brief."]
    assert loopback.texts("tiny", "license") == ["MIT", "and more"]
    assert json.loads(loopback.texts("tiny", "params")[0]) == {"stop": ["a", "b"], "temperature": 0.5}
    assert json.loads(loopback.texts("tiny", "messages")[0])[1] == {"role": "assistant", "content": "yo"}
    config = json.loads(loopback.blob_path(loopback.read_manifest("tiny")["config"]["digest"]).read_text())
    assert (config["renderer"], config["parser"], config["requires"]) == ("gemma4", "gemma4", "0.20.0")


def test_creating_tells_its_progress(server: OllamaServer, model_path: Path) -> None:
    seen: list[Progress] = []
    digest = server.upload_blob(model_path)
    server.create_from_blobs("tiny", files={"tiny.gguf": digest}, on_progress=seen.append)
    assert seen[0] == Progress("parsing GGUF")
    assert seen[-1] == Progress("success")


def test_a_model_of_a_model_shares_its_blob(loopback: LoopbackOllama, server: OllamaServer, model_path: Path) -> None:
    digest = create_tiny(server, model_path)
    server.create_from_blobs("second", source="tiny", modelfile=Modelfile(system="Other."))
    assert loopback.layers("second", "model") == [str(digest)]
    with pytest.raises(NotFoundError, match="nothing-here"):
        server.create_from_blobs("third", source="nothing-here")


def test_an_adapter_goes_to_a_server_that_takes_adapters(
    loopback: LoopbackOllama, server: OllamaServer, model_path: Path, tmp_path: Path
) -> None:
    base = server.upload_blob(model_path)
    adapter = server.upload_blob(write_tiny_lora(tmp_path / "lora.gguf"))
    server.create_from_blobs("tuned", files={"tiny.gguf": base}, adapters={"lora.gguf": adapter})
    assert loopback.layers("tuned", "adapter") == [str(adapter)]


@pytest.mark.parametrize(("version", "words"), [("0.34.1", "0.34.1"), ("0.0.0", "0.0.0")])
def test_a_newer_server_is_not_asked_for_what_it_refuses(
    version: str, words: str, loopback: LoopbackOllama, server: OllamaServer
) -> None:
    loopback.version = version
    some = {"x.gguf": Digest("0" * 64)}
    with pytest.raises(ServerError, match="cannot create a model with an adapter") as adapter:
        server.create_from_blobs("a", files=some, adapters=some)
    with pytest.raises(ServerError, match="cannot quantize") as quantize:
        server.create_from_blobs("a", files=some, quantize="Q4_K_M")
    assert words in adapter.value.what
    assert "--merge" in adapter.value.next
    assert "ollama-forge quantize" in quantize.value.next
    assert set(loopback.routes) == {"GET /api/version"}


def test_the_server_itself_refuses_an_adapter_since_0_34_1(
    loopback: LoopbackOllama, server: OllamaServer, model_path: Path, tmp_path: Path
) -> None:
    base = server.upload_blob(model_path)
    adapter = server.upload_blob(write_tiny_lora(tmp_path / "lora.gguf"))
    assert server.features().creates_adapters
    loopback.version = "0.34.1"
    with pytest.raises(ServerError, match="adapters are not supported"):
        server.create_from_blobs("tuned", files={"tiny.gguf": base}, adapters={"lora.gguf": adapter})


Ask = Callable[[OllamaServer, Path], object]
STREAMS: dict[str, Ask] = {
    "POST /api/create": lambda server, path: create_tiny(server, path, "another"),
    "POST /api/generate": lambda server, path: server.generate("tiny", "hi there"),
    "POST /api/chat": lambda server, path: server.chat("tiny", [{"role": "user", "content": "hi there"}]),
}


@pytest.mark.parametrize("route", STREAMS)
def test_an_error_line_after_status_200_is_an_error(
    route: str, loopback: LoopbackOllama, server: OllamaServer, model_path: Path
) -> None:
    create_tiny(server, model_path)
    loopback.fail(route, ErrorLine("the disk is full"))
    with pytest.raises(ServerError, match="the disk is full"):
        STREAMS[route](server, model_path)
    STREAMS[route](server, model_path)


@pytest.mark.parametrize("failure", [Cut(), EarlyEnd()])
@pytest.mark.parametrize("route", STREAMS)
def test_an_answer_that_breaks_off_is_an_error(
    route: str, failure: Cut | EarlyEnd, loopback: LoopbackOllama, server: OllamaServer, model_path: Path
) -> None:
    create_tiny(server, model_path)
    loopback.fail(route, failure)
    with pytest.raises(ServerError, match="broke off"):
        STREAMS[route](server, model_path)
    STREAMS[route](server, model_path)


@pytest.mark.parametrize("route", STREAMS)
def test_a_refusal_tells_the_servers_words(
    route: str, loopback: LoopbackOllama, server: OllamaServer, model_path: Path
) -> None:
    create_tiny(server, model_path)
    loopback.fail(route, Status(500, '{"error":"llama-server binary not found"}'), Status(503, "busy"))
    with pytest.raises(ServerError, match="llama-server binary not found"):
        STREAMS[route](server, model_path)
    with pytest.raises(ServerError, match="busy") as caught:
        STREAMS[route](server, model_path)
    assert "try again" in caught.value.next


@pytest.mark.parametrize("route", ["GET /api/version", "GET /api/tags", *STREAMS])
def test_a_server_that_is_silent_too_long_is_an_error(route: str, loopback: LoopbackOllama, model_path: Path) -> None:
    with OllamaServer(loopback.url) as server:
        create_tiny(server, model_path)
    ask = {"GET /api/version": lambda s, _: s.version(), "GET /api/tags": lambda s, _: s.tags(), **STREAMS}[route]
    loopback.fail(route, Slow(1.5))
    with (
        OllamaServer(loopback.url, answer_timeout_seconds=0.5, work_timeout_seconds=0.5) as hasty,
        pytest.raises(ServerError, match="in time"),
    ):
        ask(hasty, model_path)


def test_no_server_is_an_error_with_the_next_step() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with OllamaServer(f"127.0.0.1:{unused.getsockname()[1]}") as server:
            for ask in (server.version, server.tags, lambda: server.generate("a", "b")):
                with pytest.raises(ServerError, match="No Ollama answers") as caught:
                    ask()
                assert "ollama serve" in caught.value.next


@pytest.mark.parametrize("body", ["<html>hello</html>", "[1, 2]", '{"version": 3}', "{"])
def test_something_else_that_answers_is_not_taken_for_ollama(
    body: str, loopback: LoopbackOllama, server: OllamaServer
) -> None:
    loopback.fail("GET /api/version", Status(200, body))
    with pytest.raises(ServerError, match="is not Ollama"):
        server.version()


def test_a_path_that_an_old_server_lacks_is_not_a_missing_model(loopback: LoopbackOllama, server: OllamaServer) -> None:
    loopback.fail("POST /api/show", Status(404, "404 page not found"))
    with pytest.raises(ServerError, match="404 page not found"):
        server.show("tiny")


def test_redirects_are_not_followed(loopback: LoopbackOllama, server: OllamaServer, model_path: Path) -> None:
    with LoopbackOllama(loopback.models_dir / "elsewhere") as other:
        for route in ("GET /api/version", "GET /api/tags", *STREAMS):
            loopback.fail(route, Redirect(f"{other.url}/api/version"))
        create: Ask = lambda s, path: s.create_from_blobs("a", source="b")  # noqa: E731
        asks = [lambda s, _: s.version(), lambda s, _: s.tags(), create, *list(STREAMS.values())[1:]]
        for ask in asks:
            with pytest.raises(ServerError, match="redirects elsewhere"):
                ask(server, model_path)
        assert other.requests == []


def test_no_token_is_sent(
    loopback: LoopbackOllama, server: OllamaServer, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "should-stay-here")
    monkeypatch.setenv("HF_TOKEN", "should-stay-here")
    create_tiny(server, model_path)
    server.tags()
    server.show("tiny")
    server.chat("tiny", [{"role": "user", "content": "hi"}])
    sent = [f"{request.headers}" for request in loopback.requests]
    assert len(sent) >= 6
    assert not any("should-stay-here" in headers or "authorization" in headers for headers in sent)


def test_generate_streams_and_says_how_it_ended(server: OllamaServer, model_path: Path) -> None:
    create_tiny(server, model_path)
    heard: list[str] = []
    answer = server.generate("tiny", "hi there", options={"stop": ("x",)}, on_text=heard.append)
    assert answer.text == "".join(heard) == "tiny heard: hi there"
    assert len(heard) > 2
    assert (answer.stop_reason, answer.n_tokens) == ("stop", 4)
    assert server.generate("tiny", "").stop_reason == "load"
    assert [model.name for model in server.ps()] == ["tiny:latest"]


def test_chat_sends_the_whole_conversation(loopback: LoopbackOllama, server: OllamaServer, model_path: Path) -> None:
    create_tiny(server, model_path)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    loopback.answer = lambda name, messages: " ".join(turn["content"] for turn in messages)
    assert server.chat("tiny", turns, options={"temperature": 0}).text == "Be brief. one two three"
    assert loopback.requests[-1].document["options"] == {"temperature": 0}


def test_what_the_listener_raises_is_not_taken_for_the_servers(server: OllamaServer, model_path: Path) -> None:
    create_tiny(server, model_path)

    def hang_up(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        server.generate("tiny", "hi there", on_text=hang_up)
    assert server.generate("tiny", "hi there").text
