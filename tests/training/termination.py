"""SIGTERM in the middle of a supervised training."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from reinforcepp.training.supervised_loop import TrainingCallback


def send_sigterm_after(micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to this process once, after the micro-batch with this number, counted from 1."""
    end, seen = TrainingCallback.on_substep_end, []

    def on_substep_end(self: TrainingCallback, *positional: Any, **named: Any) -> None:
        seen.append(1)
        if len(seen) == micro_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        end(self, *positional, **named)

    monkeypatch.setattr(TrainingCallback, "on_substep_end", on_substep_end)
