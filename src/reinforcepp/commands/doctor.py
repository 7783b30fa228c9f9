"""The command `doctor`: read a run's folder and print its problems."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from rich.padding import Padding
from rich.text import Text

from reinforcepp.config import DoctorConfig
from reinforcepp.monitoring.doctor.diagnosis import Diagnosis, diagnose
from reinforcepp.monitoring.doctor.finding import SEVERITIES, Finding
from reinforcepp.monitoring.run_record import find_run, read_run
from reinforcepp.runtime.terminal import Console, print_json

EXIT_FINDINGS = 1
STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan", None: "green"}
OLD_SEVERITIES = {"serious": "error"}


def run_doctor(config: DoctorConfig) -> int:
    """Diagnose the run in ``config.run``; return 1 if it has findings of ``fail_on`` or above, otherwise 0.

    Raises:
        ConfigError: The folder doesn't contain a run.
    """
    diagnosis = diagnose(read_run(find_run(config.run)))
    if config.format == "json":
        report = {"verdict": diagnosis.sentence, "findings": [_as_json(finding) for finding in diagnosis.findings]}
        print_json(json.dumps(report, indent=2) + "\n")
    else:
        terminal = Console()
        for line in as_lines(diagnosis):
            terminal.print(line)
    return EXIT_FINDINGS if _fails(diagnosis, config.fail_on) else 0


def as_lines(diagnosis: Diagnosis) -> Iterator[Text | Padding]:
    """Yield the verdict, then each finding with its evidence, cause, and fix."""
    yield Text(diagnosis.sentence, STYLES[diagnosis.worst])
    for finding in diagnosis.findings:
        yield Text(f"\n{finding.severity}: {finding.title}", STYLES[finding.severity])
        for name in ("evidence", "cause", "fix"):
            line = Text(f"{name.capitalize():9} ", "dim")
            line.append(getattr(finding, name), "not dim")
            yield Padding(line, (0, 0, 0, 2))


def _as_json(finding: Finding) -> dict[str, str]:
    """Return the finding under its stable keys; ``cure`` is the published key of the fix."""
    values = asdict(finding)
    return {"cure" if name == "fix" else name: value for name, value in values.items()}


def _fails(diagnosis: Diagnosis, fail_on: str) -> bool:
    if fail_on == "never":
        return False
    lowest = SEVERITIES.index(OLD_SEVERITIES.get(fail_on, fail_on))
    return diagnosis.worst in SEVERITIES[: lowest + 1]
