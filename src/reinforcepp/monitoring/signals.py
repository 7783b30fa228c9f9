"""Ctrl-C and SIGTERM: the first signal stops at the next safe point, the second one immediately."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from reinforcepp.runtime.process import is_main
from reinforcepp.runtime.terminal import echo_from_handler, print_at_once

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after saving its state; ``exit_code`` is 128 plus the signal's number."""

    def __init__(self, place: str, exit_code: int) -> None:
        super().__init__(place)
        self.exit_code = exit_code


class StopRequested(KeyboardInterrupt):
    """Raised at a safe point after a signal."""


class Stop:
    """The signal received so far, if any. Call ``check`` at safe points, where no work is half done."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._repeatable = False

    def check(self) -> None:
        """Raise ``StopRequested`` if a signal was received."""
        if self.number is not None:
            raise StopRequested

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """In this block, whose work can be repeated, stop at a signal immediately instead of at the next ``check``."""
        self._repeatable = True
        try:
            self.check()
            yield
        finally:
            self._repeatable = False

    @property
    def exit_code(self) -> int:
        """Exit code for the process."""
        return 128 + (self.number or 0)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self.number is not None:
            if is_main():
                print_at_once("\nStopped immediately. Earlier checkpoints are intact.")
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        echo_from_handler(
            f"{name}: saving and stopping at the next safe point. A second signal stops immediately.", "yellow"
        )
        if self._repeatable:
            raise StopRequested


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Yield a ``Stop`` that receives the signals in this block; outside the main thread, signals aren't redirected."""
    stop = Stop()
    with handle_signals(stop.ask):
        yield stop


@contextmanager
def handle_signals(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Call ``handler`` for the signals in this block, SIGINT and SIGTERM by default.

    Outside the main thread, where Python can't set handlers, signals keep the handlers they have.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers or SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
