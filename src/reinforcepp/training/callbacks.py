"""The progress of a training as transformers shows it: its TrainerState and its TrainOutput."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.monitoring import read_metrics, rounded
from reinforcepp.training.evaluation import logged_metrics

if TYPE_CHECKING:  # these load PEFT
    from transformers.trainer_utils import TrainOutput


class Callbacks:
    """Owns the :class:`transformers.TrainerState` of a run.

    Args:
        config: the settings.
        ranks: the data-parallel ranks.
        num_steps: steps of the run.
        steps_per_epoch: steps per pass over the prompts.
    """

    def __init__(self, config: ReinforceConfig, ranks: Ranks, num_steps: int, steps_per_epoch: int) -> None:
        from transformers import TrainerState

        self.steps_per_epoch = steps_per_epoch
        self.state = TrainerState(
            max_steps=num_steps,
            logging_steps=1,
            eval_steps=config.eval_every,
            save_steps=config.save_every,
            train_batch_size=config.completions_per_step,
            num_train_epochs=-(-num_steps // steps_per_epoch),
            is_local_process_zero=ranks.accelerator.is_local_main_process,
            is_world_process_zero=ranks.is_main,
        )
        self._summary: dict[str, float] = {}
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._first, self._started = step, time.monotonic()
        self.at(step)

    def at(self, step: int) -> dict[str, float]:
        """Move to the position after ``step`` finished steps; return step and epoch."""
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        return {"step": step, "epoch": self.state.epoch}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append ``metrics`` to ``log_history``, with the current step and epoch."""
        self.state.log_history.append(rounded({**self.at(self.state.global_step), **metrics}))

    def restore(self, folder: Path, evaluations: Mapping[str, Mapping[str, float]], step: int) -> None:
        """Restore the position after ``step``, and ``log_history`` from the log in ``folder`` and the ``evaluations``."""
        self.state.log_history = read_metrics(folder)
        for name, metrics in evaluations.items():
            self.at(0 if name == "before" else step if name == "after" else int(name.removeprefix("step ")))
            self.log(logged_metrics(metrics))
        self.state.log_history.sort(key=lambda entry: entry["step"])
        self._begin(step)

    def finish(self) -> None:
        """Log the metrics of the whole training, under transformers' keys."""
        seconds, steps = max(time.monotonic() - self._started, 1e-6), self.state.global_step - self._first
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        self._summary = {
            "train_runtime": seconds,
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": steps * self.state.train_batch_size / seconds,
            "train_loss": fmean(losses) if losses else nan,
            "epoch": self.state.epoch,
        }
        self.log(self._summary)

    @property
    def output(self) -> TrainOutput:
        """What ``train()`` returns: the number of steps, their mean loss, and the metrics of the whole training."""
        from transformers.trainer_utils import TrainOutput

        return TrainOutput(self.state.global_step, self._summary["train_loss"], dict(self._summary))
