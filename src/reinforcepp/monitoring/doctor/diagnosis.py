"""All rules on one run, and what they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reinforcepp.monitoring.doctor.finding import SEVERITIES, Finding
from reinforcepp.monitoring.doctor.rules import RULES
from reinforcepp.monitoring.run_record import RunRecord


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the most serious first, after ``steps`` of ``num_steps``."""

    findings: Sequence[Finding]
    steps: int
    num_steps: int | None

    @property
    def sentence(self) -> str:
        """The verdict."""
        done = f"{self.steps} of {self.num_steps} steps" if self.num_steps else f"{self.steps} steps"
        if not self.findings:
            return f"Nothing wrong was found in {done}."
        counted = [(severity, sum(f.severity == severity for f in self.findings)) for severity in SEVERITIES]
        kinds = ", ".join(_count(number, severity) for severity, number in counted if number)
        return f"{kinds} in {done}: {self.findings[0].title.lower()}."

    @property
    def worst(self) -> str | None:
        """The highest severity among the findings."""
        return self.findings[0].severity if self.findings else None


def diagnose(record: RunRecord) -> Diagnosis:
    """Apply every rule."""
    found = [finding for rule in RULES if (finding := rule(record)) is not None]
    ordered = sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
    steps = int(record.metrics[-1]["step"]) if record.metrics else 0
    return Diagnosis(tuple(ordered), steps, record.facts.get("num_steps"))


def _count(number: int, severity: str) -> str:
    noun = {"serious": "serious fault", "warning": "warning", "note": "note"}[severity]
    return f"{number} {noun}{'' if number == 1 else 's'}"
