"""Settings of the check of a data file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reinforcepp.config._checks import check_values, filled, positive
from reinforcepp.config.columns import Columns, check_columns
from reinforcepp.config.data_spec import listed
from reinforcepp.errors import ConfigError

LOWEST_SIMILARITY = 0.5
FIXABLE = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class LintInputs:
    """What is checked."""

    data: str = "builtin:network"
    """Data to check, with pairs or with prompts only, as for the other verbs; it may also stand right after the verb,
    without the flag."""


@dataclass(frozen=True)
class LintConfig(Columns, LintInputs):
    """Find what is wrong with a data file before anything is trained on it."""

    seed: int = 42
    """Decides the split, as it does in training; with the same value the same prompts are held out."""
    model: str | None = None
    """Model whose tokenizer measures lengths: builtin:tiny, a folder or a hub name; default: they are not checked."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens, as in training; checked where a model is given."""
    max_length: int = 512
    """Limit for a framed answer, in tokens, as for the reward model; checked where a model is given."""
    near_duplicate: float = 0.8
    """Share of common runs of three words from which two texts resemble each other; 0.5 to 1."""
    fix: str | None = None
    """File for a cleaned copy, in the format of the data (CSV, TSV or JSONL); what was changed goes into a second file,
    whose name has .log.jsonl at its end."""
    format: Literal["text", "json", "html"] = "text"
    """Form of the report."""
    output: str | None = None
    """File for the report; default: the terminal, or wherever standard output goes."""
    fail_on: Literal["error", "warning", "never"] = "error"
    """Exit code 1 for findings of this severity or above, in the data as it is before any fix."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        check_values(self)
        positive(self, "max_prompt_length", "max_length")
        check_columns(self)
        filled(self, "data")
        filled(self, *(name for name in ("model", "fix", "output") if getattr(self, name) is not None))
        if not LOWEST_SIMILARITY <= self.near_duplicate <= 1:
            raise ConfigError(f"near_duplicate must be from {LOWEST_SIMILARITY} to 1, not {self.near_duplicate}.")
        if self.fix is not None:
            self._check_fix(self.fix)

    def _check_fix(self, fix: str) -> None:
        if self.data.startswith("builtin:"):
            raise ConfigError(f"fix makes a copy of a file, and {self.data} is none of yours: leave fix out.")
        suffix = Path(self.data).suffix.lower()
        if suffix not in FIXABLE or listed(self.data) != [Path(self.data)] or Path(self.data).is_dir():
            raise ConfigError(
                f"fix makes a copy of one file, {', '.join(FIXABLE[:-1])} or {FIXABLE[-1]}, and data is {self.data}: "
                "leave fix out, or give such a file."
            )
        if Path(fix).suffix.lower() != suffix:
            raise ConfigError(f"fix is {fix}, but the copy is a {suffix} file: give a name that ends in {suffix}.")
