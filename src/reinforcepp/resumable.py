"""TRL's RewardTrainer with the checkpoints, signals and guardrails that policy training has.

Transformers would pickle its checkpoints and write them in place; here they are those of ``checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import RewardTrainer

from reinforcepp import checkpoint, random_state
from reinforcepp.adapters import is_adapted, load_trained_weights, saved_adapter
from reinforcepp.config import RewardModelConfig
from reinforcepp.errors import TrainingDiverged
from reinforcepp.models import save_model
from reinforcepp.observe import Clock, MetricLog, Progress, say
from reinforcepp.observe.interrupt import Stop
from reinforcepp.observe.watchdog import Watchdog
from reinforcepp.reward_models import load_reward_weights
from reinforcepp.run_state import better

TRAINER_STATE = "trainer_state.json"
LOGGED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "accuracy",
    "margin",
    "mean_reward",
    "min_reward",
    "max_reward",
    "epoch",
)


class ResumableRewardTrainer(RewardTrainer):
    """Saves and restores all that decides the next step; nothing is unpickled.

    ``settings`` is the run's configuration, ``folder`` its folder, ``inputs`` the fingerprints of what it starts from.
    """

    def __init__(self, *, settings: RewardModelConfig, folder: Path, inputs: Mapping[str, str], **named: Any) -> None:
        super().__init__(**named)
        self.settings = settings
        self.folder = folder
        self.inputs = inputs
        self.random: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.last_metrics: dict[str, float] = {}

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        place = (self.state.global_step, 0)
        self.best = better(self.best, self.settings.keep_best, self.last_metrics, checkpoint.name_of(*place))
        state = checkpoint.described(self.settings, self.inputs) | {
            "random": self.random,
            "best": self.best,
            "scheduler": self.lr_scheduler.state_dict(),
        }

        def fill(folder: Path) -> None:
            save_model(self.model, self.processing_class, folder)
            state["optimizer_groups"] = checkpoint.save_optimizer(self.optimizer.state_dict(), "reward", folder)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        keep = self.best["checkpoint"] if self.best else None
        checkpoint.save(self.folder, place, state, fill, keep_last=self.settings.keep_last, keep=keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        adapted = is_adapted(self.model)
        load_trained_weights(
            self.model, saved_adapter(folder) if adapted else dict(load_reward_weights(folder).state_dict())
        )

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            saved = checkpoint.Checkpoint(Path(checkpoint_folder))
            self.optimizer.load_state_dict(checkpoint.load_optimizer(saved, "reward", saved.state["optimizer_groups"]))
            self.lr_scheduler.load_state_dict(saved.state["scheduler"])
            self.best, self.random = saved.state["best"], saved.state["random"]

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            random_state.restore(checkpoint.Checkpoint(Path(checkpoint_folder)).state["random"])


class Keeper(TrainerCallback):
    """Between the steps of a reward training: log, progress, checkpoints, signals and unusable gradients."""

    def __init__(self, log: MetricLog, progress: Progress, stop: Stop, watchdog: Watchdog) -> None:
        self.log, self.progress, self.stop, self.watchdog = log, progress, stop, watchdog
        self.trainer: Any = None
        self._clock, self._skipped, self._left_out = Clock(), 0, False

    def attend(self, trainer: ResumableRewardTrainer) -> None:
        """The trainer whose callback this is."""
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step's time begins."""
        self._clock = Clock()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a micro-batch that isn't a step's last: nothing is half done but gradients, which are given up."""
        self.watchdog.beat(f"step {state.global_step + 1}")
        self.stop.check()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave an update out whose gradient isn't finite; stop after several in a row."""
        self.stop.check()
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self._left_out = not all(bool(torch.isfinite(g).all()) for g in gradients)
        self._skipped = self._skipped + 1 if self._left_out else 0
        if not self._left_out:
            return
        limit, step = self.trainer.settings.max_skipped_updates, state.global_step + 1
        if self._skipped > limit:
            raise TrainingDiverged(
                f"The gradient of step {step} isn't finite, nor were those of the {limit} steps before. Lower learning_rate."
            )
        say(f"Step {step}: the gradient isn't finite; this update is left out ({self._skipped} in a row).", "yellow")
        self.trainer.model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Is a checkpoint due?"""
        self.watchdog.beat(f"step {state.global_step + 1}")
        self.trainer.random = random_state.capture()
        every = self.trainer.settings.save_every
        control.should_save = bool(every and state.global_step % every == 0)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Write a step's figures down."""
        if not logs or "accuracy" not in logs:
            return
        self._clock.lap("step")
        metrics = {"step": state.global_step} | {name: float(logs[name]) for name in LOGGED if name in logs}
        metrics["skipped_updates"] = float(self._left_out)
        self.trainer.last_metrics = metrics
        self.log.write(metrics | self._clock.seconds())
        self.progress.step(f"loss {logs['loss']:.3f}, accuracy {logs['accuracy']:.2f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a checkpoint: stop here if asked to."""
        self.stop.check()
