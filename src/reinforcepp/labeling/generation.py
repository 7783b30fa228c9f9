"""Generate responses in the background, ahead of the labelers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from reinforcepp.data import PromptRow
from reinforcepp.data.feedback import NewUnit, Store
from reinforcepp.errors import ReinforceError
from reinforcepp.runtime.terminal import echo, logger

CHUNK_PROMPTS = 8
"""Prompts per call of the engines: few, so that the first units come early and a stop doesn't wait for long."""

log = logger(__name__)


class BackgroundGeneration:
    """A thread that responds to prompts and adds the units to a store.

    Args:
        store: The database.
        rows: The prompts.
        respond: Function that returns units for the prompts at some indices.

    Attributes:
        prompts_left: Prompts without responses so far.
    """

    def __init__(
        self, store: Store, rows: Sequence[PromptRow], respond: Callable[[Sequence[int]], list[NewUnit]]
    ) -> None:
        self._store, self._rows, self._respond = store, rows, respond
        self.prompts_left = len(rows)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present chunk, and wait for that."""
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_running(self) -> bool:
        """Whether more units are on their way."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            for start in range(0, len(self._rows), CHUNK_PROMPTS):
                if self._stopped.is_set():
                    return
                stop = min(start + CHUNK_PROMPTS, len(self._rows))
                self._store.add_units(self._respond(range(start, stop)))
                self.prompts_left = len(self._rows) - stop
            echo(f"Responded to all {len(self._rows)} prompts.")
        except ReinforceError as error:
            echo(f"Generation stopped: {error} The units so far can be labeled.", "red")
        except Exception as error:
            log.error("Generation stopped. The units so far can be labeled.", exc_info=error)
