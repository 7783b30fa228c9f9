"""A fault that was found: what shows it, what is the likely cause, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """``serious``: don't use what came out; ``warning``: look before you do; ``note``: good to know.

    ``rule`` is the name that stays, for programs; the others are sentences for people.
    """

    rule: str
    severity: Severity
    title: str
    evidence: str
    cause: str
    cure: str
