"""Settings of the comparison of estimators."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.config._checks import positive
from reinforcepp.config.training import TrainConfig
from reinforcepp.errors import ConfigError, nearest


@dataclass(frozen=True)
class CompareAlgorithmsConfig(TrainConfig):
    """Train with each estimator on the same prompts, samples and steps, with several seeds, and compare the outcomes."""

    output_dir: str = "runs/algorithms"
    """Folder for every run, for comparison.json and for the page comparison.html."""
    estimators: str = ",".join(ESTIMATORS)
    """Names of the estimators, with commas between them; the setting estimator itself is not used."""
    seeds: int = 5
    """Runs of each estimator, with the seeds seed, seed + 1, ..."""
    num_generations: int = 4
    """Completions sampled per prompt, for every estimator."""
    eval_every: int = 10
    """Steps between answers to the held-out prompts in the course of training; 0 is never."""
    sensitivity: bool = False
    """Also train each estimator at a third, once and three times the learning rate and with 4, 8 and 32 completions."""
    processes: int = 1
    """Runs at a time, each with its share of the processor's cores; times are only comparable with 1."""

    def __post_init__(self) -> None:
        """Check what the comparison adds to the settings of a training."""
        super().__post_init__()
        positive(self, "seeds", "processes")
        if isinstance(self.resume, str):
            raise ConfigError("A comparison goes on from what its output_dir holds: give --resume without a path.")
        if self.seeds < 2:
            raise ConfigError("seeds must be at least 2: one run can't show how far results scatter.")
        for name in self.names:
            if name not in ESTIMATORS:
                raise ConfigError(
                    f"estimators names {name!r}, which isn't one: {', '.join(ESTIMATORS)}.{nearest(name, ESTIMATORS)}"
                )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"estimators names one twice: {self.estimators}.")
        if self.num_generations < 2 and any(ESTIMATORS[name].grouped for name in self.names):
            raise ConfigError("num_generations must be at least 2 for estimators that compare samples of one prompt.")

    @property
    def names(self) -> list[str]:
        """The estimators to compare."""
        return [name.strip() for name in self.estimators.split(",") if name.strip()]
