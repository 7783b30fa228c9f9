"""REINFORCE++ training; :meth:`ReinforceTrainer.train` is the whole algorithm, read from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.environments.protocol import EnvironmentFactory
from reinforcepp.environments.tools.schemas import ToolFunction
from reinforcepp.monitoring.step_metrics import step_metrics
from reinforcepp.rewards.functions import RewardFunction
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.runtime.memory import keep_freed_memory
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.builder import build
from reinforcepp.training.monitor import Monitor
from reinforcepp.training.policy_update import rollout_batch, with_advantages
from reinforcepp.training.setup import with_peft_config
from reinforcepp.training.step_groups import sample
from reinforcepp.training.trainer_methods import TrainerMethods, refuse_arguments

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
    from transformers.trainer_utils import TrainOutput


class ReinforceTrainer(TrainerMethods):
    """Trains a causal language model with REINFORCE++; the arguments are named as in TRL.

    Args:
        model: a model name or folder, or a loaded model, which is trained in place.
        reward_funcs: one or several functions ``f(prompts, completions, **columns) -> list[float]``, or what the setting
            ``rewards`` takes: folders of reward models, rules, servers. Their scores are added.
        args: the settings.
        train_dataset: rows with a ``prompt`` (mappings, or a ``datasets.Dataset``); other columns go to reward functions. Rows of
            unknown number, such as an ``IterableDataset``, are read in order, as far as ``max_steps`` needs them. With
            ``interleave_probs``, a dictionary of datasets.
        eval_dataset: held-out rows for evaluations before and after training, or a dictionary of several datasets.
        processing_class: the tokenizer; default: the model's.
        reward_processing_classes: the tokenizers of loaded reward models; one, or one per reward function.
        callbacks: callbacks of transformers, classes or instances.
        optimizers: an optimizer and a learning rate scheduler instead of those in ``args``.
        quantization_config: how ``model`` is quantized when it is loaded.
        peft_config: a ``peft.LoraConfig`` instead of the LoRA settings in ``args``.
        engine: generates the rollouts; default: the one that ``args.rollout`` names.
        judge: a reward function, or its folder, that scores held-out completions and has no part in training.
        reward_weights: one weight per reward function; default: 1.
        environment: a class, or another function that returns an environment for each episode, instead of the name in ``args``.
            Its rewards are the reward function ``environment``, which is added if ``reward_funcs`` doesn't name it.
        tools: Python functions that the policy can call, with type hints and docstrings.

    Raises:
        ReinforceError: settings, data or models don't fit together; raised before training starts.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction] | None = None,
        args: ReinforceConfig | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        engine: RolloutEngine | None = None,
        judge: str | RewardFunction | None = None,
        reward_weights: Sequence[float] | None = None,
        environment: EnvironmentFactory | None = None,
        tools: Sequence[str | ToolFunction] | None = None,
        **unsupported: Any,
    ) -> None:
        refuse_arguments(unsupported)
        self.train_dataset, self.eval_dataset, self.tools = train_dataset, eval_dataset, list(tools or ())
        model, config = with_peft_config(model, args or ReinforceConfig(), peft_config)
        parts = build(
            model,
            reward_funcs,
            config,
            train_dataset,
            eval_dataset,
            processing_class,
            engine=engine,
            judge=judge,
            reward_weights=reward_weights,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            environment=environment,
            tools=tools,
        )
        self.config = parts.update.config  # with the learning rate
        self.folder, self.ranks, self.num_steps = parts.folder, parts.ranks, parts.num_steps
        self.tokenizer, self.prompts, self.rewards = parts.tokenizer, parts.prompts, parts.rewards
        self.update, self.rollouts, self.run, self.guard = parts.update, parts.rollouts, parts.run, parts.guard
        self.callbacks, self.state = parts.callbacks, parts.callbacks.state
        self.policy, self.reference = parts.update.policy.plain, parts.reference
        self.kl_controller, self.evaluator = parts.kl_controller, parts.evaluator
        self.evaluations = parts.evaluator.evaluations
        # The same objects under TRL's names.
        self.args, self.model, self.ref_model = self.config, self.policy, self.reference
        self.processing_class, self.accelerator = self.tokenizer, self.ranks.accelerator
        self.callback_handler = self.callbacks.handler
        self.optimizer, self.lr_scheduler = self.callback_handler.optimizer, self.callback_handler.lr_scheduler
        self.callbacks.call("on_init_end")

    @property
    def engine(self) -> RolloutEngine:
        """The engine that generates, for training and for evaluations."""
        return self.rollouts.checked.engine

    @engine.setter
    def engine(self, engine: RolloutEngine) -> None:
        self.rollouts.checked.engine = engine

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainOutput:
        """Run all steps, or the remaining ones of a resumed run; return the number of steps, their mean loss, and metrics.

        The metrics of each step are in ``state.log_history``. After an error or a signal, call it again to continue from the
        last checkpoint. If the run is finished, it only returns. An earlier run in ``args.output_dir`` is moved to
        ``earlier_runs`` in it, unless ``args`` or ``resume_from_checkpoint`` resume or overwrite it.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the latest one in ``args.output_dir``.

        Raises:
            TrainingDiverged: a guardrail stopped the run; the trainer then has the last checkpoint's weights.
            RewardError, EngineLost: rewards or completions can't be computed any more; a checkpoint is saved.
            KeyboardInterrupt: a signal stopped the run; a checkpoint is saved.
        """
        if resume_from_checkpoint:
            self.run.resume_from(
                resume_from_checkpoint if resume_from_checkpoint is True else str(resume_from_checkpoint)
            )
        if self.run.finished:
            self.run.open_finished()
            return self.callbacks.output
        with keep_freed_memory(self.ranks.device.type), self.guard.training():
            self._begin()
            with Monitor(self.run.summary, self.run.state, self.ranks, self.num_steps) as self.run.monitor:
                self._train()
            self._finish()
        if self.config.push_to_hub:
            self.push_to_hub()
        return self.callbacks.output

    def _train(self) -> None:
        config, run, rollouts, update = self.config, self.run, self.rollouts, self.update
        self.evaluator.run_if_due(run.state.step)  # a run can be stopped in the middle of an evaluation
        while run.state.step < self.num_steps and not self.callbacks.control.should_training_stop:
            with self.guard.step() as step:
                kl_coef = run.state.kl_coef
                if run.batch is None:  # otherwise a checkpoint holds the batch of an unfinished step
                    completions, scores = sample(step, rollouts, self.rewards, update)
                    with step.phase("score", repeatable=True):
                        rollout = rollout_batch(completions, scores, self.rewards, update, self.reference)
                        run.batch = with_advantages(rollout, scores, update, kl_coef)
                batch = run.batch
                with step.phase("update"):
                    stats = update.run(batch, step.index, kl_coef)
                    metrics = stats | step_metrics(batch.rollout, batch.scores, config.reward_bounds)
                new_kl_coef = self.kl_controller(kl_coef, metrics.get("kl", 0.0))
                with step.phase("sync"):
                    rollouts.sync(step.index)
                metrics |= rollouts.batches.observe(step.index, batch.rollout.completions, batch.scores)
                metrics |= rollouts.staleness(step.index)
                run.record(step.index, batch, metrics, step.clock.seconds(), new_kl_coef)
            if step.finished:
                self.evaluator.run_if_due(run.state.step)
                self.guard.save_if_due()
                run.end_step()
                self.guard.heartbeat.check_between_steps()

    def _begin(self) -> None:
        """Create the run directory, or restore the state in which an earlier run stopped."""
        if self.config.push_to_hub:
            self.init_hf_repo()
        self.run.begin()
        if "before" not in self.evaluations:
            self.evaluator.run("before")  # of a resumed run, too: its checkpoint isn't restored yet
        if self.run.resumed is not None:
            self.run.restore_resumed()
            echo(f"Resumed after step {self.run.state.step} of {self.num_steps}")
        elif self.config.kl_action == "rollback":
            self.run.save()
        self.callbacks.begin()

    def _finish(self) -> None:
        if self.run.state.step < self.num_steps:
            echo(f"A callback ended training after step {self.run.state.step} of {self.num_steps}.")
        if self.config.load_best_model_at_end and self.run.load_best():
            self.evaluator.latest = None
        if "after" not in self.evaluations:
            self.evaluator.run("after")
        self.save_model(self.folder)
        echo(f"Saved policy to {self.folder}", "green")
        self.create_model_card()
        self.run.finish()
