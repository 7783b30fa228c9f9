"""A watchdog that ends a run without progress and writes the stacks of all threads to a file."""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from reinforcepp.errors import option
from reinforcepp.runtime import is_first_here, is_main, started
from reinforcepp.terminal import print_at_once

STACKS = "stacks.txt"


class Watchdog:
    """Ends the process with exit code 1 if ``beat`` isn't called for ``seconds``.

    Args:
        folder: for stacks.txt.
        seconds: maximum time between two beats; 0 disables the watchdog.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._path = folder / (STACKS if is_main() else f"{Path(STACKS).stem}-{os.environ['RANK']}.txt")
        self._seconds = seconds
        self._phase, self._last = "start", time.monotonic()
        self._over = threading.Event()

    def beat(self, phase: str) -> None:
        """Report progress; ``phase`` begins now."""
        self._phase, self._last = phase, time.monotonic()

    def __enter__(self) -> Watchdog:
        """Start the watchdog."""
        if self._seconds:
            self._last = time.monotonic()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the watchdog."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._end_process()

    def _end_process(self) -> None:
        problem = f"No progress for {self._seconds:g} seconds in the phase {self._phase!r}."
        with open(self._path, "w", encoding="utf-8") as file:
            file.write(problem + " Stacks of all threads:\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        hint = " It might wait for ranks that hang or whose nodes are unreachable." if started() > 1 else ""
        message = (
            f"\nerror: {problem}{hint} The stacks of all threads are in {self._path}. Resume with {option('resume')}. "
        )
        if is_first_here():
            print_at_once(message + "If the phase is only slow, raise watchdog_seconds.")
        os._exit(1)
