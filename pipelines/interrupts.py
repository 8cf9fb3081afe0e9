"""Ctrl-C and SIGTERM: the first asks a command to end, the second ends it."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
SHOW_CURSOR = b"\x1b[?25h"


@contextmanager
def interruptible() -> Iterator[None]:
    """Have the first of them raise `KeyboardInterrupt`, and the next end the process where it is.

    What it leaves undone is what a kill leaves: a run that can be resumed, and processes that end without it.
    """
    if threading.current_thread() is not threading.main_thread():  # no other hears of signals
        yield
        return
    asked = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)  # a live table hides it
            os._exit(INTERRUPTED)
        asked = True
        raise KeyboardInterrupt

    before = {n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
