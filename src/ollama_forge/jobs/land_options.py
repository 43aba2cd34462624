"""How to land a model in Ollama: the wishes alone, for commands that perhaps do not land anything."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ollama_forge.files import Progress, no_progress
from ollama_forge.store.server_address import find_address

if TYPE_CHECKING:
    from ollama_forge.store.server import OllamaServer


@dataclass(frozen=True)
class LandOptions:
    """How to land: the same for every job.

    Attributes:
        store_path: the models folder; None: Ollama's own.
        server: land there through its API instead of in a store.
        check: run the model before it gets its name.
    """

    store_path: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    check: bool = True
    progress: Progress = no_progress
    server: OllamaServer | None = None


def find_remote_server(host: str | None, store_path: Path | None) -> OllamaServer | None:
    """The server to land on, when it is not the store of this machine: `host`, or an `OLLAMA_HOST` elsewhere."""
    if host is None and (store_path is not None or find_address().is_local):
        return None
    from ollama_forge.store.server import OllamaServer

    return OllamaServer() if host is None else OllamaServer(host)


def removal_command(name: str, options: LandOptions) -> str:
    """What to type to take a landed model back; it works where it was landed."""
    if options.server is not None:
        return f"ollama rm {name}"
    return f"ollama-forge rm {name}" + (
        f" --store {shlex.quote(str(options.store_path))}" if options.store_path else ""
    )


def require_landable(name: str, options: LandOptions) -> None:
    """Refuse, before any work, a name that could not be landed under.

    Raises:
        NameInvalidError: Ollama refuses it.
        ExistsError: a model of the store has it, and `options.overwrite` is false.
    """
    from ollama_forge.store.catalog import open_store
    from ollama_forge.store.land import require_free_name
    from ollama_forge.store.name import parse_name, validate_writable

    validate_writable(parse_name(name))
    if options.server is None:
        require_free_name(open_store(options.store_path), name, overwrite=options.overwrite)
