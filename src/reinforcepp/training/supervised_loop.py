"""Run TRL's trainers with the checkpoints, signal handling and guardrails that policy training has.

Transformers pickles its checkpoints and writes them in place. Here a callback writes those of ``checkpoint`` instead,
which are atomic and hold no pickle, and restores them when a run resumes. Importing this file loads TRL.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length
from trl import SFTConfig, SFTTrainer

from reinforcepp.config import SftConfig, as_dict
from reinforcepp.config.shared import is_due
from reinforcepp.errors import TrainingDiverged
from reinforcepp.models.loading import load_policy
from reinforcepp.models.lora import has_adapter, is_quantized, load_adapter_weights, load_trainable_weights
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring import Clock, MetricLog, Progress, restore_logs
from reinforcepp.monitoring.signals import Interrupted, Stop, StopRequested, stop_signals
from reinforcepp.monitoring.watchdog import Watchdog
from reinforcepp.runtime.memory import keep_freed_memory
from reinforcepp.runtime.process import protect_compiled_code
from reinforcepp.runtime.terminal import echo
from reinforcepp.training import checkpoint, rng
from reinforcepp.training.optimizer import OPTIMIZER_SETTINGS
from reinforcepp.training.schedule import schedule_factor
from reinforcepp.training.supervised_setup import RunContext, SupervisedConfig, count_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRAINER_STATE = "trainer_state.json"


class SupervisedTrainer(Trainer):
    """What :func:`fit` needs to know of a TRL trainer; a mixin for both."""

    title: ClassVar[str]
    """Title of the progress line."""
    kind: ClassVar[str]
    """Prefix of the optimizer's file in a checkpoint."""
    logged: ClassVar[tuple[str, ...]]
    """Metrics of a step, in addition to those that both trainers log."""
    headline: ClassVar[tuple[str, str]]
    """Metric that the progress line shows: TRL's name for it, and its label."""

    @staticmethod
    def arguments(config: Any, **common: Any) -> TrainingArguments:
        """Return TRL's arguments; ``common`` holds those that both trainers share."""
        raise NotImplementedError

    @staticmethod
    def load_model(folder: Path) -> PreTrainedModel:
        """Load the model of a checkpoint that holds full weights."""
        raise NotImplementedError

    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule, whose first step, unlike that of transformers, has a learning rate above 0."""
        if self.lr_scheduler is None:
            factor = schedule_factor(
                self.args.lr_scheduler_type,
                warmup=self.args.get_warmup_steps(num_training_steps),
                steps=num_training_steps,
                peak=self.args.learning_rate,
                arguments=self.args.lr_scheduler_kwargs,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _send_telemetry(self) -> None:
        """Send nothing, because TRL would count this training as one of its own."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing, because :func:`fit` has loaded the weights. No public hook covers this step."""


class ResumableSftTrainer(SupervisedTrainer, SFTTrainer):
    """Trains on texts: rows of ``input_ids`` and ``labels``, which are -100 on tokens without a loss."""

    title = "SFT"
    kind = "policy"
    logged = ("entropy", "mean_token_accuracy")
    headline = ("mean_token_accuracy", "token accuracy")

    def __init__(self, *, model: PreTrainedModel, **named: Any) -> None:
        # The libraries write training settings into the configurations that are saved for inference: no KV cache, and the
        # tokenizer's pad token. Many models then don't train that token's embedding, although it may be the EOS.
        configs = [model.config, model.config.get_text_config(), model.generation_config]
        before = [(config, dict(vars(config))) for config in configs if config is not None]
        super().__init__(model=model, **named)
        for config, values in before:
            vars(config).update(values)
        self.processing_class = None  # otherwise train() aligns the special tokens again

    @staticmethod
    def arguments(config: SftConfig, **common: Any) -> TrainingArguments:
        """Return TRL's arguments for rows that are tokenized already."""
        return SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **common)

    @staticmethod
    def load_model(folder: Path) -> PreTrainedModel:
        """Load a language model."""
        return load_policy(str(folder))


