"""Ctrl-C and SIGTERM between steps, not within: half a step must never be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A block in whose midst neither signal is heard; at its end each does what it would have done. Only Python's main
    thread hears signals: in any other there is nothing to hold back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    known = {number: handler for number, handler in handlers.items() if handler is not None}  # None: not Python's
    for number in known:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in known.items():
            signal.signal(number, handler)
        for received in dict.fromkeys(came):
            signal.raise_signal(received)
