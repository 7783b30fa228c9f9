"""Ctrl-C: the first one asks for a stop at the next safe point, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from reinforcepp.observe.progress import say


class StopRequest:
    """Set by the first Ctrl-C."""

    requested = False


@contextmanager
def graceful_interrupt() -> Iterator[StopRequest]:
    """Within this block the first Ctrl-C only sets ``requested``; outside the main thread it changes nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def ask(number: int, frame: FrameType | None) -> None:
        request.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        say("Stopping: this step is finished and saved first; Ctrl-C again stops at once, without saving.", "yellow")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield request
    finally:
        signal.signal(signal.SIGINT, before)
