"""What the launcher of several processes asks for is taken over, or refused before any work."""

from __future__ import annotations

import os

import pytest

from ollama_forge.errors import UnsupportedError
from ollama_forge.jobs.processes import shares_blocks


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_USE_DEEPSPEED", "OLLAMA_FORGE_SHARES_BLOCKS"):
        monkeypatch.setenv(name, "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_weights_are_shared_out_by_us_and_not_by_accelerate() -> None:
    assert shares_blocks() and shares_blocks()
    assert os.environ["ACCELERATE_USE_FSDP"] == "false"


def test_one_process_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not shares_blocks()


def test_what_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="--on-policy"):
        shares_blocks(writes_answers=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UnsupportedError, match="DeepSpeed"):
        shares_blocks()
