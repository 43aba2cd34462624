"""The one door to a running Ollama: its version, its models, creating from blobs, generating.

In: names, digests, Modelfiles. Out: frozen values and `ServerError`s. The official client speaks the endpoints that it
knows whole; blobs (by digest, streamed once), `/api/create` (renderer, parser and requires) and `/api/version`, which
it does not, go over httpx. No token is sent, and no redirect is followed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ollama_forge.errors import NotFoundError, ServerError
from ollama_forge.files import COPY_CHUNK_BYTES, Advance, disk_error, hash_file
from ollama_forge.store.digest import Digest
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.server_address import ServerAddress, find_address, parse_address
from ollama_forge.store.server_connection import ServerConnection, raise_for_status
from ollama_forge.store.server_features import ServerFeatures, features_of
from ollama_forge.store.server_replies import (
    LoadedModel,
    Progress,
    ServerAnswer,
    ServerModel,
    ServerModelDetails,
    loaded_model,
    model_details,
    progress,
    server_model,
)

__all__ = ["LoadedModel", "OllamaServer", "Progress", "ServerAnswer", "ServerModel", "ServerModelDetails"]

ANSWER_TIMEOUT_SECONDS = 60.0
WORK_TIMEOUT_SECONDS = 3600.0
_FROM_BLOB = re.compile(r"^FROM (.*[/\\]blobs[/\\]sha256-[0-9a-f]{64})$", re.MULTILINE)


class OllamaServer:
    """A running Ollama. Close it, or use it in a `with` block. Making one connects to nothing.

    Args:
        host: as in `OLLAMA_HOST`; None: what that variable says, or Ollama's default.
        answer_timeout_seconds: longest silence of a short request.
        work_timeout_seconds: longest silence of a long one (create, generate, pull).

    Raises:
        UsageError: `host` is not an address.
    """

    def __init__(
        self,
        host: str | ServerAddress | None = None,
        *,
        answer_timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
        work_timeout_seconds: float = WORK_TIMEOUT_SECONDS,
    ) -> None:
        self.address = (
            host if isinstance(host, ServerAddress) else find_address() if host is None else parse_address(host)
        )
        self._connection = ServerConnection(
            self.address, answer_timeout_seconds=answer_timeout_seconds, work_timeout_seconds=work_timeout_seconds
        )
        self._features: ServerFeatures | None = None

    def __enter__(self) -> OllamaServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._connection.close()

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, judged by its address."""
        return self.address.is_local

    def version(self) -> str:
        """The version that the server tells, for example `0.33.0`.

        Raises:
            ServerError: nothing answers, or something that is not Ollama.
        """
        version = self._connection.get("/api/version").get("version")
        if not isinstance(version, str) or not version:
            raise self._connection.not_ollama(f"/api/version answered {version!r}")
        return version

    def features(self) -> ServerFeatures:
        """What this server can do; asked once."""
        if self._features is None:
            self._features = features_of(self.version())
        return self._features

    def tags(self) -> list[ServerModel]:
        """The models that it has, newest first."""
        with self._connection.client_errors("list its models"):
            return [server_model(model) for model in self._connection.client().list().models]

    def ps(self) -> list[LoadedModel]:
        """The models in its memory."""
        with self._connection.client_errors("list the loaded models"):
            return [loaded_model(model) for model in self._connection.client().ps().models]

    def show(self, name: str) -> ServerModelDetails:
        """All about one model.

        Raises:
            NotFoundError: the server does not have it.
            ServerError: it cannot tell.
        """
        with self._connection.client_errors(f"show {name!r}", name):
            return model_details(self._connection.client().show(name))

    def has(self, name: str) -> bool:
        """Whether the server has that model."""
        try:
            self.show(name)
        except NotFoundError:
            return False
        return True

    def find_models_dir(self) -> Path | None:
        """The store that the running server uses, as its models' FROM lines tell it; None when it has no local model.

        It is a path on the server's machine.
        """
        for model in self.tags():
            if match := _FROM_BLOB.search(self.show(model.name).modelfile):
                return Path(match[1]).parent.parent
        return None

    def copy(self, source: str, destination: str) -> None:
        """Give a model a second name."""
        with self._connection.client_errors(f"copy {source!r}", source):
            self._connection.client().copy(source, destination)

    def delete(self, name: str) -> None:
        """Remove a name, and the blobs that no other model uses."""
        with self._connection.client_errors(f"delete {name!r}", name):
            self._connection.client().delete(name)

    def has_blob(self, digest: Digest) -> bool:
        """Whether the server has those bytes."""
        with self._connection.errors("look for a blob"):
            response = self._connection.wire().head(f"/api/blobs/{digest}")
            if response.status_code == 404:
                return False
            raise_for_status(response)
        return True

    def upload_blob(self, path: Path, digest: Digest | None = None, advance: Advance | None = None) -> Digest:
        """Send a file, unless the server has it already.

        Args:
            digest: of its content, where it is known; else the file is read once more to find it.
            advance: called with the number of bytes sent, or skipped because the server has them.

        Raises:
            NotFoundError: there is no such file.
            ServerError: the server refused it, or the file changed meanwhile.
        """
        digest = digest or Digest(hash_file(path).sha256)
        size_bytes = _file_size(path)
        if self.has_blob(digest):
            if advance:
                advance(size_bytes)
            return digest
        with self._connection.errors(f"take {path.name!r}"):
            response = self._connection.wire().post(
                f"/api/blobs/{digest}",
                content=_chunks(path, advance),
                headers={"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"},
                timeout=self._connection.timeout(self._connection.work_timeout_seconds),
            )
            raise_for_status(response)
        return digest

    def create_from_blobs(
        self,
        name: str,
        *,
        files: Mapping[str, Digest] | None = None,
        adapters: Mapping[str, Digest] | None = None,
        source: str | None = None,
        modelfile: Modelfile | None = None,
        quantize: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        """Make a model of blobs that the server has, or of a model that it has (`source`).

        Args:
            files: file name -> digest of the model's (and projector's) GGUF files.
            adapters: file name -> digest of LoRA GGUFs.
            modelfile: what else it says; its FROM and ADAPTER lines are not looked at.
            quantize: only for servers whose features say so.

        Raises:
            ServerError: the server cannot do that, by its version or by its answer.
        """
        modelfile = modelfile or Modelfile()
        self._require_features(modelfile, adapters=bool(adapters), quantize=quantize)
        body = {
            "model": name,
            "from": source,
            "files": {file: str(digest) for file, digest in (files or {}).items()},
            "adapters": {file: str(digest) for file, digest in (adapters or {}).items()},
            "quantize": quantize,
            "template": modelfile.template,
            "system": modelfile.system,
            "license": list(modelfile.licenses),
            "parameters": {
                key: list(value) if isinstance(value, tuple) else value for key, value in modelfile.parameters
            },
            "messages": [{"role": turn.role, "content": turn.content} for turn in modelfile.messages],
            "renderer": modelfile.renderer,
            "parser": modelfile.parser,
            "requires": modelfile.requires,
        }
        wanted = {key: value for key, value in body.items() if value not in (None, {}, [])}
        last = ""
        for line in self._connection.post_stream("/api/create", wanted, f"create {name!r}", source):
            last = str(line.get("status") or "")
            if on_progress:
                on_progress(progress(line))
        if last != "success":
            raise self._connection.broke_off(f"create {name!r}", f"the last thing it said was {last!r}")

    def pull(self, name: str, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Have the server fetch a model from its registry."""
        last = ""
        client = self._connection.client(self._connection.work_timeout_seconds)
        for event in self._connection.guard(lambda: client.pull(name, stream=True), f"pull {name!r}"):
            last = event.status or ""
            if on_progress:
                on_progress(Progress(last, event.digest or "", event.total or 0, event.completed or 0))
        if last != "success":
            raise self._connection.broke_off(f"pull {name!r}", f"the last thing it said was {last!r}")

    def generate(
        self,
        name: str,
        prompt: str,
        *,
        options: Mapping[str, Any] | None = None,
        system: str | None = None,
        raw: bool = False,
        keep_alive: str | float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> ServerAnswer:
        """Answer one prompt.

        Args:
            options: Modelfile parameters that hold for this request.
            raw: the prompt is complete: no template, no system text.
            keep_alive: how long the model stays loaded (`"5m"`, seconds, negative: for ever).
            on_text: called with each piece of text as it comes.

        Raises:
            NotFoundError: the server does not have the model.
            ServerError: it cannot load or run it.
        """
        started = time.monotonic()
        client = self._connection.client(self._connection.work_timeout_seconds)
        events = self._connection.guard(
            lambda: client.generate(
                model=name,
                prompt=prompt,
                system=system or "",
                raw=raw,
                stream=True,
                options=_plain_options(options),
                keep_alive=keep_alive,
            ),
            f"run {name!r}",
            name,
        )
        pieces = ((event.response or "", event.thinking or "", event) for event in events)
        return self._read_answer(pieces, name, started, on_text)

    def chat(
        self,
        name: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        options: Mapping[str, Any] | None = None,
        keep_alive: str | float | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> ServerAnswer:
        """Answer a conversation with the model's own template; see `generate`."""
        started = time.monotonic()
        client = self._connection.client(self._connection.work_timeout_seconds)
        events = self._connection.guard(
            lambda: client.chat(
                model=name,
                messages=list(messages),
                stream=True,
                options=_plain_options(options),
                keep_alive=keep_alive,
            ),
            f"run {name!r}",
            name,
        )
        pieces = ((event.message.content or "", event.message.thinking or "", event) for event in events)
        return self._read_answer(pieces, name, started, on_text)

    def _read_answer(
        self,
        pieces: Iterator[tuple[str, str, Any]],
        name: str,
        started: float,
        on_text: Callable[[str], None] | None,
    ) -> ServerAnswer:
        text: list[str] = []
        thinking: list[str] = []
        last: Any = None
        for piece, thought, event in pieces:
            last = event
            thinking.append(thought)
            if piece:
                text.append(piece)
                if on_text:
                    on_text(piece)
        if last is None or not last.done:
            raise self._connection.broke_off(f"run {name!r}", f"{len(text)} pieces of text had come")
        return ServerAnswer(
            text="".join(text),
            thinking="".join(thinking),
            stop_reason=last.done_reason or "stop",
            prompt_tokens=last.prompt_eval_count or 0,
            n_tokens=last.eval_count or 0,
            seconds=time.monotonic() - started,
        )

    def _require_features(self, modelfile: Modelfile, *, adapters: bool, quantize: str | None) -> None:
        features = self.features()
        merged = "Merge the adapter into the model first (--merge), or write to its store on the server's own machine."
        wanted = [
            (
                True,
                features.creates_from_blobs,
                "create a model from uploaded files",
                "Update Ollama to 0.5.5 or newer.",
            ),
            (adapters, features.creates_adapters, "create a model with an adapter", merged),
            (
                quantize is not None,
                features.quantizes,
                "quantize",
                f"Quantize first: ollama-forge quantize MODEL --type {quantize} -o OUT.gguf",
            ),
            (
                modelfile.renderer is not None or modelfile.parser is not None,
                features.takes_renderer,
                "take RENDERER or PARSER",
                "Update Ollama to 0.12.0 or newer, or leave these lines out.",
            ),
            (
                modelfile.requires is not None,
                features.takes_requires,
                "take REQUIRES",
                "Update Ollama to 0.14.0 or newer, or leave this line out.",
            ),
        ]
        for is_asked, is_able, what, advice in wanted:
            if is_asked and not is_able:
                raise ServerError(
                    f"Ollama {features.version} at {self.address.url} cannot {what}",
                    why="Its version says so." if features.is_known else "A build without a version is taken for new.",
                    next=advice,
                )


def _plain_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (options or {}).items()}


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as exc:
        raise NotFoundError(f"There is no file {str(path)!r}", next="Check the path.") from exc
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc


def _chunks(path: Path, advance: Advance | None) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(COPY_CHUNK_BYTES):
                yield chunk
                if advance:
                    advance(len(chunk))
    except OSError as exc:
        raise disk_error(exc, path, "read") from exc
