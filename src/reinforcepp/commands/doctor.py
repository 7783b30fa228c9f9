"""The verb: read a run's folder, say what was found."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from reinforcepp.config import DoctorConfig
from reinforcepp.monitoring import printable
from reinforcepp.monitoring.doctor.diagnosis import Diagnosis, diagnose
from reinforcepp.monitoring.doctor.finding import SEVERITIES
from reinforcepp.monitoring.run_record import find_run, read_run

FAILED = 1
STYLES = {"serious": "bold red", "warning": "yellow", "note": "cyan", None: "green"}


def run_doctor(config: DoctorConfig) -> int:
    """Diagnose the run in ``config.run``; returns 1 for findings of ``fail_on``, else 0.

    Raises:
        ConfigError: if there is no training in that folder.
    """
    diagnosis = diagnose(read_run(find_run(config.run)))
    if config.format == "json":
        told = {"verdict": diagnosis.sentence, "findings": [asdict(finding) for finding in diagnosis.findings]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    else:
        terminal = Console(highlight=False)
        for line in as_lines(diagnosis):
            terminal.print(line)
    sys.stdout.flush()
    return FAILED if _too_much(diagnosis, config.fail_on) else 0


def as_lines(diagnosis: Diagnosis) -> Iterator[Text | Padding]:
    """What was found, for people: the verdict, then each finding with its reasons."""
    yield Text(printable(diagnosis.sentence), STYLES[diagnosis.worst])
    for finding in diagnosis.findings:
        yield Text(f"\n{finding.severity}: {finding.title}", STYLES[finding.severity])
        for name in ("evidence", "cause", "cure"):
            said = Text(f"{name.capitalize():9} ", "dim")
            said.append(printable(getattr(finding, name)), "not dim")
            yield Padding(said, (0, 0, 0, 2))


def _too_much(diagnosis: Diagnosis, fail_on: str) -> bool:
    counted = SEVERITIES[: SEVERITIES.index(fail_on) + 1] if fail_on != "never" else ()
    return diagnosis.worst in counted
