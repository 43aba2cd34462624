"""Where a store lies on this machine.

In: the environment and the disk. Out: folders, best first, each with the reason. Rules: envconfig/config.go:113 of
Ollama v0.33 (`OLLAMA_MODELS` without spaces and quotes around it, no `~`, no variables; else `.ollama/models` at
home), and scripts/install.sh for the Linux service, whose home is /usr/share/ollama.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ollama_forge.errors import StoreError

SERVICE_HOME = Path("usr/share/ollama")
_UNITS = ("etc/systemd/system/ollama.service", "etc/systemd/system/ollama.service.d")
_UNIT_ASSIGNMENT = re.compile(r"""^\s*Environment=.*?["' =]OLLAMA_MODELS=([^"'\n]+)""", re.MULTILINE)
_UNIT_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class StoreLocation:
    """A place where a store is or would be, and who says so."""

    models_dir: Path
    reason: str


def find_store_locations(environ: Mapping[str, str], system_root: Path = Path("/")) -> list[StoreLocation]:
    """Every place to look at, the one to use first.

    The Linux service's store comes after the one at home, unless only the service's is there.

    Raises:
        StoreError: nothing is set and there is no home.
    """
    named = environ.get("OLLAMA_MODELS", "").strip().strip("\"'")
    locations = [StoreLocation(Path(named).absolute(), "OLLAMA_MODELS")] if named else []
    home = _home(environ)
    if home:
        locations.append(StoreLocation(home / ".ollama" / "models", "your home"))
    if sys.platform.startswith("linux"):
        locations += [
            StoreLocation(folder, "the Ollama service's settings") for folder in _service_settings(system_root)
        ]
        service = system_root / SERVICE_HOME / ".ollama" / "models"
        locations.append(StoreLocation(service, "the Ollama service's home"))
    if not locations:
        raise StoreError(
            "There is no place for an Ollama store: neither OLLAMA_MODELS nor a home folder is set",
            next="Set it: export OLLAMA_MODELS=/path/to/models",
        )
    if not named:
        locations.sort(key=lambda location: not has_manifests(location.models_dir))
    return locations


def has_manifests(models_dir: Path) -> bool:
    """Whether a store is there and may be looked at."""
    with contextlib.suppress(OSError):
        return (models_dir / "manifests").is_dir()
    return False


def _home(environ: Mapping[str, str]) -> Path | None:
    text = environ.get("USERPROFILE" if sys.platform == "win32" else "HOME", "")
    if text:
        return Path(text)
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return None


def _service_settings(system_root: Path) -> list[Path]:
    """Folders that systemd hands to the service: the one place where they can be read is its unit files."""
    found: list[Path] = []
    for unit in _UNITS:
        path = system_root / unit
        with contextlib.suppress(OSError):
            files = sorted(path.glob("*.conf"), reverse=True) if path.is_dir() else [path]
            for file in files:
                if file.is_file() and file.stat().st_size <= _UNIT_LIMIT_BYTES:
                    text = file.read_text(encoding="utf-8", errors="replace")
                    found[:0] = [Path(match[1].strip()) for match in _UNIT_ASSIGNMENT.finditer(text)]
    return [folder for folder in found if folder.is_absolute()]
