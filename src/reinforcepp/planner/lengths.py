"""The distribution of completion lengths. Rollout time depends on it because a batch takes as long as its longest row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reinforcepp.config import PlanConfig
from reinforcepp.errors import DataError, first_line, setting
from reinforcepp.monitoring.completion_log import step_files

Floats = NDArray[np.float64]
BISECTIONS = 60


@dataclass(frozen=True)
class Lengths:
    """A distribution of completion lengths."""

    active_T: Floats
    """Fraction of completions with a token at each position; begins with 1 and never rises."""
    note: str
    """Where the distribution is from, as a sentence."""

    @property
    def mean(self) -> float:
        """Mean number of tokens."""
        return float(self.active_T.sum())

    def any_active(self, rows: float) -> Floats:
        """Return the probability that the longest of ``rows`` completions has a token at each position."""
        any_T: Floats = -np.expm1(rows * np.log1p(-np.minimum(self.active_T, 1 - 1e-16)))
        return any_T


def lengths_for(config: PlanConfig) -> Lengths:
    """Return the distribution that ``config`` describes.

    Raises:
        DataError: the run given by ``lengths_from`` has no completions, or damaged ones.
    """
    limit = config.max_new_tokens
    if config.lengths_from is not None:
        return from_run(Path(config.lengths_from).expanduser(), limit)
    if config.mean_new_tokens is not None:
        return geometric(config.mean_new_tokens, limit)
    return full_length(limit)


def full_length(limit: int) -> Lengths:
    """Return the distribution with every completion at the limit."""
    return Lengths(
        np.ones(limit), "The time assumes that every prompt and completion has its full length; shorter ones take less."
    )


def geometric(mean: float, limit: int) -> Lengths:
    """Return a geometric distribution, truncated at ``limit`` tokens, whose mean after truncation is ``mean``."""
    positions_T: Floats = np.arange(limit, dtype=np.float64)
    low, high = 0.0, 1.0  # Bounds of the probability to continue; the mean rises with it.
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle**positions_T).sum() < mean else (low, middle)
    note = f"Completion lengths are assumed to be geometric with a mean of {mean:g} tokens."
    return Lengths(np.power(high, positions_T), note)


def empirical(lengths: Iterable[int], limit: int, source: str) -> Lengths:
    """Return the distribution of ``lengths``, truncated at ``limit`` tokens."""
    counts_T = np.bincount(np.clip(np.fromiter(lengths, np.int64), 1, limit), minlength=limit + 1)
    active_T: Floats = counts_T[::-1].cumsum()[::-1][1:] / np.float64(counts_T.sum())
    note = (
        f"Completion lengths are those of the {counts_T.sum():,} in {source}: {active_T.sum():.0f} tokens on average."
    )
    return Lengths(active_T, note)


def from_run(folder: Path, limit: int) -> Lengths:
    """Return the distribution of all completions that a training run has logged.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    from pyarrow import parquet

    lengths: list[int] = []
    for _, path in step_files(folder):
        try:
            lengths += parquet.ParquetFile(path).read(columns=["length"])["length"].to_pylist()
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: can't be read as a step's completions ({first_line(error)}). Restore the file, or give "
                f"{setting('mean_new_tokens')}."
            ) from error
    if not lengths:
        raise DataError(
            f"lengths_from: {folder} has no completions. Name the folder of a training run with log_completions, or give "
            f"{setting('mean_new_tokens')}."
        )
    return empirical(lengths, limit, str(folder))
