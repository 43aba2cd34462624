"""Land a model in an Ollama that runs elsewhere: blobs and `/api/create` instead of files in a store.

In: a GGUF file, or the name of a model that the server has, and a Modelfile's wishes. Out: `RemoteLanding`. What
was not there before is deleted again when the model does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import CheckError, ServerError
from ollama_forge.files import Advance, Progress
from ollama_forge.jobs.check import CHECK_TOKENS, QUESTION, CheckReport
from ollama_forge.store.discard import exists_error
from ollama_forge.store.modelfile import Modelfile
from ollama_forge.store.name import parse_name, validate_writable
from ollama_forge.store.server import OllamaServer


@dataclass(frozen=True)
class RemoteLanding:
    """A model on a server. `sent_bytes` went over the wire; blobs that the server had did not."""

    name: str
    digest: str
    server: str
    sent_bytes: int
    shared_bytes: int
    replaced: bool
    check: CheckReport | None


def land_remote(
    server: OllamaServer,
    name: str,
    changes: Modelfile,
    *,
    gguf_path: Path | None = None,
    source: str | None = None,
    adapters: Sequence[Path] = (),
    overwrite: bool = False,
    check: bool = True,
    progress: Progress,
) -> RemoteLanding:
    """Make a model on a server.

    Raises:
        ExistsError: the server has a model of that name and `overwrite` is false.
        ServerError: it is out of reach, too old, or refused.
        CheckError: the model does not run there; it was deleted again, unless it replaced another.
    """
    wanted = parse_name(name)
    validate_writable(wanted)
    replaced = server.has(name)
    if replaced and not overwrite:
        raise exists_error(wanted)
    sent = shared = 0
    files = {}
    for role, path in [("model", gguf_path), *(("adapter", adapter) for adapter in adapters)]:
        if path is None:
            continue
        size_bytes = path.stat().st_size
        with progress(f"Sending the {role}", 2 * size_bytes) as advance:
            counter = _Counter(advance)
            digest = server.upload_blob(path, advance=counter)
        was_sent = counter.count > size_bytes
        sent += size_bytes if was_sent else 0
        shared += 0 if was_sent else size_bytes
        files[(role, path.name)] = digest
    server.create_from_blobs(
        name,
        files={file: digest for (role, file), digest in files.items() if role == "model"},
        adapters={file: digest for (role, file), digest in files.items() if role == "adapter"},
        source=source,
        modelfile=changes,
    )
    report = _check(server, name, may_delete=not replaced) if check else None
    digest_text = next((model.digest for model in server.tags() if parse_name(model.name) == wanted), "")
    return RemoteLanding(wanted.display, digest_text, server.address.url, sent, shared, replaced, report)


class _Counter:
    """Bytes that passed: hashing a file passes them once, sending it a second time."""

    def __init__(self, advance: Advance) -> None:
        self.count = 0
        self._advance = advance

    def __call__(self, count: int) -> None:
        self.count += count
        self._advance(count)


def _check(server: OllamaServer, name: str, *, may_delete: bool) -> CheckReport:
    try:
        options = {"temperature": 0.0, "num_predict": CHECK_TOKENS}
        said = server.chat(name, [{"role": "user", "content": QUESTION}], options=options)
    except ServerError as exc:
        if may_delete:
            server.delete(name)
        raise CheckError(
            f"{name!r} does not run on {server.address.url}" + (" and was deleted there" if may_delete else ""),
            why=exc.what,
            next=exc.next or "Check the server's log.",
        ) from exc
    return CheckReport(loaded=True, template="server", stopped=said.stop_reason == "stop", sample=said.text)
