"""Settings of the commands that inspect data and runs: lint, doctor and report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from reinforcepp.config.base import Config, FilledStr, PositiveInt, Range, Seed
from reinforcepp.config.data_spec import listed
from reinforcepp.config.shared import ColumnConfig
from reinforcepp.config.values import NAMES
from reinforcepp.errors import ConfigError

FIXABLE = (".csv", ".tsv", ".jsonl", ".ndjson")
MOST_RUNS, MOST_SAMPLES = 20, 50


@dataclass(frozen=True)
class LintInputs(Config):
    """Data to check."""

    data: FilledStr = "builtin:network"
    """Data to check, with pairs or prompts only"""


@dataclass(frozen=True)
class LintConfig(ColumnConfig, LintInputs):
    """Find problems in a data file before training on it."""

    seed: Seed = 42
    """Seed of the split, as in training"""
    model: FilledStr | None = None
    """Model whose tokenizer measures lengths; default: lengths aren't checked"""
    max_prompt_length: PositiveInt | None = None
    """Most tokens of a formatted prompt; needs model. Default: the context"""
    max_length: PositiveInt | None = None
    """Maximum length of prompt and response, in tokens. Default: context, up to 4096"""
    near_duplicate: Annotated[float, Range(at_least=0.5, at_most=1)] = 0.8
    """Fraction of shared word 3-grams that makes near-duplicates; from 0.5 to 1"""
    fix: FilledStr | None = None
    """File for a fixed copy (CSV, TSV or JSONL); changes go to FIX.log.jsonl"""
    format: Literal["text", "json", "html"] = "text"
    """Format of the report"""
    output: FilledStr | None = None
    """File for the report; default: standard output"""
    fail_on: Literal["error", "warning", "never"] = "error"
    """Lowest severity with exit code 1, in the data before any fix"""

    def _check_rules(self) -> None:
        if self.fix is None:
            return
        if self.data.startswith("builtin:"):
            raise ConfigError(f"fix: {self.data} isn't a file that can be fixed. Omit fix.")
        suffix = Path(self.data).suffix.lower()
        data = Path(self.data).expanduser()
        if suffix not in FIXABLE or listed(self.data) != [data] or data.is_dir():
            raise ConfigError(
                f"fix: data is {self.data}, not a single {', '.join(FIXABLE[:-1])} or {FIXABLE[-1]} file. Omit fix, or give "
                "such a file."
            )
        if Path(self.fix).suffix.lower() != suffix:
            raise ConfigError(
                f"fix: {self.fix} isn't a {suffix} file like the data. Give a name that ends in {suffix}."
            )


@dataclass(frozen=True)
class DoctorConfig(Config):
    """Diagnose the problems of a training run, finished or in progress."""

    run: FilledStr = "runs/train"
    """Output folder of the training run"""
    format: Literal["text", "json"] = "text"
    """Format of the diagnosis"""
    fail_on: Literal["error", "warning", "never", "serious"] = "error"
    """Lowest severity with exit code 1 ('serious' is the old name of 'error')"""


@dataclass(frozen=True)
class ReportConfig(Config):
    """Show the results of a training run, or of several overlaid, on a page that works offline."""

    runs: tuple[str, ...] = field(default=("runs/train",), metadata=NAMES)
    """Output folders of training runs or demos"""
    output: FilledStr | None = None
    """File for the page. Default: report.html in the run's folder; here for several"""
    samples: Annotated[int, Range(at_least=0, at_most=MOST_SAMPLES)] = 6
    """Completions shown per section: start, middle, end, highest-reward; 0: none"""

    def _check_rules(self) -> None:
        if not self.runs or not all(name.strip() for name in self.runs):
            raise ConfigError("runs is empty or names an empty folder. Give the output_dir of at least one run.")
        if len(self.runs) > MOST_RUNS:
            raise ConfigError(f"runs: {len(self.runs)} are too many for one page. Give up to {MOST_RUNS}.")


@dataclass(frozen=True)
class MigrateConfig(Config):
    """Translate a training of TRL, OpenRLHF or verl to a YAML file for train, without running it."""

    file: FilledStr = "train.sh"
    """Script (Python or shell) or YAML file that starts the training"""
    source: Literal["trl-ppo", "trl-rloo", "trl-grpo", "openrlhf", "verl"] | None = None
    """Framework of a YAML file; default: what the file shows"""
    output: FilledStr | None = None
    """YAML file to write; default: standard output"""
