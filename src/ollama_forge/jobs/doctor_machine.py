"""What the machine has: memory now, disks, NVIDIA cards and whether torch can use them.

In: this machine. Out: findings. `nvidia-smi` and a child Python are asked with a time limit.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import ForgeError
from ollama_forge.files import free_bytes
from ollama_forge.jobs.environment import Finding, State, available_memory_bytes, total_memory_bytes
from ollama_forge.jobs.external_program import find_program, read_output
from ollama_forge.source.hub_cache import find_hub_cache
from ollama_forge.store.catalog import open_store

_SMI_TIMEOUT_SECONDS = 10.0
_TORCH_TIMEOUT_SECONDS = 90.0
_LITTLE_ROOM_BYTES = 5_000_000_000
_QUERY = "name,memory.total,memory.free,driver_version"
_TORCH_PROGRAM = "import torch; print(torch.version.cuda or '-', int(torch.cuda.is_available()))"


@dataclass(frozen=True)
class GraphicsCard:
    """An NVIDIA card as `nvidia-smi` sees it, sizes in bytes."""

    name: str
    total_bytes: int
    free_bytes: int
    driver: str


def find_cards() -> list[GraphicsCard]:
    """The NVIDIA cards; empty where there is no `nvidia-smi` or it does not answer."""
    program = find_program("nvidia-smi")
    if program is None:
        return []
    command = [str(program), f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    code, said = read_output(command, _SMI_TIMEOUT_SECONDS)
    return parse_cards(said) if code == 0 else []


def parse_cards(text: str) -> list[GraphicsCard]:
    """The lines of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`; sizes are in MiB there."""
    cards = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[1].isdigit() and cells[2].isdigit():
            cards.append(GraphicsCard(cells[0], int(cells[1]) << 20, int(cells[2]) << 20, cells[3]))
    return cards


def gpu_findings() -> list[Finding]:
    """The cards, and whether the installed torch can use them."""
    cards = find_cards()
    if not cards:
        others = "an AMD card is seen, and not used" if Path("/dev/kfd").exists() else "no NVIDIA card answers"
        return [Finding("gpu", State.OPTIONAL, f"{others}; everything runs on the processor")]
    words = ", ".join(
        f"{card.name} ({card.total_bytes / 1e9:.0f} GB, {card.free_bytes / 1e9:.0f} GB free)" for card in cards
    )
    facts = {
        "driver": cards[0].driver,
        "cards": [{"name": c.name, "total_bytes": c.total_bytes, "free_bytes": c.free_bytes} for c in cards],
    }
    return [Finding("gpu", State.OK, f"{words}, driver {cards[0].driver}", facts=facts), *_torch_findings()]


def _torch_findings() -> list[Finding]:
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return []
    code, said = read_output([sys.executable, "-c", _TORCH_PROGRAM], _TORCH_TIMEOUT_SECONDS)
    words = said.split()
    if code != 0 or len(words) < 2:
        last = (said.strip().splitlines() or ["it did not answer in time"])[-1]
        return [Finding("torch", State.WARNING, f"torch {version} does not start: {last}", "pip install -U torch")]
    cuda, is_usable = words[-2], words[-1] == "1"
    if is_usable:
        return [Finding("torch", State.OK, f"torch {version} uses the card (CUDA {cuda})")]
    why = "was built without CUDA" if cuda == "-" else f"(CUDA {cuda}) cannot use the card: the driver may be too old"
    return [
        Finding("torch", State.WARNING, f"torch {version} {why}", "https://pytorch.org/get-started gives the command.")
    ]


def memory_now_finding() -> Finding:
    """Memory in all, and what is free now."""
    from ollama_forge.gguf.native import usable_cores

    total, free = total_memory_bytes(), available_memory_bytes()
    if total is None or free is None:
        return Finding("memory", State.OPTIONAL, "unknown on this system")
    facts = {"total_bytes": total, "available_bytes": free, "cores": usable_cores()}
    words = f"{total / 1e9:.1f} GB, {free / 1e9:.1f} GB free now; {usable_cores()} processor threads to use"
    return Finding("memory", State.OK, words, facts=facts)


def disk_findings(store_path: Path | None) -> list[Finding]:
    """Room where models, downloads and temporary files go, and whether downloads can be shared with the store."""
    places = {"temporary files": Path(tempfile.gettempdir()), "downloads": find_hub_cache()}
    with contextlib.suppress(ForgeError):
        places = {"models": open_store(store_path).models_dir, **places}
    room = {name: free_bytes(folder) for name, folder in places.items()}
    little = {name: places[name] for name, size_bytes in room.items() if size_bytes < _LITTLE_ROOM_BYTES}
    words = ", ".join(f"{size_bytes / 1e9:.1f} GB free for {name}" for name, size_bytes in room.items())
    step = ""
    if little:
        step = f"Make room: ollama-forge hf-cache ls, ollama rm NAME   ({', '.join(map(str, little.values()))})"
    findings = [Finding("disk", State.WARNING if little else State.OK, words, step, facts=room)]
    if "models" in places and _device(places["models"]) != _device(places["downloads"]):
        findings.append(
            Finding(
                "sharing",
                State.OPTIONAL,
                f"{places['downloads']} and {places['models']} are on two disks, so that a download is stored twice",
                f"export HF_HOME={places['models'].parent / 'huggingface'}   (on the store's disk)",
            )
        )
    return findings


def _device(path: Path) -> int | None:
    """The file system that a path is on, or would be."""
    for folder in (path, *path.parents):
        try:
            return folder.stat().st_dev
        except OSError:
            continue
    return None
