"""A small Ollama on 127.0.0.1: the true protocol, over a store on disk. The wire is real; only who answers is not.

    with LoopbackOllama(tmp_path / "models", version="0.33.0") as server:
        OllamaServer(server.url).tags()
        server.fail("POST /api/create", ErrorLine("disk is full"))   # the next such request fails

It hashes what is uploaded, checks what is asked, and keeps blobs and manifests as Ollama lays them out; it does not
quantize, and its models answer with `answer(name, messages)`. Nothing of ollama_forge is used here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gguf

LAYER = "application/vnd.ollama.image."
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LOCAL_HOST = re.compile(r"(localhost|127\.[0-9.]+|\[::1\])(:\d+)?")


@dataclass(frozen=True)
class ErrorLine:
    """Answer with status 200, some lines, then `{"error": message}`."""

    message: str
    after_lines: int = 1


@dataclass(frozen=True)
class Cut:
    """Answer with status 200 and some lines, then close the connection without a proper end."""

    after_lines: int = 1


@dataclass(frozen=True)
class EarlyEnd:
    """Answer with status 200 and some lines, then end properly, with the last lines missing."""

    after_lines: int = 1


@dataclass(frozen=True)
class Status:
    """Refuse with a status and a body; text that is no JSON object is sent as plain text."""

    status: int
    body: str = '{"error":"scripted"}'


@dataclass(frozen=True)
class Redirect:
    """Answer 307 with a Location."""

    location: str


@dataclass(frozen=True)
class Slow:
    """Wait before answering."""

    seconds: float


Failure = ErrorLine | Cut | EarlyEnd | Status | Redirect | Slow


@dataclass(frozen=True)
class Request:
    """A request that came: `route` is `METHOD /path`."""

    route: str
    headers: dict[str, str]
    body: bytes

    @property
    def document(self) -> Any:
        return json.loads(self.body)


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def say_hello(name: str, messages: list[dict[str, Any]]) -> str:
    """The default answer: what was asked, said back."""
    return f"{name} heard: {messages[-1]['content']}"


@dataclass
class LoopbackOllama:
    """The server and its store. Use it in a `with` block."""

    models_dir: Path
    version: str = "0.33.0"
    answer: Callable[[str, list[dict[str, Any]]], str] = say_hello
    requests: list[Request] = field(default_factory=list)
    _failures: dict[str, list[Failure]] = field(default_factory=dict)
    _loaded: set[str] = field(default_factory=set)

    def __enter__(self) -> LoopbackOllama:
        self.blobs_dir.mkdir(parents=True, exist_ok=True)
        self.manifests_dir.mkdir(parents=True, exist_ok=True)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def blobs_dir(self) -> Path:
        return self.models_dir / "blobs"

    @property
    def manifests_dir(self) -> Path:
        return self.models_dir / "manifests"

    @property
    def routes(self) -> list[str]:
        """The routes asked for, in order."""
        return [request.route for request in self.requests]

    def fail(self, route: str, *failures: Failure) -> None:
        """Have the next requests for `METHOD /path` fail, one failure each; others are answered."""
        self._failures.setdefault(route, []).extend(failures)

    def take_failure(self, route: str) -> Failure | None:
        waiting = self._failures.get(route)
        return waiting.pop(0) if waiting else None

    def newer_than(self, *version: int) -> bool:
        """Whether the version that it plays is that one or a later one."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:3]) >= version

    # -- the store -----------------------------------------------------------------------------------------------

    def blob_path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise Refused(400, "invalid digest format")
        return self.blobs_dir / digest.replace(":", "-")

    def add_blob(self, content: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        self.blob_path(digest).write_bytes(content)
        return digest

    def manifest_path(self, name: str) -> Path:
        model, _, tag = name.partition(":")
        parts = model.split("/")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) or ".." in name:
            raise Refused(400, "invalid model name")
        namespace = parts[0] if len(parts) == 2 else "library"
        return self.manifests_dir / "registry.ollama.ai" / namespace / parts[-1] / (tag or "latest")

    def read_manifest(self, name: str) -> dict[str, Any]:
        path = self.manifest_path(name)
        if not path.is_file():
            raise Refused(404, f"model '{name}' not found")
        return json.loads(path.read_bytes())

    def write_manifest(self, name: str, manifest: dict[str, Any]) -> None:
        path = self.manifest_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(manifest, separators=(",", ":")))

    def names(self) -> list[str]:
        """Short names, newest first."""
        paths = sorted(self.manifests_dir.glob("*/*/*/*"), key=lambda path: path.stat().st_mtime, reverse=True)
        return [
            ("" if path.parts[-3] == "library" else f"{path.parts[-3]}/") + f"{path.parts[-2]}:{path.parts[-1]}"
            for path in paths
        ]

    def layers(self, name: str, kind: str) -> list[str]:
        """The digests of a model's layers of one kind (`model`, `adapter`, `template`, ...)."""
        return [row["digest"] for row in self.read_manifest(name)["layers"] if row["mediaType"] == LAYER + kind]

    def texts(self, name: str, kind: str) -> list[str]:
        return [self.blob_path(digest).read_text() for digest in self.layers(name, kind)]

    # -- what it answers -----------------------------------------------------------------------------------------

    def tags(self) -> dict[str, Any]:
        return {"models": [self._row(name) for name in self.names()]}

    def ps(self) -> dict[str, Any]:
        rows = [self._row(name) for name in self.names() if name in self._loaded]
        for row in rows:
            row |= {"expires_at": _now(), "size_vram": 0, "context_length": 4096}
        return {"models": rows}

    def _row(self, name: str) -> dict[str, Any]:
        raw = self.manifest_path(name).read_bytes()
        manifest = json.loads(raw)
        return {
            "name": name,
            "model": name,
            "modified_at": _now(self.manifest_path(name).stat().st_mtime),
            "size": sum(row["size"] for row in [*manifest["layers"], manifest["config"]]),
            "digest": hashlib.sha256(raw).hexdigest(),
            "details": self._details(manifest),
        }

    def _details(self, manifest: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(self.blob_path(manifest["config"]["digest"]).read_text())
        return {
            "parent_model": "",
            "format": config["model_format"],
            "family": config["model_family"],
            "families": config["model_families"],
            "parameter_size": config["model_type"],
            "quantization_level": config["file_type"],
        }

    def show(self, body: dict[str, Any]) -> dict[str, Any]:
        name = _model_of(body)
        manifest = self.read_manifest(name)
        models = self.layers(name, "model")
        if not models:
            raise Refused(404, f"model '{name}' not found")
        model_path = self.blob_path(models[0])
        params = json.loads((self.texts(name, "params") or ["{}"])[0])
        template = "".join(self.texts(name, "template"))
        lines = [f"FROM {model_path.absolute()}"]
        lines += [f"ADAPTER {self.blob_path(digest).absolute()}" for digest in self.layers(name, "adapter")]
        lines += [f'TEMPLATE """{template}"""'] if template else []
        reader = gguf.GGUFReader(model_path)
        return {
            "license": "\n".join(self.texts(name, "license")),
            "modelfile": '# Modelfile generated by "ollama show"\n\n' + "\n".join(lines) + "\n",
            "parameters": "\n".join(f"{key:<30} {json.dumps(value)}" for key, value in params.items()),
            "template": template,
            "system": "".join(self.texts(name, "system")),
            "details": self._details(manifest),
            "messages": json.loads((self.texts(name, "messages") or ["[]"])[0]),
            "model_info": {key: _plain(item) for key, item in reader.fields.items() if "." in key},
            "capabilities": ["completion"],
            "modified_at": _now(self.manifest_path(name).stat().st_mtime),
        }

    def copy(self, body: dict[str, Any]) -> None:
        source = self.manifest_path(body["source"])
        if not source.is_file():
            raise Refused(404, f'model "{body["source"]}" not found')
        target = self.manifest_path(body["destination"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())

    def delete(self, body: dict[str, Any]) -> None:
        name = _model_of(body)
        gone = self._digests(name)
        self.manifest_path(name).unlink()
        used = {digest for other in self.names() for digest in self._digests(other)}
        for digest in gone - used:
            self.blob_path(digest).unlink()

    def _digests(self, name: str) -> set[str]:
        manifest = self.read_manifest(name)
        return {row["digest"] for row in [*manifest["layers"], manifest["config"]]}

    def create(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = _model_of(body)
        self.manifest_path(name)
        files, adapters = body.get("files") or {}, body.get("adapters") or {}
        for file in [*files, *adapters]:
            if file.startswith("/") or {"", ".", ".."} & set(file.split("/")):
                raise Refused(400, "file path must be relative")
        if not files and not body.get("from"):
            raise Refused(400, "neither 'from' or 'files' was specified")
        if len(adapters) > 1:
            raise Refused(400, "only one adapter is currently supported")
        return self._create(name, body, files, adapters)

    def _create(
        self, name: str, body: dict[str, Any], files: dict[str, str], adapters: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        layers, config = self._inherited(body["from"]) if body.get("from") else ([], None)
        if self.newer_than(0, 34, 1):
            if adapters:
                raise Refused(400, "adapters are not supported; merge the adapter before importing")
            if body.get("quantize"):
                raise Refused(400, "quantize a GGUF with llama.cpp tools before importing")
            if any(file.endswith(".safetensors") for file in files):
                raise Refused(400, "safetensors models are imported with --experimental")
        elif body.get("quantize"):
            raise Refused(500, "llama-quantize unavailable: llama-quantize binary not found")
        for digest in [] if body.get("from") else [*files.values()]:
            yield {"status": "parsing GGUF"}
            kind, config = self._classify(digest, config)
            layers.append(self._layer(kind, digest))
        for digest in adapters.values():
            yield {"status": "converting adapter"}
            layers.append(self._layer(self._classify(digest, config)[0], digest))
        layers = self._with_texts(layers, body)
        for layer in layers:
            yield {"status": f"using existing layer {layer['digest']}"}
        for key in ("renderer", "parser", "requires"):
            if body.get(key):
                config = {**(config or {}), key: body[key]}
        digest = self.add_blob(json.dumps(config, separators=(",", ":")).encode() + b"\n")
        yield {"status": f"creating new layer {digest}"}
        yield {"status": "writing manifest"}
        config_layer = {**self._layer("", digest), "mediaType": "application/vnd.docker.container.image.v1+json"}
        media_type = "application/vnd.docker.distribution.manifest.v2+json"
        self.write_manifest(
            name, {"schemaVersion": 2, "mediaType": media_type, "config": config_layer, "layers": layers}
        )
        yield {"status": "success"}

    def _inherited(self, name: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        manifest = self.read_manifest(name)
        return list(manifest["layers"]), json.loads(self.blob_path(manifest["config"]["digest"]).read_text())

    def _classify(self, digest: str, config: dict[str, Any] | None) -> tuple[str, dict[str, Any] | None]:
        path = self.blob_path(digest)
        if not path.is_file():
            raise Refused(500, f"open {path}: no such file or directory")
        if path.read_bytes()[:4] != b"GGUF":
            raise Refused(400, "unknown type")
        keys = {key: _plain(item) for key, item in gguf.GGUFReader(path).fields.items()}
        kind = {"adapter": "adapter", "projector": "projector", "mmproj": "projector"}.get(
            keys.get("general.type", ""), "model"
        )
        if kind != "model":
            return kind, config
        family = keys["general.architecture"]
        file_type = gguf.LlamaFileType(keys.get("general.file_type", 0)).name.removeprefix("MOSTLY_")
        return kind, {
            "model_format": "gguf",
            "model_family": family,
            "model_families": [family],
            "model_type": "1K",
            "file_type": file_type.removeprefix("ALL_"),
            "architecture": "amd64",
            "os": "linux",
        }

    def _with_texts(self, layers: list[dict[str, Any]], body: dict[str, Any]) -> list[dict[str, Any]]:
        def replace(kind: str, content: bytes) -> None:
            layers[:] = [layer for layer in layers if layer["mediaType"] != LAYER + kind]
            layers.append(self._layer(kind, self.add_blob(content)))

        for kind in ("template", "system"):
            if body.get(kind):
                replace(kind, body[kind].encode())
        licenses = body.get("license") or []
        for text in [licenses] if isinstance(licenses, str) else licenses:
            layers.append(self._layer("license", self.add_blob(text.encode())))
        if body.get("parameters"):
            old = [row["digest"] for row in layers if row["mediaType"] == LAYER + "params"]
            merged = json.loads(self.blob_path(old[0]).read_text()) if old else {}
            replace("params", json.dumps(merged | body["parameters"], separators=(",", ":")).encode() + b"\n")
        if body.get("messages"):
            replace("messages", json.dumps(body["messages"], separators=(",", ":")).encode() + b"\n")
        return layers

    def _layer(self, kind: str, digest: str) -> dict[str, Any]:
        return {"mediaType": LAYER + kind, "digest": digest, "size": self.blob_path(digest).stat().st_size}

    def generate(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = _model_of(body)
        self.read_manifest(name)
        prompt = body.get("prompt", "")
        return self._speak(name, [{"role": "user", "content": prompt}] if prompt else [], "response")

    def chat(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        name = _model_of(body)
        self.read_manifest(name)
        return self._speak(name, body.get("messages") or [], "message")

    def _speak(self, name: str, messages: list[dict[str, Any]], key: str) -> Iterator[dict[str, Any]]:
        full = name if ":" in name else f"{name}:latest"
        self._loaded.add(full)
        words = re.findall(r"\S+\s*", self.answer(name, messages)) if messages else []

        def line(text: str, **more: Any) -> dict[str, Any]:
            said: Any = text if key == "response" else {"role": "assistant", "content": text}
            return {"model": name, "created_at": _now(), key: said, "done": False} | more

        for word in words:
            yield line(word)
        counts = {"prompt_eval_count": len(str(messages).split()), "eval_count": len(words)}
        spent = {"total_duration": 2000, "load_duration": 1000}
        yield line("", done=True, done_reason="stop" if messages else "load", **spent, **counts)


def _model_of(body: dict[str, Any]) -> str:
    name = body.get("model") or body.get("name")
    if not name:
        raise Refused(400, "model is required")
    return str(name)


def _now(seconds: float | None = None) -> str:
    moment = datetime.now(timezone.utc) if seconds is None else datetime.fromtimestamp(seconds, timezone.utc)
    return moment.isoformat()


def _plain(item: gguf.ReaderField) -> Any:
    return None if item.types[0] == gguf.GGUFValueType.ARRAY else item.contents()


def _handler_for(server: LoopbackOllama) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self) -> None:
            length = self.headers.get("Content-Length")
            body = self._read_chunked() if length is None else self.rfile.read(int(length))
            route = f"{self.command} {self.path}"
            server.requests.append(Request(route, {key.lower(): value for key, value in self.headers.items()}, body))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                failure = server.take_failure(route)
                if isinstance(failure, Slow):
                    time.sleep(failure.seconds)
                    failure = None
                if not _LOCAL_HOST.fullmatch(self.headers.get("Host", "")):
                    self._send(403, b"")
                elif isinstance(failure, Status):
                    kind = "application/json" if failure.body.startswith("{") else "text/plain"
                    self._send(failure.status, failure.body.encode(), kind)
                elif isinstance(failure, Redirect):
                    self._send(307, b"", Location=failure.location)
                else:
                    self._dispatch(body, failure)

        do_GET = do_HEAD = do_POST = do_DELETE = answer

        def _dispatch(self, body: bytes, failure: Failure | None) -> None:
            streams = {"/api/create": server.create, "/api/generate": server.generate, "/api/chat": server.chat}
            plain = {
                "GET /api/version": lambda _: {"version": server.version},
                "GET /api/tags": lambda _: server.tags(),
                "GET /api/ps": lambda _: server.ps(),
                "POST /api/show": server.show,
                "POST /api/copy": server.copy,
                "DELETE /api/delete": server.delete,
            }
            route = f"{self.command} {self.path}"
            try:
                if self.path.startswith("/api/blobs/"):
                    self._send(self._blob(self.path.removeprefix("/api/blobs/"), body), b"")
                elif self.command == "POST" and self.path in streams:
                    lines = streams[self.path](_json_body(body))
                    self._stream(lines, failure, json.loads(body).get("stream", True))
                elif route in plain:
                    document = plain[route](_json_body(body) if self.command != "GET" else {})
                    self._send(200, b"" if document is None else json.dumps(document).encode())
                else:
                    self._send(404, b"404 page not found", "text/plain")
            except Refused as exc:
                self._send(exc.status, json.dumps({"error": exc.message}).encode())

        def _blob(self, digest: str, body: bytes) -> int:
            path = server.blob_path(digest)
            if self.command == "HEAD" or path.is_file():
                return 200 if path.is_file() else 404
            if server.add_blob(body) != digest:
                raise Refused(400, f'digest mismatch, expected "{digest}"')
            return 201

        def _stream(self, lines: Iterator[dict[str, Any]], failure: Failure | None, streamed: bool) -> None:
            if not streamed:
                last = list(lines)[-1]
                self._send(200, json.dumps(last).encode())
                return
            first = next(lines)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-ndjson")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            count = 0
            try:
                for line in _chain(first, lines):
                    if isinstance(failure, (ErrorLine, Cut, EarlyEnd)) and count == failure.after_lines:
                        break
                    self._chunk(json.dumps(line).encode() + b"\n")
                    count += 1
            except Refused as exc:
                self._chunk(json.dumps({"error": exc.message}).encode() + b"\n")
            if isinstance(failure, ErrorLine):
                self._chunk(json.dumps({"error": failure.message}).encode() + b"\n")
            if isinstance(failure, Cut):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(b"0\r\n\r\n")

        def _chunk(self, content: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
            self.wfile.flush()

        def _send(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            for key, value in headers.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _read_chunked(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

    return Handler


def _chain(first: dict[str, Any], rest: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from rest


def _json_body(body: bytes) -> dict[str, Any]:
    if not body:
        raise Refused(400, "missing request body")
    return json.loads(body)
