"""What Ollama has here: its store, whose it is and whether it is whole; its server, and what that version can create.

In: this machine. Out: findings. Nothing is hashed and nothing is changed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError
from ollama_forge.jobs.environment import Finding, State
from ollama_forge.jobs.external_program import find_program
from ollama_forge.store.catalog import Store, open_store
from ollama_forge.store.location import find_store_locations, has_manifests
from ollama_forge.store.server import OllamaServer
from ollama_forge.store.server_features import ServerFeatures
from ollama_forge.store.verify import verify_store

_ANSWER_TIMEOUT_SECONDS = 5.0
_FEATURES = {
    "creates_from_blobs": "create models from uploaded files",
    "creates_adapters": "create models with an adapter",
    "quantizes": "quantize",
    "converts": "convert safetensors",
    "takes_renderer": "take RENDERER and PARSER",
    "takes_requires": "take REQUIRES",
    "uses_native_templates": "use the model's own chat template",
    "takes_split_gguf": "take models in several files",
}


def store_findings(store_path: Path | None) -> list[Finding]:
    """The store: where and why there, readable, whose, whole at a quick look; and other stores on this machine."""
    try:
        store = open_store(store_path)
        count = len(store.models())
    except ForgeError as error:
        return [Finding("store", State.MISSING, error.what, error.next)]
    folder = store.models_dir
    reason = "--store" if store_path else find_store_locations(os.environ)[0].reason
    others = [] if store_path else _other_stores(folder)
    if not folder.exists():
        found = Finding(
            "store",
            State.OPTIONAL,
            f"{folder} ({reason}) does not exist yet",
            "It is made with the first model: ollama-forge start",
        )
        return [found, *others]
    return [_writable_finding(folder, reason, count), *_owner_findings(folder), *_whole_findings(store), *others]


def _writable_finding(folder: Path, reason: str, count: int) -> Finding:
    parts = [part for part in (folder, folder / "blobs", folder / "manifests") if part.is_dir()]
    closed = [part for part in parts if not os.access(part, os.W_OK | os.X_OK)]
    facts: dict[str, Any] = {"path": str(folder), "reason": reason, "models": count, "writable": not closed}
    words = f"{folder} ({reason}), {count} models"
    if not closed:
        return Finding("store", State.OK, f"{words}, yours to write", facts=facts)
    owner = _owner(closed[0])
    return Finding(
        "store",
        State.MISSING,
        f"{words}; {closed[0]} belongs to {owner} and you may not write there",
        f"sudo -u {owner} ollama-forge ...   (as its owner), or use a store of your own: export OLLAMA_MODELS=~/models",
        facts=facts,
    )


def _owner(path: Path) -> str:
    if sys.platform == "win32":
        return "somebody else"
    import pwd

    number = path.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _owner_findings(folder: Path) -> list[Finding]:
    """Files that do not belong to the folder's owner: Ollama's service could not replace or remove them."""
    if sys.platform == "win32":
        return []
    expected = folder.stat().st_uid
    strange: list[Path] = []
    for part in ("blobs", "manifests"):
        for root, _, names in os.walk(folder / part):
            paths = [Path(root) / name for name in names]
            strange += [path for path in paths if not path.is_symlink() and path.stat().st_uid != expected]
    if not strange:
        return []
    owner = _owner(folder)
    return [
        Finding(
            "ownership",
            State.WARNING,
            f"{len(strange)} files of the store do not belong to {owner}, first {strange[0]}",
            f"sudo chown -R {owner} {folder}",
        )
    ]


def _whole_findings(store: Store) -> list[Finding]:
    try:
        report = verify_store(store, quick=True)
    except ForgeError as error:
        return [Finding("store's files", State.WARNING, error.what, error.next)]
    facts = {
        "problems": [{"kind": p.kind, "path": str(p.path), "what": p.what} for p in report.problems],
        "orphan_bytes": report.orphan_bytes,
        "leftovers": len(report.leftovers) + len(report.stages),
    }
    extra = []
    if report.orphan_bytes:
        extra.append(f"{len(report.orphans)} blobs that no model uses ({report.orphan_bytes / 1e9:.1f} GB)")
    if report.leftovers or report.stages:
        extra.append(f"{len(report.leftovers) + len(report.stages)} unfinished files")
    if report.problems:
        first = report.problems[0]
        words = f"{len(report.problems)} problems, first: {first.path.name}: {first.what}"
        return [Finding("store's files", State.WARNING, words, "ollama-forge verify", facts=facts)]
    words = "; ".join(["every model has its files (quick look)", *extra])
    step = "ollama-forge verify shows them; Ollama removes unused blobs when it starts." if extra else ""
    return [Finding("store's files", State.OK, words, step, facts=facts)]


def _other_stores(folder: Path) -> list[Finding]:
    """Another store beside the one in use is where a model that cannot be found usually is."""
    others = [
        place
        for place in find_store_locations(os.environ)
        if has_manifests(place.models_dir) and place.models_dir.resolve() != folder.resolve()
    ]
    return [
        Finding(
            "another store",
            State.OPTIONAL,
            f"{place.models_dir} ({place.reason})",
            f"ollama-forge list --store {place.models_dir}",
        )
        for place in others
    ]


def server_findings(store_path: Path | None) -> list[Finding]:
    """The program, the running server with its version and what it can create, and whether it uses the same store."""
    return [_program_finding(), *_running_findings(store_path)]


def _program_finding() -> Finding:
    path = find_program("ollama")
    if path is not None:
        return Finding("ollama", State.OK, str(path))
    return Finding(
        "ollama",
        State.OPTIONAL,
        "not on PATH; models are made, checked and asked without it",
        "https://ollama.com/download, to run them in Ollama",
    )


def _running_findings(store_path: Path | None) -> list[Finding]:
    try:
        with OllamaServer(answer_timeout_seconds=_ANSWER_TIMEOUT_SECONDS) as server:
            features = server.features()
            findings = [_version_finding(server.address.url, features)]
            if server.is_local:
                findings += _same_store_findings(server, store_path)
            return findings
    except ForgeError as error:
        step = "Not needed to make models. To run them in Ollama: ollama serve"
        is_wrong = error.kind == "usage"
        return [Finding("server", State.WARNING if is_wrong else State.OPTIONAL, error.what, error.next or step)]


def _version_finding(url: str, features: ServerFeatures) -> Finding:
    can = [words for name, words in _FEATURES.items() if getattr(features, name)]
    cannot = [words for name, words in _FEATURES.items() if not getattr(features, name)]
    words = f"Ollama {features.version} at {url}; it can {', '.join(can)}"
    if cannot:
        words += f"; it cannot {', '.join(cannot)} (this tool does it instead)"
    facts = {
        "version": features.version,
        "is_known": features.is_known,
        "url": url,
        **{name: getattr(features, name) for name in _FEATURES},
    }
    return Finding("server", State.OK, words, facts=facts)


def _same_store_findings(server: OllamaServer, store_path: Path | None) -> list[Finding]:
    try:
        theirs = server.find_models_dir()
        ours = open_store(store_path).models_dir
    except ForgeError as error:
        return [Finding("server's store", State.WARNING, error.what, error.next)]
    if theirs is None or theirs.resolve() == ours.resolve():
        return []
    return [
        Finding(
            "server's store",
            State.WARNING,
            f"the server reads {theirs}, and this tool writes to {ours}: what you land here does not show up there",
            f"export OLLAMA_MODELS={theirs}",
        )
    ]
