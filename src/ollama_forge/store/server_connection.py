"""The wire to a running Ollama: connections, time limits, streams, and what goes wrong on it.

In: an address. Out: an httpx client and the official client, both without tokens and redirects, and errors of this
project in place of theirs. What is asked belongs to `server`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from ollama_forge.errors import NotFoundError, ServerError
from ollama_forge.store.server_address import ServerAddress

if TYPE_CHECKING:
    import httpx
    import ollama

CONNECT_TIMEOUT_SECONDS = 5.0
_ERROR_TEXT_LIMIT = 2000


T = TypeVar("T")


class _Refused(Exception):
    """The server's own words; `status` is -1 for an error told after the answer had begun with status 200."""

    def __init__(self, message: str, status: int = -1) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class ServerConnection:
    """Connections to one address, opened when they are first used. The clients are imported only then."""

    def __init__(self, address: ServerAddress, *, answer_timeout_seconds: float, work_timeout_seconds: float) -> None:
        self.address = address
        self.answer_timeout_seconds = answer_timeout_seconds
        self.work_timeout_seconds = work_timeout_seconds
        self._closing = contextlib.ExitStack()
        self._wire_opened: httpx.Client | None = None
        self._clients: dict[float, ollama.Client] = {}

    def close(self) -> None:
        """Close what is open; using it again opens it again."""
        self._closing.close()
        self._wire_opened = None
        self._clients.clear()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        with self.errors(f"answer {path}"):
            response = self.wire().get(path)
            raise_for_status(response)
            document = response.json()
        if not isinstance(document, dict):
            raise self.not_ollama(f"{path} answered {str(document)[:100]!r}")
        return document

    def post_stream(self, path: str, body: Any, doing: str, model: str | None) -> Iterator[dict[str, Any]]:
        """The lines of a streamed answer."""
        with (
            self.errors(doing, model),
            self.wire().stream("POST", path, json=body, timeout=self.timeout(self.work_timeout_seconds)) as response,
        ):
            if response.is_error or response.is_redirect:
                response.read()
            raise_for_status(response)
            for line in response.iter_lines():
                document = json.loads(line)
                if not isinstance(document, dict):
                    raise self.not_ollama(f"{path} answered {line[:100]!r}")
                if document.get("error"):
                    # A server that has begun to answer with status 200 tells of errors this way.
                    raise _Refused(str(document["error"]))
                yield document

    def wire(self) -> httpx.Client:
        """For what the official client does not know."""
        if self._wire_opened is None:
            import httpx

            self._wire_opened = self._closing.enter_context(
                httpx.Client(
                    base_url=self.address.url,
                    timeout=self.timeout(self.answer_timeout_seconds),
                    headers={"User-Agent": "ollama-forge"},
                    follow_redirects=False,
                    trust_env=not self.address.is_local,
                )
            )
        return self._wire_opened

    def client(self, timeout_seconds: float | None = None) -> ollama.Client:
        """The official client, with that limit on its silence."""
        import ollama

        seconds = self.answer_timeout_seconds if timeout_seconds is None else timeout_seconds
        if seconds not in self._clients:
            self._clients[seconds] = self._closing.enter_context(
                ollama.Client(
                    host=self.address.url,
                    timeout=self.timeout(seconds),
                    follow_redirects=False,
                    trust_env=not self.address.is_local,
                    # The client adds OLLAMA_API_KEY by itself, whatever the host.
                    event_hooks={"request": [_drop_authorization]},
                )
            )
        return self._clients[seconds]

    def timeout(self, seconds: float) -> httpx.Timeout:
        """That limit on silence, and a short one on connecting."""
        import httpx

        return httpx.Timeout(seconds, connect=min(seconds, CONNECT_TIMEOUT_SECONDS))

    @contextlib.contextmanager
    def errors(self, doing: str, model: str | None = None) -> Iterator[None]:
        """Turn what httpx raises, and a refusal, into errors of this project."""
        import httpx

        try:
            yield
        except _Refused as exc:
            raise self._refusal(exc, doing, model) from exc
        except httpx.TimeoutException as exc:
            raise ServerError(
                f"Ollama at {self.address.url} did not {doing} in time",
                why=f"{type(exc).__name__}: no answer came.",
                next="See what it is doing (ollama ps), or start it again.",
            ) from exc
        except (ConnectionError, httpx.ConnectError) as exc:
            raise self._unreachable() from exc
        except (httpx.HTTPError, httpx.StreamError) as exc:
            raise self.broke_off(doing, str(exc) or type(exc).__name__) from exc
        except (json.JSONDecodeError, UnicodeDecodeError) as exc:
            raise self.not_ollama(f"Its answer is not JSON: {exc}") from exc

    @contextlib.contextmanager
    def client_errors(self, doing: str, model: str | None = None) -> Iterator[None]:
        """The same around calls of the official client."""
        import ollama
        import pydantic

        with self.errors(doing, model):
            try:
                yield
            except ollama.ResponseError as exc:
                raise _Refused(str(exc.error), exc.status_code) from exc
            except pydantic.ValidationError as exc:
                raise self.not_ollama(str(exc)[:300]) from exc

    def guard(self, start: Callable[[], Iterable[T]], doing: str, model: str | None = None) -> Iterator[T]:
        """The events of a stream. What the caller raises between two of them is not taken for the server's."""
        with self.client_errors(doing, model):
            yield from start()

    def _refusal(self, exc: _Refused, doing: str, model: str | None) -> ServerError | NotFoundError:
        message = exc.message.strip()[:_ERROR_TEXT_LIMIT]
        what = f"Ollama at {self.address.url} did not {doing}: {message or f'status {exc.status}'}"
        if 300 <= exc.status < 400:
            return ServerError(
                f"{self.address.url} redirects elsewhere",
                why="A redirect is not followed: models are not sent to a place that you did not name.",
                next="Set OLLAMA_HOST to the address where Ollama really is.",
            )
        if exc.status == 404 and model and message.startswith("model "):
            return NotFoundError(what, next="See which models it has: ollama-forge list --server")
        advice = {
            401: "Sign in with `ollama signin`, or use another server.",
            403: "A server bound to loopback only answers to local names: check OLLAMA_HOST, here and there.",
            503: "It is busy: try again in a moment.",
        }
        return ServerError(what, next=advice.get(exc.status, "See the server's log (ollama serve prints it)."))

    def _unreachable(self) -> ServerError:
        return ServerError(
            f"No Ollama answers at {self.address.url}",
            why="The connection was refused, or the host is unknown.",
            next="Start it with `ollama serve`, or set OLLAMA_HOST to where it runs.",
        )

    def broke_off(self, doing: str, why: str) -> ServerError:
        """The error for an answer that ended too early."""
        return ServerError(
            f"Ollama at {self.address.url} broke off when it was to {doing}",
            why=why[:_ERROR_TEXT_LIMIT],
            next="Look into the server's log, then try again.",
        )

    def not_ollama(self, why: str) -> ServerError:
        """The error for an answer that no Ollama gives."""
        return ServerError(
            f"What answers at {self.address.url} is not Ollama",
            why=why,
            next="Check OLLAMA_HOST.",
        )


def _drop_authorization(request: httpx.Request) -> None:
    request.headers.pop("authorization", None)


def raise_for_status(response: httpx.Response) -> None:
    """Raise what `ServerConnection.errors` turns into words. The body must have been read."""
    if response.is_success:
        return
    message = response.text
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        message = str(json.loads(message).get("error", message))
    raise _Refused(message, response.status_code)
