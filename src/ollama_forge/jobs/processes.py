"""Several processes that train one model (`accelerate launch`): all of them train, the first one writes and lands.

`--use_fsdp` asks accelerate to cut the weights into shards. Here they are packed blocks, which are shared out in a way
of their own (`train.shared_blocks`): the request is taken over before accelerate sees it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ollama_forge.errors import UnsupportedError

_WAIT_SECONDS = 0.2
_ASKED = "ACCELERATE_USE_FSDP"
_OURS = "OLLAMA_FORGE_SHARES_BLOCKS"


def count_processes() -> int:
    """How many processes `accelerate launch` started; one without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process, of those that `accelerate launch` started, is the one that writes and lands."""
    return int(os.environ.get("RANK", "0")) == 0


def shares_blocks(*, writes_answers: bool = False) -> bool:
    """Whether these processes were started to share the weights out; to be called before anything of accelerate's.

    Args:
        writes_answers: the run lets each process write answers of its own length.

    Raises:
        UnsupportedError: DeepSpeed, or answers together with sharing.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UnsupportedError(
            "DeepSpeed would cut float weights into shards, and these are packed blocks",
            why="Blocks are shared out by ollama-forge itself.",
            next="Start it with: accelerate launch --use_fsdp --num_processes N",
        )
    if os.environ.get(_ASKED, "false").lower() == "true":
        os.environ[_ASKED] = "false"
        os.environ[_OURS] = "true"
    is_shared = os.environ.get(_OURS) == "true" and count_processes() > 1
    if is_shared and writes_answers:
        raise UnsupportedError(
            "--on-policy and layers that are shared out do not go together",
            why="Each process would write answers of its own length, and all must run the layers together.",
            next="Leave --on-policy out, or start it with --multi_gpu instead of --use_fsdp.",
        )
    return is_shared


def wait_for_first_process(mark: Path) -> None:
    """Every other process waits until the first one has written `mark`.

    A first process that fails ends them all: `accelerate launch` sees to that.
    """
    while not is_first_process() and not mark.exists():
        time.sleep(_WAIT_SECONDS)
