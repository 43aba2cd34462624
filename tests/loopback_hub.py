"""A small Hugging Face Hub on 127.0.0.1: the true paths, headers and statuses, over repos that a test makes up.

    with LoopbackHub() as hub:
        hub.add("org/model", {"config.json": b"{}", "model.safetensors": weights})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.fail("GET /cdn/", Cut(after_bytes=1000))     # the next such request is cut

Small files are answered through the Hub's relative redirect, weights (LFS) through a redirect to a second server, as
the Hub does with its content network. Nothing of ollama_forge and of huggingface_hub is used here.
Facts: https://huggingface.co/docs/hub/api and the headers that huggingface_hub's client reads.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".h5", ".onnx", ".msgpack")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Status:
    """Refuse with a status."""

    status: int
    code: str = ""
    message: str = ""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Cut:
    """Promise everything, send this many bytes of the body, then close the connection."""

    after_bytes: int


@dataclass(frozen=True)
class Stall:
    """Promise everything, send this many bytes of the body, then nothing more until the server ends."""

    after_bytes: int


@dataclass(frozen=True)
class Tampered:
    """Send other bytes of the same length."""


@dataclass(frozen=True)
class WholeInstead:
    """Ignore the Range header and send everything with status 200."""


Failure = Status | Cut | Stall | Tampered | WholeInstead


@dataclass(frozen=True)
class Request:
    """A request that came: `route` is `METHOD /path`."""

    route: str
    headers: dict[str, str]

    @property
    def range(self) -> str:
        return self.headers.get("range", "")

    @property
    def is_authorized(self) -> bool:
        return "authorization" in self.headers


@dataclass
class Repo:
    """One repo: its commits, and what branches and tags mean."""

    id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    downloads: int = 0
    is_gated: bool = False
    is_private: bool = False


@dataclass
class LoopbackHub:
    """The server. `tokens` open gated and private repos; `known_tokens` log in but open nothing."""

    tokens: tuple[str, ...] = ("hf_good",)
    known_tokens: tuple[str, ...] = ("hf_stranger",)
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    on_request: Callable[[Request], None] = lambda _request: None
    ended: threading.Event = field(default_factory=threading.Event)
    _failures: list[tuple[str, list[Failure]]] = field(default_factory=list)

    def __enter__(self) -> LoopbackHub:
        self._servers = []
        for kind in (_HubHandler, _CdnHandler):
            server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": self}))
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
            self._servers.append(server)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.ended.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def add(self, repo_id: str, files: Mapping[str, bytes], *, ref: str = "main", **facts: Any) -> str:
        """Put a commit under a branch or tag; gives the commit."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id))
        for name, value in facts.items():
            setattr(repo, name, value)
        seed = json.dumps([repo_id, ref, len(repo.commits), {p: sha256(b) for p, b in sorted(files.items())}])
        commit = hashlib.sha1(seed.encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs[ref] = commit
        return commit

    def change(self, repo_id: str, path: str, content: bytes) -> None:
        """Do what no honest Hub does: other bytes under commits that exist already."""
        for files in self.repos[repo_id].commits.values():
            files[path] = content

    def fail(self, route: str, *failures: Failure) -> None:
        """The next requests whose `METHOD /path` begins with `route` fail so, one after the other."""
        self._failures.append((route, list(failures)))

    def count(self, route: str) -> int:
        """How many requests began so."""
        return sum(request.route.startswith(route) for request in self.requests)

    def next_failure(self, route: str) -> Failure | None:
        for start, failures in self._failures:
            if failures and route.startswith(start):
                return failures.pop(0)
        return None


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_ENDINGS)


def etag_of(path: str, content: bytes) -> str:
    return sha256(content) if is_lfs(path) else git_sha1(content)


