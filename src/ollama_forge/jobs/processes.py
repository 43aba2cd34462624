"""Several processes that train one model (`accelerate launch`): all of them train, the first one writes and lands."""

from __future__ import annotations

import os
import time
from pathlib import Path

_WAIT_SECONDS = 0.2


def is_first_process() -> bool:
    """Whether this process, of those that `accelerate launch` started, is the one that writes and lands."""
    return int(os.environ.get("RANK", "0")) == 0


def wait_for_first_process(mark: Path) -> None:
    """Every other process waits until the first one has written `mark`.

    A first process that fails ends them all: `accelerate launch` sees to that.
    """
    while not is_first_process() and not mark.exists():
        time.sleep(_WAIT_SECONDS)
