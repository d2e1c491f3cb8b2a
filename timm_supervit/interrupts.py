"""SIGINT, of Ctrl-C, and SIGTERM, of ``kill`` and batch systems: both end a command with one line and exit code 130.

Before a command works, and after it, they end the process at once; while it works they are a ``KeyboardInterrupt``, so
that it clears up and shows what it has. Imported before all else, so it imports next to nothing.
"""
import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave(*_: Any) -> None:
    """End the process at once."""
    os.write(2, b'Interrupted.\n')
    os._exit(INTERRUPTED)


def leave_when_interrupted() -> None:
    """Let signals end the process at once, but for those that it was started to ignore, as shells do with jobs.

    When Python itself ends, after all else that runs at exit, they are too late to change the exit code.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
            atexit.register(signal.signal, number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_raised() -> Iterator[list[int]]:
    """Let signals raise ``KeyboardInterrupt``; yield those that have come, since code of others may swallow it.

    Handlers of an application that calls a command from Python stay.
    """
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # the one that may set handlers
        before = {number: signal.getsignal(number) for number in _SIGNALS}
    replaced = {number: handler for number, handler in before.items()
                if handler in (leave, signal.SIG_DFL, signal.default_int_handler)}
    try:
        for number in replaced:
            signal.signal(number, interrupt)
        yield came
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
