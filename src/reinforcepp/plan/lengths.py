"""How long completions are: what a rollout's time depends on beside the machine, since it lasts as long as the longest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reinforcepp.config import PlanConfig
from reinforcepp.errors import DataError
from reinforcepp.monitoring.completion_log import step_files

Floats = NDArray[np.float64]
HALVINGS = 60


@dataclass(frozen=True)
class Lengths:
    """Shares of completions by length."""

    going_T: Floats
    """Share with a token at each place from the first on: begins with 1 and never rises."""
    said: str
    """Where this is from, as a sentence."""

    @property
    def mean(self) -> float:
        """Tokens of a completion."""
        return float(self.going_T.sum())

    def any_of(self, rows: float) -> Floats:
        """Chance that the longest of so many completions has a token at each place."""
        any_T: Floats = -np.expm1(rows * np.log1p(-np.minimum(self.going_T, 1 - 1e-16)))
        return any_T

    def longest(self, rows: float) -> float:
        """Expected tokens of the longest of so many."""
        return float(self.any_of(rows).sum())

    def draw(self, generator: np.random.Generator, number: int) -> NDArray[np.int64]:
        """Lengths of so many completions at random."""
        # a completion is longer than t tokens with the chance of a token at place t
        lengths: NDArray[np.int64] = np.searchsorted(-self.going_T, -generator.random(number), side="left")
        return lengths


def lengths_for(config: PlanConfig) -> Lengths:
    """What ``config`` says of them.

    Raises:
        DataError: the run that is to tell it holds no completions, or damaged ones.
    """
    new = config.max_new_tokens
    if config.lengths_from is not None:
        return of_run(Path(config.lengths_from).expanduser(), new)
    if config.mean_new_tokens is not None:
        return ending_by_chance(config.mean_new_tokens, new)
    return full(new)


def full(new: int) -> Lengths:
    """All as long as they can be."""
    return Lengths(
        np.ones(new), "Every prompt and completion is counted at its full length; shorter ones take less time."
    )


def ending_by_chance(mean: float, new: int) -> Lengths:
    """Any token may be the last with the same chance, which is such that the mean, with none over ``new``, is ``mean``."""
    places_T: Floats = np.arange(new, dtype=np.float64)
    low, high = 0.0, 1.0  # of the chance to go on; the mean rises with it
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle**places_T).sum() < mean else (low, middle)
    said = f"Completions are taken to have {mean:g} tokens in the mean, where any may be the last with the same chance."
    return Lengths(np.power(high, places_T), said)


def measured(lengths: Iterable[int], new: int, of: str) -> Lengths:
    """Those there were; longer ones are cut at ``new`` tokens."""
    counted_T = np.bincount(np.clip(np.fromiter(lengths, np.int64), 1, new), minlength=new + 1)
    going_T: Floats = counted_T[::-1].cumsum()[::-1][1:] / np.float64(counted_T.sum())
    said = f"Completions are taken to be as long as the {counted_T.sum():,} of {of}: {going_T.sum():.0f} tokens in the mean."
    return Lengths(going_T, said)


def of_run(folder: Path, new: int) -> Lengths:
    """Those of all completions that a training run has kept.

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
                f"{path} can't be read as the completions of a step: {str(error).splitlines()[0]}"
            ) from error
    if not lengths:
        raise DataError(
            f"{folder} holds no completions to take lengths from: name the folder of a training run that was made with "
            "log_completions, or give --mean_new_tokens."
        )
    return measured(lengths, new, str(folder))
