"""Ctrl-C reaches the command, whatever it falls upon."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block SIGINT becomes a KeyboardInterrupt, in two cases too where it would be lost.

    A shell starts `command &` of a script with the signal ignored. And Python drops an exception that is raised while a
    destructor runs, which libraries do a lot while they are imported: such an interrupt comes again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    previous_hook = sys.unraisablehook

    def hook(dropped: UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            previous_hook(dropped)
            return
        again = threading.Timer(_AGAIN_SECONDS, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    if is_ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook
        if is_ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