def file_entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as `siblings` of `?blobs=true` lists it."""
    entry: dict[str, Any] = {"rfilename": path, "blobId": git_sha1(content), "size": len(content)}
    if is_lfs(path):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\nsize {len(content)}\n"
        entry["blobId"] = git_sha1(pointer.encode())
        entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": len(pointer)}
    return entry


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    server_version = "LoopbackHub"

    def log_message(self, *_args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        route = f"{self.command} {path}"
        request = Request(route, {key.lower(): value for key, value in self.headers.items()})
        self.hub.requests.append(request)
        self.hub.on_request(request)
        self.failure = self.hub.next_failure(route)
        if isinstance(self.failure, Status):
            self.refuse(self.failure.status, self.failure.code, self.failure.message, self.failure.headers)
            return
        self.route(path, parse_qs(parts.query))

    def route(self, path: str, query: Mapping[str, Sequence[str]]) -> None:
        raise NotImplementedError

    def refuse(self, status: int, code: str = "", message: str = "", headers: Sequence[tuple[str, str]] = ()) -> None:
        more = [*headers]
        if code:
            more.append(("X-Error-Code", code))
        if message:
            more.append(("X-Error-Message", message))
        self.send(status, json.dumps({"error": message or code or str(status)}).encode(), more)

    def send(self, status: int, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if isinstance(self.failure, Cut):
            self.wfile.write(body[: self.failure.after_bytes])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(self.failure, Stall):
            self.wfile.write(body[: self.failure.after_bytes])
            self.wfile.flush()
            self.hub.ended.wait(60)
            self.close_connection = True
            return
        self.wfile.write(body)

    def send_content(self, content: bytes, headers: Sequence[tuple[str, str]] = ()) -> None:
        """A file, or the part of it that a Range header asks for."""
        if isinstance(self.failure, Tampered):
            content = bytes(byte ^ 1 for byte in content[:64]) + content[64:]
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        headers = [*headers, ("Accept-Ranges", "bytes"), ("Content-Type", "application/octet-stream")]
        if asked is None or isinstance(self.failure, WholeInstead):
            self.send(200, content, headers)
            return
        first = int(asked[1])
        last = min(int(asked[2]) if asked[2] else len(content) - 1, len(content) - 1)
        if first >= len(content):
            self.send(416, b"", [*headers, ("Content-Range", f"bytes */{len(content)}")])
            return
        self.send(206, content[first : last + 1], [*headers, ("Content-Range", f"bytes {first}-{last}/{len(content)}")])


class _HubHandler(_Handler):
    def route(self, path: str, query: Mapping[str, Sequence[str]]) -> None:
        if path == "/api/models":
            self._search(query)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main", query)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path):
            self._small_file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], unquote(match[2]), match[3])
        else:
            self.refuse(404)

    def _find(self, repo_id: str, revision: str) -> tuple[Repo, str] | None:
        """The repo and the commit, when this request may see them; else the refusal is sent."""
        repo = self.hub.repos.get(repo_id)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (*self.hub.tokens, *self.hub.known_tokens):
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.is_private and token not in self.hub.tokens):
            # Without a token the Hub does not say whether a repo exists.
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif not (commit := repo.refs.get(revision, revision if revision in repo.commits else "")):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def _may_read(self, repo: Repo) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.is_gated and token not in self.hub.tokens:
            message = f"Access to model {repo.id} is restricted."
            self.refuse(403 if token else 401, "GatedRepo", message)
            return False
        return True

    def _document(self, repo: Repo, commit: str, *, blobs: bool) -> dict[str, Any]:
        files = repo.commits[commit]
        siblings = [file_entry(path, body) if blobs else {"rfilename": path} for path, body in sorted(files.items())]
        return {
            "_id": git_sha1(repo.id.encode())[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.id.split("/")[0],
            "sha": commit,
            "lastModified": "2026-01-02T03:04:05.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": repo.is_private,
            "gated": "manual" if repo.is_gated else False,
            "disabled": False,
            "downloads": repo.downloads,
            "likes": repo.downloads // 10,
            "tags": list(repo.tags),
            "cardData": repo.card,
            "config": repo.config,
            "siblings": siblings,
        }

    def _info(self, repo_id: str, revision: str, query: Mapping[str, Sequence[str]]) -> None:
        if found := self._find(repo_id, revision):
            document = self._document(*found, blobs="blobs" in query)
            self.send(200, json.dumps(document).encode(), [("Content-Type", "application/json")])

    def _tree(self, repo_id: str, revision: str) -> None:
        found = self._find(repo_id, revision)
        if not found:
            return
        repo, commit = found
        rows = []
        for path, body in sorted(repo.commits[commit].items()):
            entry = file_entry(path, body)
            row = {"type": "file", "oid": entry["blobId"], "size": len(body), "path": path}
            if "lfs" in entry:
                row["lfs"] = {"oid": sha256(body), "size": len(body), "pointerSize": entry["lfs"]["pointerSize"]}
            rows.append(row)
        self.send(200, json.dumps(rows).encode(), [("Content-Type", "application/json")])

    def _search(self, query: Mapping[str, Sequence[str]]) -> None:
        words = " ".join(query.get("search", [])).lower().split()
        tags = query.get("filter", [])
        found = [
            repo
            for repo in self.hub.repos.values()
            if all(word in repo.id.lower() for word in words) and all(tag in repo.tags for tag in tags)
        ]
        found.sort(key=lambda repo: -repo.downloads)
        limit = int(query.get("limit", ["1000"])[0])
        rows = [self._document(repo, repo.refs["main"], blobs=False) for repo in found[:limit]]
        self.send(200, json.dumps(rows).encode(), [("Content-Type", "application/json")])

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        found = self._find(repo_id, revision)
        if not found or not self._may_read(found[0]):
            return
        repo, commit = found
        content = repo.commits[commit].get(path)
        if content is None:
            self.send(404, b"Entry not found", [("X-Error-Code", "EntryNotFound"), ("X-Repo-Commit", commit)])
            return
        headers = [("X-Repo-Commit", commit), ("X-Linked-Size", str(len(content)))]
        headers.append(("X-Linked-Etag", f'"{etag_of(path, content)}"'))
        if is_lfs(path):
            target = f"{self.hub.cdn_url}/cdn/{repo_id}/{commit}/{path}?X-Amz-Signature=0123"
            self.send(302, b"", [*headers, ("Location", target)])
        else:
            self.send(307, b"", [*headers, ("Location", f"/api/resolve-cache/models/{repo_id}/{commit}/{path}")])

    def _small_file(self, repo_id: str, commit: str, path: str) -> None:
        content = self.hub.repos[repo_id].commits[commit][path]
        etag = etag_of(path, content)
        self.send_content(content, [("X-Repo-Commit", commit), ("ETag", f'"{etag}"')])


class _CdnHandler(_Handler):
    def route(self, path: str, query: Mapping[str, Sequence[str]]) -> None:
        match = re.fullmatch(r"/cdn/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)", path)
        if match is None or "X-Amz-Signature" not in query:
            self.refuse(403)
            return
        content = self.hub.repos[match[1]].commits[match[2]][match[3]]
        self.send_content(content, [("ETag", f'"{sha256(content)[:32]}"')])
