"""The metric log of a run: one JSON object per step and line, with timings in a separate file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import BinaryIO

from reinforcepp.files import copy_file, no_link
from reinforcepp.runtime.process import is_main
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import echo

LOGS = ("metrics.jsonl", "timings.jsonl")
EVENTS = "events.jsonl"
TIMINGS = ("time/", "step_time")


class Clock:
    """A clock for the phases of a step."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """Record that ``phase`` ends now; the times of a repeated phase are added up."""
        now = time.perf_counter()
        name = f"time/{phase}"
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return ``time/PHASE`` for each phase, and ``step_time`` for the whole step."""
        return {**self._laps, "step_time": self._last - self._begin}


class MetricLog:
    """Appends one line per step to ``metrics.jsonl``, and the timings to ``timings.jsonl``.

    So two identical runs have byte-identical metrics.
    """

    def __init__(self) -> None:
        self._files: list[BinaryIO] = []

    def open(self, folder: Path) -> None:
        """Open the log in ``folder`` for appending."""
        self._files = [open(folder / name, "ab", opener=no_link) for name in LOGS]  # noqa: SIM115  (closed by close)

    def write(self, metrics: Mapping[str, float]) -> None:
        """Append the :func:`rounded` metrics of one step."""
        values = rounded(metrics)
        timings = {key: values.pop(key) for key in list(values) if key.startswith(TIMINGS)}
        for file, line in zip(self._files, (values, timings), strict=True):
            file.write((json.dumps(line) + "\n").encode())
            file.flush()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()


def rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics rounded to float32 precision, without values that aren't finite."""
    return {key: round(float(v), 8) if isinstance(v, float) else v for key, v in metrics.items() if isfinite(v)}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return all steps of the log in ``folder``, with timings if available."""
    metrics, timings = (_whole_lines(folder / name) for name in LOGS)
    if not (folder / LOGS[1]).is_file():
        timings = ["{}"] * len(metrics)
    return [json.loads(step) | json.loads(seconds) for step, seconds in zip(metrics, timings, strict=False)]


def _whole_lines(path: Path) -> list[str]:
    """Return the complete lines, because a running training can be writing the last one."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def restore_logs(source: Path, folder: Path) -> None:
    """Restore the log of ``folder`` from its copy in ``source``."""
    for name in LOGS:
        copy_file(source / name, folder / name)


def log_event(folder: Path, text: str) -> None:
    """Print an unusual event and append it to events.jsonl, which a resume doesn't restore."""
    if not is_main():
        return
    text = redacted(text)
    echo(text, "yellow")
    with open(folder / EVENTS, "a", encoding="utf-8", errors="backslashreplace", opener=no_link) as file:
        file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": text}, ensure_ascii=False) + "\n")
