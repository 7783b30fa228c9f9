"""A problem of a run: its evidence, likely cause, and fix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """A problem that a rule found.

    ``error``: don't use the trained model. ``warning``: check it before use. ``info``: good to know. ``rule`` is a stable
    name for programs; the other fields are sentences for people.
    """

    rule: str
    severity: Severity
    title: str
    evidence: str
    cause: str
    fix: str