class TrainingCallback(TrainerCallback):
    """Logs steps, saves and restores checkpoints, handles signals and skips updates that aren't finite.

    Args:
        trainer_class: the trainer, for the names of its metrics and files.
        config: the run's settings.
        run: folder, inputs, ranks and the checkpoint to resume from.
        tokenizer: saved with every checkpoint.
        log: metric log, open on rank 0 only.
        progress: progress line.
        stop: pending stop signal, if any.
        watchdog: receives a heartbeat per micro-batch.
    """

    def __init__(
        self,
        trainer_class: type[SupervisedTrainer],
        config: SupervisedConfig,
        run: RunContext,
        tokenizer: PreTrainedTokenizerBase,
        *,
        log: MetricLog,
        progress: Progress,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        self.trainer_class, self.config, self.run, self.tokenizer = trainer_class, config, run, tokenizer
        self.log, self.progress, self.stop, self.watchdog = log, progress, stop, watchdog
        self._best: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}
        self._random: dict[str, Any] = {}
        self._restore_random = run.saved is not None
        self._clock, self._skipped_in_a_row = Clock(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Restore optimizer and schedule if the run resumes."""
        if self.run.saved is None:
            return
        saved = self.run.saved.state
        groups = saved["optimizer_groups"]
        live["optimizer"].load_state_dict(checkpoint.load_optimizer(self.run.saved, self.trainer_class.kind, groups))
        live["lr_scheduler"].load_state_dict(saved["scheduler"])
        self._best, self._random = saved["best"], saved["random"]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Restore the random generators if the run resumes at the start of an epoch."""
        # At an epoch's start the data loader draws its seed from the restored generators, as it did in the first run.
        # Within an epoch it first replays the order of the whole epoch, so on_step_begin restores them later.
        if state.global_step % steps_per_epoch(args, state, live) == 0:
            self._restore_generators()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the step timer. Stop here if another rank received a signal."""
        self._restore_generators()
        # Ranks can only stop together, and only between steps.
        if self.run.ranks.count > 1 and self.run.ranks.any(self.stop.number is not None):
            raise StopRequested
        self._clock = Clock()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if a signal arrived: only gradients of an unfinished step are lost."""
        self.watchdog.beat(f"step {state.global_step + 1}")
        self._check_stop()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **live: Any) -> None:
        """Skip an update whose gradient isn't finite, which holds on all ranks alike; raise after several in a row."""
        self._check_stop()
        model = live["model"]
        # One transfer for all of them, because each makes the CPU wait for the GPU.
        checks = [torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None]
        finite = not checks or bool(torch.stack(checks).all())
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if finite:
            return
        limit, step = self.config.max_skipped_updates, state.global_step + 1
        if self._skipped_in_a_row > limit:
            raise TrainingDiverged(
                f"Step {step}: the gradient isn't finite, nor were those of the {limit} steps before. "
                "Lower learning_rate."
            )
        echo(
            f"Step {step}: skipped update (the gradient isn't finite). "
            f"{self._skipped_in_a_row} of {limit} allowed in a row.",
            "yellow",
        )
        model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Capture the random generators as the next step finds them."""
        self.watchdog.beat(f"step {state.global_step + 1}")
        self._random = rng.capture()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **live: Any) -> None:
        """Log a finished step and save a checkpoint if one is due."""
        if not logs or "loss" not in logs:  # an evaluation, or the summary at the end of training
            self.run.ranks.track(logs or {}, state.global_step)
            return
        self._clock.lap("step")
        by_output = sorted(name for name in logs if name.startswith("accuracy/"))
        names = ("loss", "grad_norm", "learning_rate", *self.trainer_class.logged, *by_output, "epoch")
        metrics = {"step": state.global_step} | {name: float(logs[name]) for name in names if name in logs}
        metrics["skipped_updates"] = float(self._skipped_in_a_row > 0)
        self._metrics = metrics
        checkpoint.check_metric(self.config.keep_best, metrics)
        values = metrics | self._clock.seconds()
        self.run.ranks.track(values, state.global_step)
        if self.run.ranks.is_main:
            self.log.write(values)
        name, label = self.trainer_class.headline
        shown = f", {label} {logs[name]:.2f}" if name in logs else ""
        self.progress.step(f"loss {logs['loss']:.3f}{shown}")
        if is_due(self.config.save_every, state.global_step, steps_per_epoch(args, state, live)):
            self.save(state, live["model"], live["optimizer"], live["lr_scheduler"])
            self._check_stop()

    def save(self, state: Any, model: PreTrainedModel, optimizer: Any, scheduler: Any) -> None:
        """Write a checkpoint of the last finished step. Rank 0 writes; all ranks must call it."""
        position = (state.global_step, 0)
        self._best = checkpoint.best_checkpoint(
            self._best, self.config.keep_best, self._metrics, checkpoint.name_of(*position)
        )
        contents = checkpoint.run_description(self.config, self.run.inputs) | {
            "random": self._random,
            "best": self._best,
            "scheduler": scheduler.state_dict(),
        }

        def fill(folder: Path) -> None:
            save_model(model, self.tokenizer, folder)
            contents["optimizer_groups"] = checkpoint.save_optimizer(
                optimizer.state_dict(), self.trainer_class.kind, folder
            )
            state.save_to_json(str(folder / TRAINER_STATE))

        keep = self._best["checkpoint"] if self._best else None
        if self.run.ranks.is_main:
            checkpoint.save(self.run.folder, position, contents, fill, keep_last=self.config.latest_kept, keep=keep)
        self.run.ranks.barrier()

    def _restore_generators(self) -> None:
        if self._restore_random:
            rng.restore(self._random)
            self._restore_random = False

    def _check_stop(self) -> None:
        if self.run.ranks.count == 1:
            self.stop.check()


def fit(
    trainer_class: type[SupervisedTrainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    config: SupervisedConfig,
    run: RunContext,
) -> None:
    """Train ``model`` on tokenized ``rows``; see :func:`run_trainer`."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(
            model=model,
            args=trl_arguments(trainer_class, config, run.ranks.count, output_dir=scratch),
            train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows)),
            processing_class=tokenizer,
        )
        run_trainer(trainer, tokenizer, config, run)


