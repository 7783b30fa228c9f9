"""Settings of the report."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcepp.config._checks import check_values, filled, not_negative
from reinforcepp.errors import ConfigError

MOST_RUNS, MOST_SAMPLES = 20, 50


@dataclass(frozen=True)
class ReportConfig:
    """Show what became of a training, or of several laid over each other, on a page that opens offline."""

    runs: tuple[str, ...] = ("runs/train",)
    """Output folders of trainings, or of demos; they may also stand right after the verb, without the flag."""
    output: str | None = None
    """File for the page. Default: report.html in the run's folder, or here where there are several runs."""
    samples: int = 6
    """Completions to show of the beginning, the middle and the end, and of the best paid ones; 0 is none."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        not_negative(self, "samples")
        filled(self, *(["output"] if self.output is not None else []))
        if not self.runs or not all(name.strip() for name in self.runs):
            raise ConfigError("runs is empty or names an empty folder: give the output_dir of at least one training.")
        if len(self.runs) > MOST_RUNS:
            raise ConfigError(f"runs are {len(self.runs)}, and a page shows {MOST_RUNS} at most: leave some out.")
        if self.samples > MOST_SAMPLES:
            raise ConfigError(f"samples must be at most {MOST_SAMPLES}, not {self.samples}.")
