"""A run that makes no progress is ended, with every thread's stack in a file, instead of hanging for a night."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from reinforcepp.runtime import is_first_here, is_main, started

STACKS = "stacks.txt"


class Watchdog:
    """``beat`` tells it what begins now; if none comes for ``seconds``, the process ends with exit code 1.

    Args:
        folder: where stacks.txt goes.
        seconds: without a beat; 0 is never.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._path = folder / (STACKS if is_main() else f"{Path(STACKS).stem}-{os.environ['RANK']}.txt")
        self._seconds = seconds
        self._phase, self._last = "start", time.monotonic()
        self._over = threading.Event()

    def beat(self, phase: str) -> None:
        """There was progress, and ``phase`` is what is done next."""
        self._phase, self._last = phase, time.monotonic()

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        if self._seconds:
            self._last = time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """No longer watch."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._give_up()

    def _give_up(self) -> None:
        said = f"No progress for {self._seconds:g} seconds in the phase {self._phase!r}."
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(said + " What every thread was doing:\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        others = (
            " It may wait for others that hang, or whose machines can't be reached any more." if started() > 1 else ""
        )
        told = f"\nerror: {said}{others} The stack of every thread is in {self._path}. Resume with --resume; "
        if is_first_here():
            os.write(2, (told + "if the phase is only slow, set watchdog_seconds higher.\n").encode())
        os._exit(1)
