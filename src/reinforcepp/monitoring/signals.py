"""Ctrl-C and SIGTERM: the first one stops at the next safe point, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from reinforcepp.monitoring.progress import echo
from reinforcepp.runtime import is_main

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop, and what was to be saved is saved; ``exit_code`` is 128 and its number."""

    def __init__(self, place: str, exit_code: int) -> None:
        super().__init__(place)
        self.exit_code = exit_code


class StopAsked(KeyboardInterrupt):
    """Raised at a safe point after a signal."""


class Stop:
    """Whether a signal has come; ``check`` belongs where nothing is half done."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._nothing_to_lose = False

    def check(self) -> None:
        """Raise ``StopAsked`` if a signal has come."""
        if self.number is not None:
            raise StopAsked

    @contextmanager
    def anywhere(self) -> Iterator[None]:
        """In this block, whose work can be done again, a signal stops at once instead of at the next ``check``."""
        self._nothing_to_lose = True
        try:
            self.check()
            yield
        finally:
            self._nothing_to_lose = False

    @property
    def exit_code(self) -> int:
        """What the process should end with."""
        return 128 + (self.number or 0)

    def ask(self, number: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if self.number is not None:
            if is_main():
                os.write(2, b"\nStopped at once. What was saved before is whole.\n")
            os._exit(128 + number)
        self.number = number
        name = signal.Signals(number).name
        echo(f"{name}: stopping as soon as nothing is half done, and saving; a second signal stops at once.", "yellow")
        if self._nothing_to_lose:
            raise StopAsked


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within this block signals go to the ``Stop`` it gives; outside the main thread they stay where they are."""
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
