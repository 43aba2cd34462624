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
    """Inside the block a KeyboardInterrupt is not lost.

    Python drops an exception that is raised while a destructor runs, and libraries run many while they are imported:
    such an interrupt comes again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_hook = sys.unraisablehook

    def hook(dropped: UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            previous_hook(dropped)
            return
        again = threading.Timer(_AGAIN_SECONDS, _interrupt_main_thread)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook


def _interrupt_main_thread() -> None:
    """As Ctrl-C does it: a wait of the main thread ends, too."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()
