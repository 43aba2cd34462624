"""The loopback Hub, a repo of GGUFs and a store as fixtures; test modules import them by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from command import DEMO_MODEL, forge_json
from loopback_hub import LoopbackHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub of one test, with an empty cache and no token; the world's own settings are out of sight."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    # huggingface_hub reads these when it is imported, which an earlier test of this process may have done already.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


DEMO_FILES = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The demo model in three quantizations, as a GGUF repo holds them, with the things that are no models."""
    folder = tmp_path_factory.mktemp("ggufs")
    files = {"README.md": b"# A model", "imatrix.gguf": b"GGUF not a model", "config.json": b"{}"}
    for quant in ("Q8_0", "Q4_K_M", "Q2_K"):
        forge_json("convert", DEMO_MODEL, "-o", folder / f"{quant}.gguf", "--quant", quant)
        files[f"Demo-{quant}.gguf"] = (folder / f"{quant}.gguf").read_bytes()
    return files


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Where an empty store will be."""
    return tmp_path / "models"
