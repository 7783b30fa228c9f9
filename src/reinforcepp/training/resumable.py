"""TRL's trainers with the checkpoints, signals and guardrails that policy training has.

Transformers would pickle its checkpoints and write them in place; here they are those of ``checkpoint``.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.errors import TrainingDiverged
from reinforcepp.models.loading import load_policy, save_model
from reinforcepp.models.lora import has_adapter, load_adapter_weights, load_trainable_weights
from reinforcepp.models.reward_models import load_reward_weights
from reinforcepp.monitoring import Clock, MetricLog, Progress, echo, restore_logs
from reinforcepp.monitoring.signals import Interrupted, Stop, StopAsked, stop_signals
from reinforcepp.monitoring.watchdog import Watchdog
from reinforcepp.training import checkpoint
from reinforcepp.training import rng as random_state
from reinforcepp.training.supervised_loop import RunContext, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.distributed.ranks import Ranks

TRAINER_STATE = "trainer_state.json"


class CheckpointedTrainer(Trainer):
    """Saves and restores all that decides the next step; nothing is unpickled. A mixin for TRL's trainers.

    ``settings`` is the run's configuration, ``begun`` what it starts from.
    """

    title = ""
    """What is trained, in words."""
    kind = ""
    """What is trained, as files are named after it."""
    logged: tuple[str, ...] = ()
    """Figures of a step, beside those of every training."""
    shown = ("", "")
    """The one that the progress line shows, under TRL's name and in words."""

    def __init__(self, *, settings: Settings, begun: RunContext, **named: Any) -> None:
        super().__init__(**named)
        self.settings = settings
        self.begun = begun
        self.tokenizer = named["processing_class"]
        self.random: dict[str, Any] = {}
        self.best: dict[str, Any] = {}
        self.last_metrics: dict[str, float] = {}

    @staticmethod
    def arguments(config: Any, **usual: Any) -> TrainingArguments:
        """TRL's own arguments, with those that all trainings have."""
        raise NotImplementedError

    @staticmethod
    def saved_model(folder: Path) -> PreTrainedModel:
        """The model in a checkpoint without an adapter."""
        raise NotImplementedError

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        place = (self.state.global_step, 0)
        self.best = checkpoint.better(self.best, self.settings.keep_best, self.last_metrics, checkpoint.name_of(*place))
        state = checkpoint.described(self.settings, self.begun.inputs) | {
            "random": self.random,
            "best": self.best,
            "scheduler": self.lr_scheduler.state_dict(),
        }

        def fill(folder: Path) -> None:
            save_model(self.model, self.tokenizer, folder)
            state["optimizer_groups"] = checkpoint.save_optimizer(self.optimizer.state_dict(), self.kind, folder)
            self.state.save_to_json(str(folder / TRAINER_STATE))

        keep = self.best["checkpoint"] if self.best else None
        if self.begun.ranks.is_main:
            checkpoint.save(self.begun.folder, place, state, fill, keep_last=self.settings.keep_last, keep=keep)
        self.begun.ranks.barrier()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        adapted = has_adapter(self.model)
        load_trainable_weights(
            self.model, load_adapter_weights(folder) if adapted else dict(self.saved_model(folder).state_dict())
        )

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            saved = checkpoint.Checkpoint(Path(checkpoint_folder))
            groups = saved.state["optimizer_groups"]
            self.optimizer.load_state_dict(checkpoint.load_optimizer(saved, self.kind, groups))
            self.lr_scheduler.load_state_dict(saved.state["scheduler"])
            self.best, self.random = saved.state["best"], saved.state["random"]

    def _load_rng_state(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            random_state.restore(checkpoint.Checkpoint(Path(checkpoint_folder)).state["random"])


class ResumableRewardTrainer(CheckpointedTrainer, RewardTrainer):
    """Learns from pairs: rows of ``chosen_ids`` and ``rejected_ids``."""

    title = "reward model"
    kind = "reward"
    logged = ("accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    shown = ("accuracy", "accuracy")

    @staticmethod
    def arguments(config: RewardModelConfig, **usual: Any) -> TrainingArguments:
        """The fresh head always has a step of warm-up."""
        usual["warmup_steps"] = max(1, usual["warmup_steps"])
        return RewardConfig(center_rewards_coefficient=config.center_rewards_coefficient, **usual)

    @staticmethod
    def saved_model(folder: Path) -> PreTrainedModel:
        """A reward model."""
        return load_reward_weights(folder)


class ResumableSftTrainer(CheckpointedTrainer, SFTTrainer):
    """Learns texts: rows of ``input_ids`` and ``labels``, which are -100 where nothing is learnt."""

    title = "warm-up"
    kind = "policy"
    logged = ("entropy", "mean_token_accuracy")
    shown = ("mean_token_accuracy", "token accuracy")

    def __init__(self, *, model: PreTrainedModel, **named: Any) -> None:
        # The libraries write what suits a training into the configurations that are saved for use: no cache, and the
        # tokenizer's pad token, whose embedding many models then never learn, though it may be the EOS.
        settings = [model.config, model.config.get_text_config(), model.generation_config]
        kept = [(each, dict(vars(each))) for each in settings if each is not None]
        super().__init__(model=model, **named)
        for each, values in kept:
            vars(each).update(values)
        self.processing_class = None  # or it would be done again when training starts

    @staticmethod
    def arguments(config: SftConfig, **usual: Any) -> TrainingArguments:
        """Rows are tokenised already."""
        return SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **usual)

    @staticmethod
    def saved_model(folder: Path) -> PreTrainedModel:
        """A language model."""
        return load_policy(str(folder))


class TrainingCallback(TrainerCallback):
    """Between the steps of a training: log, progress, checkpoints, signals and unusable gradients."""

    def __init__(self, log: MetricLog, progress: Progress, stop: Stop, watchdog: Watchdog, ranks: Ranks) -> None:
        self.log, self.progress, self.stop, self.watchdog, self._ranks = log, progress, stop, watchdog, ranks
        self.trainer: Any = None
        self._clock, self._skipped, self._left_out = Clock(), 0, False

    def attend(self, trainer: CheckpointedTrainer) -> None:
        """The trainer whose callback this is."""
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step's time begins; several processes only stop together, here."""
        if self._ranks.count > 1 and self._ranks.any(self.stop.number is not None):
            raise StopAsked
        self._clock = Clock()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a micro-batch that isn't a step's last: nothing is half done but gradients, which are given up."""
        self.watchdog.beat(f"step {state.global_step + 1}")
        self._check_stop()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave an update out whose gradient isn't finite, which then is so on all processes; stop after several in a row."""
        self._check_stop()
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
        echo(f"Step {step}: the gradient isn't finite; this update is left out ({self._skipped} in a row).", "yellow")
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
        if not logs or "loss" not in logs:  # what is told of the whole training in its end
            return
        self._clock.lap("step")
        names = ("loss", "grad_norm", "learning_rate", *self.trainer.logged, "epoch")
        metrics = {"step": state.global_step} | {name: float(logs[name]) for name in names if name in logs}
        metrics["skipped_updates"] = float(self._left_out)
        self.trainer.last_metrics = metrics
        if self._ranks.is_main:
            self.log.write(metrics | self._clock.seconds())
        name, words = self.trainer.shown
        self.progress.step(f"loss {logs['loss']:.3f}, {words} {logs[name]:.2f}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a checkpoint: stop here if asked to."""
        self._check_stop()

    def _check_stop(self) -> None:
        if self._ranks.count == 1:
            self.stop.check()


def fit(
    trainer_class: type[CheckpointedTrainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    config: Settings,
    begun: RunContext,
) -> None:
    """Train ``model`` on tokenised ``rows``, from the checkpoint on that ``begun`` has if it has one.

    Raises:
        Interrupted: a signal asked for it; what was done is saved.
        TrainingDiverged: several gradients in a row weren't finite.
    """
    steps, saved = math.ceil(len(rows) / config.batch_size) * config.num_train_epochs, begun.saved
    ranks = begun.ranks
    if saved is not None:
        if ranks.is_main:
            restore_logs(saved.folder, begun.folder)
        echo(f"Going on after step {saved.step} of {steps}")
        # it would warn of rows per process, which may be more or fewer now; what must not change has been compared
        logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(MetricLog()) as log,
        Progress(trainer_class.title, steps, 0 if saved is None else saved.step) as progress,
        stop_signals() as stop,
        Watchdog(begun.folder, config.watchdog_seconds) as watchdog,
    ):
        if ranks.is_main:
            log.open(begun.folder)
        keeper = TrainingCallback(log, progress, stop, watchdog, ranks)
        arguments = trainer_class.arguments(config, output_dir=scratch, **_arguments(config, steps, ranks.count))
        arguments.mixed_precision = config.mixed_precision  # else the launcher's would do where the setting is "no"
        trainer = trainer_class(
            settings=config,
            begun=begun,
            model=model,
            args=arguments,
            train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows)),
            processing_class=tokenizer,
            callbacks=[keeper],
        )
        for parameter in model.parameters():
            if parameter.requires_grad:  # the trainer rounds adapters beside weights of 4 bits
                parameter.data = parameter.data.float()
        keeper.attend(trainer)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved.folder))
        except StopAsked as asked:
            done = trainer.state.global_step
            if done:
                trainer._save_checkpoint(model)
            raise Interrupted(f"after step {done} of {steps}", stop.exit_code) from asked
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # what follows is computed in float32


def _arguments(config: Settings, steps: int, processes: int) -> dict[str, Any]:
    """What all of TRL's trainers are told; of an optimiser step's rows each process has the same number."""
    share = config.batch_size // processes
    at_a_time = math.gcd(config.effective_micro_batch_size, share)
    return {
        "per_device_train_batch_size": at_a_time,
        "gradient_accumulation_steps": share // at_a_time,
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "warmup_steps": steps // 10,
        "max_length": None,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "torch_compile": config.torch_compile,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # no more than the callback asks for
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "seed": config.seed,
    }
