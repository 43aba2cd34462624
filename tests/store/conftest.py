"""One tiny model and its LoRA for all tests of the store; whoever changes a file makes a copy of it."""

from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf, write_tiny_lora


@pytest.fixture(scope="session")
def shared_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def gguf(shared_gguf: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(shared_gguf.read_bytes())
    return copy


@pytest.fixture(scope="session")
def shared_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lora(tmp_path_factory.mktemp("lora") / "lora.gguf")


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return tmp_path / "models"
