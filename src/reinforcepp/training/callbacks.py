"""Transformers' callbacks: they see the training as a TrainerState, and steer it through a TrainerControl."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.config.shared import is_due
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import read_metrics, rounded
from reinforcepp.training.evaluation import logged_metrics
from reinforcepp.training.learner import Learner

if TYPE_CHECKING:  # these load PEFT
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_callback import CallbackHandler
    from transformers.trainer_utils import TrainOutput


CURRENT = ("step", "epoch", "num_tokens", "learning_rate", "grad_norm", "kl_coef")
"""Metrics of which a log has the last value instead of the mean, as in TRL."""


class Callbacks:
    """Owns the :class:`transformers.TrainerState` of a run, and calls the user's callbacks at transformers' events.

    Settings decide what is due after a step, and callbacks can add to it. All ranks then do what any rank's callbacks want.

    Args:
        callbacks: callbacks of transformers, classes or instances.
        config: the settings, which callbacks get as ``args``.
        ranks: the data-parallel ranks.
        learner: the policy with its optimizer and schedule, which callbacks get.
        tokenizer: callbacks get it as ``processing_class``.
        num_steps: steps of the run.
        steps_per_epoch: steps per pass over the prompts.

    Raises:
        ConfigError: one of ``callbacks`` isn't a callback.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None,
        config: ReinforceConfig,
        ranks: Ranks,
        learner: Learner,
        tokenizer: PreTrainedTokenizerBase,
        num_steps: int,
        steps_per_epoch: int,
    ) -> None:
        from transformers import TrainerControl, TrainerState

        self.config = config
        self.steps_per_epoch = steps_per_epoch
        self._ranks = ranks
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=num_steps,
            logging_steps=config.logging_steps,
            eval_steps=config.eval_every,
            save_steps=config.save_every,
            train_batch_size=config.completions_per_step,
            num_train_epochs=-(-num_steps // steps_per_epoch),
            is_local_process_zero=ranks.accelerator.is_local_main_process,
            is_world_process_zero=ranks.is_main,
        )
        self.handler = _handler(learner, tokenizer, steps_per_epoch)
        for callback in callbacks or ():
            self.add(callback)
        self._summary: dict[str, float] = {}
        self._losses: list[float] = []
        self._unlogged: list[Mapping[str, float]] = []
        """The steps since the last one that was logged."""
        self._first, self._started = 0, time.monotonic()

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback.

        Raises:
            ConfigError: it isn't a callback of transformers.
        """
        from transformers import TrainerCallback

        if not isinstance(callback, TrainerCallback) and not (
            isinstance(callback, type) and issubclass(callback, TrainerCallback)
        ):
            raise ConfigError(
                f"callbacks: {callback!r} isn't a transformers.TrainerCallback. Give a class or an instance."
            )
        self.handler.add_callback(callback)

    # --- events, in the order of a training -----------------------------------------------------------------------------

    def call(self, event: str, **arguments: Any) -> None:
        """Call the method ``event`` of each callback; on several ranks, agree on what they want."""
        only_settings = len(self.handler.callbacks) == 1
        if only_settings and event != "on_step_end":
            return
        self.control = getattr(self.handler, event)(self.config, self.state, self.control, **arguments)
        if self._ranks.count > 1 and not only_settings:
            wanted = self._ranks.gather(dict(vars(self.control)))
            vars(self.control).update({name: any(flags[name] for flags in wanted) for name in wanted[0]})

    def begin(self) -> None:
        """Report that training begins, at the current position."""
        self._first, self._started = self.state.global_step, time.monotonic()
        self.control.should_training_stop = False
        self.call("on_train_begin")

    def begin_step(self) -> None:
        """Report that a step begins, and an epoch with its first step."""
        if self.state.global_step % self.steps_per_epoch == 0:
            self.control.should_epoch_stop = False
            self.call("on_epoch_begin")
        vars(self.control).update(should_log=False, should_evaluate=False, should_save=False)
        self.call("on_step_begin")

    def at(self, step: int) -> dict[str, float]:
        """Move to the position after ``step`` finished steps; return step and epoch."""
        self.state.global_step, self.state.epoch = step, step / self.steps_per_epoch
        return {"step": step, "epoch": self.state.epoch}

    def log_step(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Log the means since the last logged step if a log is due; return them with what callbacks add, otherwise nothing."""
        self._keep(metrics)
        return self.log(self._means()) if self.control.should_log else {}

    def _keep(self, metrics: Mapping[str, float]) -> None:
        self._losses += [metrics["loss"]] if "loss" in metrics else []
        self._unlogged.append(metrics)

    def _means(self) -> dict[str, float]:
        """Return the means over the steps that aren't logged yet; they then count as logged."""
        steps, self._unlogged = self._unlogged, []
        values = {name: [step[name] for step in steps if name in step] for step in steps for name in step}
        return {name: each[-1] if name in CURRENT or len(each) == 1 else fmean(each) for name, each in values.items()}

    def log(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Append ``metrics`` to ``log_history`` at the current step; return them with what callbacks add."""
        logs = rounded({**self.at(self.state.global_step), **metrics})
        self.state.log_history.append(logs)
        self.call("on_log", logs=logs)
        return logs

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Log the ``metrics`` of an evaluation, report it, and remember the best one."""
        self.control.should_evaluate = False
        logs = self.log(metrics)
        self.call("on_evaluate", metrics={**metrics, "epoch": logs["epoch"]})
        self._find_best()

    def saved(self, best: str | None) -> None:
        """Report a checkpoint; ``best`` is the path of the best one so far."""
        self.control.should_save = False
        self.state.best_model_checkpoint = best
        self._find_best()
        self.call("on_save")

    def end_step(self) -> None:
        """Report the end of an epoch, if the step ended one."""
        if self.control.should_epoch_stop or self.state.global_step % self.steps_per_epoch == 0:
            self.call("on_epoch_end")

    @property
    def last_step(self) -> bool:
        """Whether no step follows: all are done, or a callback stops the training."""
        return self.control.should_training_stop or self.state.global_step >= self.state.max_steps

    def finish(self) -> None:
        """Log the metrics of the whole training, under transformers' keys, and report that it ends."""
        seconds, steps = max(time.monotonic() - self._started, 1e-6), self.state.global_step - self._first
        self._summary = {
            "train_runtime": seconds,
            "train_steps_per_second": steps / seconds,
            "train_samples_per_second": steps * self.config.completions_per_step / seconds,
            "train_loss": fmean(self._losses) if self._losses else nan,
            "epoch": self.state.epoch,
        }
        self.log(self._summary)
        self.call("on_train_end")

    @property
    def output(self) -> TrainOutput:
        """What ``train()`` returns: the number of steps, their mean loss, and the metrics of the whole training."""
        from transformers.trainer_utils import TrainOutput

        return TrainOutput(self.state.global_step, self._summary["train_loss"], dict(self._summary))

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def stateful(self) -> dict[str, list[Any]]:
        """Return the state of each callback that exports one, by the name of its class; and that of the control."""
        from transformers.trainer_callback import ExportableState

        states: dict[str, list[Any]] = {}
        for callback in (self.control, *self.handler.callbacks):
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        return states

    def restore(
        self,
        folder: Path,
        evaluations: Mapping[str, Mapping[str, float]],
        step: int,
        states: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """Restore the position after ``step``, the history, and the callbacks' states.

        Args:
            folder: holds the log of the steps.
            evaluations: metrics of the run's evaluations, by name.
            step: finished steps.
            states: what :meth:`stateful` returned.
        """
        self.state.log_history, self._losses, self._unlogged = [], [], []
        for logged in read_metrics(folder):
            self._keep(logged)
            if self.config.logs_step(int(logged["step"])):
                self.state.log_history.append(rounded(self._means()))
        for name, metrics in evaluations.items():
            if name != "before" or self.logs_start:
                position = self.at(
                    0 if name == "before" else step if name == "after" else int(name.removeprefix("step "))
                )
                self.state.log_history.append(rounded({**position, **logged_metrics(metrics)}))
        self.state.log_history.sort(key=lambda entry: entry["step"])
        self.at(step)
        self._find_best()
        left = {name: list(saved) for name, saved in (states or {}).items()}
        for callback in (self.control, *self.handler.callbacks):
            if saved := left.get(type(callback).__name__):
                content = saved.pop(0)
                if callback is self.control:
                    self.control.should_epoch_stop = content["args"]["should_epoch_stop"]
                else:
                    vars(callback).update(content["attributes"])

    @property
    def logs_start(self) -> bool:
        """Whether the evaluation before training is logged and reported, as with TRL's eval_on_start."""
        return self.config.eval_on_start

    def _find_best(self) -> None:
        """Find the best value of the metric of keep_best, and its step."""
        name = self.config.keep_best or ""
        sign, key = (-1 if name.startswith("-") else 1), name.removeprefix("-")
        known = [(sign * entry[key], -entry["step"]) for entry in self.state.log_history if key in entry]
        if known:
            value, step = max(known)
            self.state.best_metric, self.state.best_global_step = sign * value, -int(step)


def _handler(learner: Learner, tokenizer: PreTrainedTokenizerBase, steps_per_epoch: int) -> CallbackHandler:
    """Return transformers' handler with the callback that follows the settings."""
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

    class FlowCallback(DefaultFlowCallback):
        """Asks for what the settings make due after a step."""

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            step = state.global_step
            control.should_log |= args.logs_step(step)
            control.should_evaluate |= is_due(args.eval_every, step, steps_per_epoch)
            control.should_save |= is_due(args.save_every, step, steps_per_epoch)
            control.should_training_stop |= step >= state.max_steps

        def on_epoch_end(self, *positional: Any, **others: Any) -> None:
            pass

    scheduler = learner.scheduler
    return CallbackHandler([FlowCallback()], learner.plain, tokenizer, scheduler.optimizer, scheduler)