def run_trainer(
    trainer: SupervisedTrainer, tokenizer: PreTrainedTokenizerBase, config: SupervisedConfig, run: RunContext
) -> TrainOutput:
    """Run the training of ``trainer``, from the checkpoint ``run.saved`` if there is one.

    Raises:
        Interrupted: a signal stopped training; the finished steps are saved.
        TrainingDiverged: the gradients of several steps in a row weren't finite.
    """
    steps, saved, ranks = count_steps(trainer.train_dataset, config), run.saved, run.ranks
    trainer.args.warmup_steps = config.warmup_of(steps)
    if config.torch_compile:
        protect_compiled_code()
    if is_quantized(trainer.model):
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # TRL casts adapters on 4-bit weights to bfloat16
                parameter.data = parameter.data.float()
    if saved is not None:
        if ranks.is_main:
            restore_logs(saved.folder, run.folder)
        echo(f"Resuming after step {saved.step} of {steps}")
        # Transformers would warn that the batch size per process changed, which is allowed: only the global one counts.
        logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
        load_weights(trainer, saved.folder)
    with (
        keep_freed_memory(ranks.device.type),
        tempfile.TemporaryDirectory() as scratch,
        closing(MetricLog()) as log,
        Progress(trainer.title, steps, 0 if saved is None else saved.step) as progress,
        stop_signals() as stop,
        Watchdog(run.folder, config.watchdog_seconds) as watchdog,
        _trackers(config, run),
    ):
        if ranks.is_main:
            log.open(run.folder)
        callback = TrainingCallback(
            type(trainer), config, run, tokenizer, log=log, progress=progress, stop=stop, watchdog=watchdog
        )
        if saved is not None:
            # Transformers gets its own state alone, so that it can't unpickle a file of the checkpoint.
            shutil.copyfile(saved.folder / TRAINER_STATE, Path(scratch) / TRAINER_STATE)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(callback)
        try:
            return Trainer.train(trainer, resume_from_checkpoint=None if saved is None else scratch)
        except StopRequested as asked:
            done = trainer.state.global_step
            if done:
                callback.save(trainer.state, trainer.model, trainer.optimizer, trainer.lr_scheduler)
            raise Interrupted(f"after step {done} of {steps}", stop.exit_code) from asked
        finally:
            trainer.remove_callback(callback)
            # The caller evaluates in float32, so undo the wrapper for mixed precision.
            trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def steps_per_epoch(args: Any, state: Any, live: Mapping[str, Any]) -> int:
    """Return the optimizer steps per epoch from the arguments of a callback; the whole training's for an endless stream."""
    batches = live["train_dataloader"]
    return math.ceil(len(batches) / args.gradient_accumulation_steps) if has_length(batches) else int(state.max_steps)


@contextmanager
def _trackers(config: SupervisedConfig, run: RunContext) -> Iterator[None]:
    """Start the trackers of report_to, and close them at the end of the block."""
    if config.report_to:
        run.ranks.start_trackers(as_dict(config), 0 if run.saved is None else run.saved.step)
    try:
        yield
    finally:
        run.ranks.end_trackers()


def load_weights(trainer: SupervisedTrainer, folder: Path) -> None:
    """Load the weights that were trained, from a checkpoint or a saved model."""
    if has_adapter(trainer.model):
        load_trainable_weights(trainer.model, load_adapter_weights(folder))
    else:
        load_trainable_weights(trainer.model, dict(trainer.load_model(folder).state_dict()))


def trl_arguments(
    trainer_class: type[SupervisedTrainer], config: SupervisedConfig, ranks: int, **own: Any
) -> TrainingArguments:
    """Return TRL's arguments; ``own`` are those that the trainers don't share."""
    arguments = trainer_class.arguments(config, **_common_arguments(config, ranks) | own)
    arguments.mixed_precision = config.mixed_precision  # with "no", the launcher's precision would apply otherwise
    return arguments


def _common_arguments(config: SupervisedConfig, ranks: int) -> dict[str, Any]:
    """Return the arguments that both trainers share; every rank gets the same number of a step's rows."""
    rows_per_rank = config.batch_size // ranks
    micro_batch = math.gcd(config.effective_micro_batch_size, rows_per_rank)
    return {
        "per_device_train_batch_size": micro_batch,
        "per_device_eval_batch_size": micro_batch,
        "gradient_accumulation_steps": rows_per_rank // micro_batch,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.peak_learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": config.schedule_arguments or None,
        **{name: getattr(config, name) for name in (*OPTIMIZER_SETTINGS, "max_grad_norm")},
        "max_length": None,
        "use_cpu": not torch.accelerator.is_available(),
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "gradient_checkpointing": config.gradient_checkpointing,
        "torch_compile": config.torch_compile,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # TrainingCallback saves
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "seed": config.seed,
    }
