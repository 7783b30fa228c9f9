"""The log of a run: one JSON object per line and step, timings apart from the rest."""

from __future__ import annotations

import json
import shutil
import time
from math import isfinite
from pathlib import Path
from typing import BinaryIO

from reinforcepp.files import PARTIAL
from reinforcepp.monitoring.progress import echo
from reinforcepp.runtime import is_main

LOGS = ("metrics.jsonl", "timings.jsonl")
EVENTS = "events.jsonl"
TIMINGS = ("time/", "step_time")


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """The phase that ends now."""
        now = time.perf_counter()
        self._laps[f"time/{phase}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """``time/PHASE`` for each phase, and ``step_time`` for all."""
        return {**self._laps, "step_time": self._last - self._begin}


class MetricLog:
    """Appends to ``metrics.jsonl``, one line per step, and what the clock says to ``timings.jsonl``.

    So the metrics of two runs that did the same are the same bytes.
    """

    def __init__(self) -> None:
        self._files: list[BinaryIO] = []

    def open(self, folder: Path) -> None:
        """Append to the log in ``folder`` from now on."""
        self._files = [open(folder / name, "ab") for name in LOGS]  # noqa: SIM115  (closed by close)

    def write(self, metrics: dict[str, float]) -> None:
        """Append one step's metrics, rounded to what a float32 holds; a value that isn't finite is left out."""
        finite = {key: round(float(v), 8) if isinstance(v, float) else v for key, v in metrics.items() if isfinite(v)}
        timings = {key: finite.pop(key) for key in list(finite) if key.startswith(TIMINGS)}
        for file, line in zip(self._files, (finite, timings), strict=True):
            file.write((json.dumps(line) + "\n").encode())
            file.flush()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All steps of the log in ``folder``, timings included if there are any."""
    own, timings = (_whole_lines(folder / name) for name in LOGS)
    if not (folder / LOGS[1]).is_file():
        timings = ["{}"] * len(own)
    return [json.loads(step) | json.loads(seconds) for step, seconds in zip(own, timings, strict=False)]


def _whole_lines(path: Path) -> list[str]:
    """Of a running training the last line may be half."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def restore_logs(source: Path, folder: Path) -> None:
    """Put the log of ``folder`` back to what it was when it was copied to ``source``."""
    for name in LOGS:
        partial = folder / (name + PARTIAL)
        shutil.copyfile(source / name, partial)
        partial.replace(folder / name)


def note_event(folder: Path, text: str) -> None:
    """Something out of the ordinary: told, and noted in events.jsonl, which no resume takes back."""
    if not is_main():
        return
    echo(text, "yellow")
    with open(folder / EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": text}, ensure_ascii=False) + "\n")
