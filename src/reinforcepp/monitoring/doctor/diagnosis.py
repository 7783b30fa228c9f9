"""All rules applied to one run, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reinforcepp.monitoring.doctor.finding import SEVERITIES, Finding
from reinforcepp.monitoring.doctor.rules import RULES
from reinforcepp.monitoring.run_record import RunRecord


@dataclass(frozen=True)
class Diagnosis:
    """The findings after ``steps`` of ``num_steps``, the most severe first."""

    findings: Sequence[Finding]
    steps: int
    num_steps: int | None

    @property
    def sentence(self) -> str:
        """Verdict in one sentence."""
        done = f"{self.steps} of {self.num_steps} steps" if self.num_steps else f"{self.steps} steps"
        if not self.findings:
            return f"No problems found in {done}."
        numbers = {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES}
        kinds = ", ".join(_count(number, severity) for severity, number in numbers.items() if number)
        title = self.findings[0].title
        return f"{kinds} in {done}: {title if title[1].isupper() else title[0].lower() + title[1:]}."

    @property
    def worst(self) -> str | None:
        """Highest severity of the findings; None without findings."""
        return self.findings[0].severity if self.findings else None


def diagnose(record: RunRecord) -> Diagnosis:
    """Return the findings of all rules."""
    found = [finding for rule in RULES if (finding := rule(record)) is not None]
    ordered = sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))
    steps = int(record.metrics[-1]["step"]) if record.metrics else 0
    return Diagnosis(tuple(ordered), steps, record.facts.get("num_steps"))


def _count(number: int, severity: str) -> str:
    plural = "" if number == 1 or severity == "info" else "s"
    return f"{number} {severity}{plural}"
