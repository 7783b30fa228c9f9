"""Settings of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import check_choices, filled


@dataclass(frozen=True)
class DoctorConfig:
    """Say in plain words what went wrong in a training, or goes wrong in one that runs."""

    run: str = "runs/train"
    """Folder of the training; it may also stand right after the verb, without the flag."""
    format: Literal["text", "json"] = "text"
    """Form of what is said."""
    fail_on: Literal["error", "warning", "never", "serious"] = "error"
    """Lowest severity with exit code 1 ('serious' is the old name of 'error')"""

    def __post_init__(self) -> None:
        """Check each value."""
        check_choices(self)
        filled(self, "run")
