"""REINFORCE++ training: generate, score, normalise, update, hand the weights to the engine, repeat.

``train`` is the whole algorithm, read from top to bottom; the maths is in ``algorithm``, files and figures are beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.algorithm.advantages import clip_rewards
from reinforcepp.config import ReinforceConfig, as_dict
from reinforcepp.data import prompt_rows
from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.distributed.ranks import Ranks, check_trackers, init_process_group
from reinforcepp.errors import DataError, EngineLost, RewardError, TrainingDiverged, UnusableUpdate
from reinforcepp.files import write_json
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import check_context, load_config, save_model, tokenizer_for, weight_bytes
from reinforcepp.models.lora import make_reference, with_adapter
from reinforcepp.models.precision import cast_parameters, compute_dtype
from reinforcepp.models.tokenization import pad_values
from reinforcepp.monitoring import Clock, echo, note_event, read_metrics
from reinforcepp.monitoring.completion_log import evaluation_file, save_answers
from reinforcepp.monitoring.environment import environment
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.monitoring.signals import Interrupted, Stop, StopAsked, stop_signals
from reinforcepp.monitoring.step_metrics import step_metrics
from reinforcepp.monitoring.watchdog import Watchdog
from reinforcepp.rewards.functions import RewardFunction, RewardScores, drop_unscored
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rollout.engine import RolloutEngine, random_state_kept
from reinforcepp.rollout.ray.reward_pool import for_a_pool, pooled
from reinforcepp.rollout.selection import EngineChoice, choose_engine
from reinforcepp.rollout.shared_engine import start_for_all
from reinforcepp.run_dir import RUN_FILE, check_output, check_unchanged, clear, describe_run
from reinforcepp.training import checkpoint
from reinforcepp.training import rng as random_state
from reinforcepp.training.batches import PromptBatches, micro_batches
from reinforcepp.training.critic import Critic
from reinforcepp.training.evaluation import Evaluation, evaluate
from reinforcepp.training.guardrails import Guardrails, RollBack
from reinforcepp.training.learner import Learner
from reinforcepp.training.monitor import Monitor
from reinforcepp.training.policy_run import PolicyRun, fingerprints
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.training.rollout_scheduler import Sampler
from reinforcepp.training.setup import encode, start_policy, warn_of_bias
from reinforcepp.training.update_batch import BatchInUse
from reinforcepp.types import Completion, RolloutBatch, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVALUATION_SEED = 1_000_003


class ReinforceTrainer:
    """Trains a causal language model with REINFORCE++; arguments are those that users of TRL know.

    Args:
        model: a model name or folder, or a loaded model (which is then trained in place).
        reward_funcs: one or several functions ``f(prompts, completions, **columns) -> list[float]``, or what the setting
            ``rewards`` takes: folders of reward models, rules, servers; their scores are added up.
        args: the settings.
        train_dataset: rows with a ``prompt`` (mappings, or a ``datasets.Dataset``); other columns go to reward functions.
        eval_dataset: held-out rows, answered before and after training.
        processing_class: the tokenizer; default: the one that belongs to ``model``.
        engine: generates the rollouts; default: as ``args.rollout`` says.
        judge: a reward function, or its folder, that scores the held-out answers and takes no part in training.
        reward_weights: one for each of reward_funcs; default: 1.

    Raises:
        ReinforceError: for settings, data or models that don't fit together, before training starts.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: str | RewardFunction | Sequence[str | RewardFunction],
        args: ReinforceConfig | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        engine: RolloutEngine | None = None,
        judge: str | RewardFunction | None = None,
        reward_weights: Sequence[float] | None = None,
    ) -> None:
        self.config = args or ReinforceConfig()
        # the checkpoints, with Adam's two moments, the same of a critic, and the trained model
        copies = (6 if self.config.estimator_spec.uses_critic else 3) * self.config.checkpoints_at_most + 1
        needed = copies * weight_bytes(model) if isinstance(model, str) and not self.config.use_peft else 0
        init_process_group(self.config.watchdog_seconds)
        self.folder = check_output(
            self.config.output_dir, overwrite=self.config.overwrite, resume=self.config.resume, needed_bytes=needed
        )
        check_trackers(self.config.report_to)
        self._resumed = checkpoint.chosen(self.folder, self.config)
        model_config = load_config(model) if isinstance(model, str) else model.config
        check_context(model_config, self.config.max_prompt_length, self.config.max_new_tokens)
        dtype = compute_dtype(self.config)
        wanted = "transformers" if self.config.load_in_4bit else self.config.rollout
        choice = choose_engine(wanted, model_config, dtype) if engine is None else None
        self.tokenizer = with_chat_template(tokenizer_for(model_config, processing_class), self.config)
        warn_of_bias(self.config)
        train_rows, eval_rows = prompt_rows(train_dataset, "train_dataset"), prompt_rows(eval_dataset, "eval_dataset")
        self.prompts = encode(self.tokenizer, train_rows, "training", self.config)
        if not self.prompts:
            raise DataError("train_dataset is empty: give at least one row with a prompt.")
        self.eval_prompts = encode(self.tokenizer, eval_rows, "held-out", self.config)
        self.batches = PromptBatches(self.prompts, self.config.batch_size, self.config.seed)
        self.num_steps = self.config.max_steps or self.batches.steps_per_epoch * self.config.num_train_epochs
        self.rewards = load_rewards(reward_funcs, self.config, reward_weights)
        self.judge = load_rewards(judge) if judge is not None else None

        self.ranks = Ranks(self.config.report_to, self.folder)
        elsewhere = for_a_pool(self.rewards, self.config.reward_workers)
        for reward in [*self.rewards.trained, *(self.judge.trained if self.judge else ())]:
            if dtype != torch.float32:
                cast_parameters(reward.model, dtype)
            if reward not in elsewhere:
                reward.model.to(self.ranks.device)
        policy = start_policy(model, self.config)
        updates = self.num_steps * self.config.updates_per_step
        self.critic = (
            Critic(policy, self.ranks, self.config, steps=updates) if self.config.estimator_spec.uses_critic else None
        )
        if self.config.use_peft:
            policy = with_adapter(policy, self.config, seed=self.config.seed)
        self.learner = Learner(policy, self.ranks, self.config, learning_rate=self.config.learning_rate, steps=updates)
        self.policy = self.learner.plain
        self.reference = make_reference(self.policy)
        inputs = fingerprints(self.reference, [self.prompts, self.eval_prompts], self.rewards)
        if self._resumed is not None:
            check_unchanged(self._resumed.state["inputs"], inputs, self.config.allowed_changes)
        if choice is not None:
            engine = self._start_engine(choice)
        assert engine is not None
        if self.config.reward_workers:
            first = RankZero(self.ranks, self.config.watchdog_seconds)
            self.rewards = pooled(self.rewards, engine, self.config.reward_workers, first)
        self.guard = Guardrails(self.config, partial(note_event, self.folder))
        self.update = self._policy_update(engine)
        self.sampler = Sampler(self.config, engine, self.update, self.tokenizer, self.batches.at, self.num_steps)
        self.run = PolicyRun(self.folder, self.update, self.sampler, self.tokenizer, inputs)
        self.evaluations: dict[str, Evaluation] = {}
        self._stop, self._watchdog = Stop(), Watchdog(self.folder, 0)

    @property
    def engine(self) -> RolloutEngine:
        """What generates, for training and for evaluations."""
        return self.sampler.engine

    @engine.setter
    def engine(self, engine: RolloutEngine) -> None:
        self.sampler.engine = engine

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, float]]:
        """Run all steps, or those that are left after a resume; returns the metrics of every step.

        Raises:
            TrainingDiverged: a guardrail stopped the run; the trainer then has the last checkpoint's weights.
            RewardError, EngineLost: no scores or no completions come any more, and a checkpoint is saved.
            KeyboardInterrupt: a signal stopped it, and a checkpoint is saved.
        """
        with stop_signals() as self._stop, Watchdog(self.folder, self.config.watchdog_seconds) as self._watchdog:
            try:
                self._begin()
                self._steps()
                self._finish()
            except StopAsked as stop:
                raise Interrupted(self._keep(), self._stop.exit_code) from stop
            except (RewardError, EngineLost) as error:
                raise type(error)(f"{error} The run is saved {self._keep()}: go on with --resume.") from error
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error} {self.run.to_last_good()}") from error
            finally:
                self.sampler.close()
                self.run.log.close()
        return read_metrics(self.folder)

    def _steps(self) -> None:
        run, config = self.run, self.config
        record = RunRecord(self.folder, as_dict(config), self._facts())
        with Monitor(record, run.state, self.ranks, self.num_steps) as monitor:
            self._evaluate_if_due(run.state.step)  # the run may have been stopped in the middle of it
            while run.state.step < self.num_steps:
                step, clock = run.state.step, Clock()
                metrics = {"step": step + 1, "epoch": (step + 1) / self.batches.steps_per_epoch}
                try:
                    run.work = run.work or self._rollout(step, clock)
                    metrics |= self.update.run(run.work, step)
                    clock.lap("update")
                    self._watchdog.beat(f"weight sync of step {step + 1}")
                    self.sampler.updated(step)
                    clock.lap("sync")
                    metrics |= step_metrics(run.work.batch, run.work.scores, config.reward_clip)
                    metrics |= self.sampler.staleness(step)
                except UnusableUpdate as fault:  # of rewards or log-probabilities: there is nothing to train on
                    self.guard.leave_out(fault, step + 1)
                    metrics["skipped_updates"] = 1.0
                monitor.step(*run.finish_step(metrics, clock.seconds()))
                try:
                    self.guard.check_step(metrics)
                except RollBack as told:
                    run.roll_back(str(told))
                    self.engine.load_weights(self.policy)
                    monitor.went_back()
                    continue
                run.state.step += 1
                run.state.random = random_state.capture()
                self._evaluate_if_due(run.state.step)
                if config.save_every and run.state.step % config.save_every == 0:
                    self._watchdog.beat("checkpoint")
                    run.save(metrics)
                self._check_stop()

    # --- the phases of a step ---------------------------------------------------------------------------------------

    def _rollout(self, step: int, clock: Clock) -> BatchInUse:
        """Completions of this step's prompts, scored; each rank does its share."""
        with self._interruptible():
            self._watchdog.beat(f"rollout of step {step + 1}")
            sampled = self.ranks.run_or_raise_all(lambda: self.sampler.at(step))
            clock.lap("rollout")
            self._watchdog.beat(f"scoring of step {step + 1}")
            work = self.update.begin(*self.ranks.run_or_raise_all(lambda: self._score(sampled.completions)))
            clock.lap("score")
        if not work.batch.completions:
            raise UnusableUpdate("no completion of the batch was scored by a reward")
        return work

    def _score(self, completions: list[Completion]) -> tuple[RolloutBatch, RewardScores]:
        """Rewards, and log-probabilities under the reference and, unless the update gives them, under the policy."""
        scores = self.rewards.score(completions)
        completions, scores = drop_unscored(completions, scores, grouped=self.config.estimator_spec.grouped)
        width = max((len(c.ids) for c in completions), default=0)
        shape, device = (len(completions), width), self.ranks.device
        old_BT, ref_BT, entropy_BT, mask_BT = (torch.zeros(shape, device=device) for _ in range(4))
        with torch.no_grad():
            for rows in micro_batches(completions, range(len(completions)), self.update.micro_batch_size):
                ref_BT[rows], _, mask_BT[rows] = self.update.logprobs(self.reference, completions, rows, width)
                if not self.update.on_policy and not self.config.staleness:
                    old_BT[rows], entropy_BT[rows], _ = self.update.logprobs(
                        self.learner.scoring, completions, rows, width
                    )
        if self.config.staleness:  # the weights that sampled are those of now no more
            old_BT = pad_values([c.old_logprobs for c in completions]).to(device)
            entropy_BT = pad_values([c.entropy for c in completions]).to(device)
        if not bool(torch.isfinite(torch.stack([ref_BT, old_BT])).all()):
            raise UnusableUpdate("a completion's log-probability isn't finite under the policy or its reference")
        rewards_B = torch.tensor(scores.known, device=device)
        batch = RolloutBatch(
            completions=completions,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pad_values([c.logprobs for c in completions]).to(device),
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            entropy_BT=entropy_BT,
            rewards_B=clip_rewards(rewards_B, self.config.reward_clip),
            group_ids_B=torch.tensor([c.prompt.key for c in completions], dtype=torch.long, device=device),
        )
        return batch, scores

    # --- before, beside and after -----------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Answer the held-out prompts with the present policy, always with the same random numbers."""
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, seed=EVALUATION_SEED)
        prompts = self.eval_prompts[: self.config.eval_prompts]
        models = self.policy, self.reference, self._pad_id
        self.sampler.hold_present()
        return evaluate(self.engine, prompts, sampling, self.rewards, *models, judge=self.judge, ranks=self.ranks)

    def save_model(self, folder: str | Path) -> None:
        """Write the policy as a folder that ``from_pretrained`` reads; of several processes, the main one does."""
        if self.ranks.is_main:
            save_model(self.policy, self.tokenizer, Path(folder))
        self.ranks.barrier()

    def _policy_update(self, engine: RolloutEngine) -> PolicyUpdate:
        """How batches will be used that ``engine`` samples."""
        config, own_forward, ahead = self.config, engine.shares_trainer_forward, self.config.staleness > 0
        mode = config.importance_correction
        return PolicyUpdate(
            config,
            self.ranks,
            self.learner,
            self.critic,
            pad_id=self._pad_id,
            correction=("tis" if ahead or not own_forward else "off") if mode == "auto" else mode,
            on_policy=own_forward and not ahead and config.learns_as_sampled and config.updates_per_step == 1,
            guard=self.guard,
            between=self._between,
        )

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _begin(self) -> None:
        """An empty folder with the settings, or the state in which an earlier run stopped."""
        resumed = self._resumed
        self.ranks.barrier()  # until all have looked at the folder
        if resumed is None:
            random_state.seed_all(self.config.seed)
            self.run.state.random = random_state.capture()
        if self.ranks.is_main:
            if resumed is None:
                clear(self.folder)
            if resumed is None or not (self.folder / RUN_FILE).is_file():
                describe_run(self.folder, as_dict(self.config), self._facts())
            self.run.log.open(self.folder)
        self._evaluate("before")  # after a resume, too: the policy still is what training started from
        if resumed is not None:
            self.run.restore(resumed)
            self._resumed = None
            self.engine.load_weights(self.policy)
            echo(f"Going on after step {self.run.state.step} of {self.num_steps}")
        elif self.config.kl_action == "rollback":
            self.run.save()

    def _facts(self) -> dict[str, Any]:
        """What a report should say of the run beside its settings."""
        return {
            "kind": type(self.config).__name__,
            "num_steps": self.num_steps,
            "prompts": len(self.prompts),
            "heldout_prompts": len(self.eval_prompts),
            "inputs": self.run.inputs,
            "rewards": self.rewards.describe(),
            "judge": self.judge.names[0] if self.judge else None,
            **environment(self.ranks.device),
        }

    def _finish(self) -> None:
        self._evaluate("after")
        self.save_model(self.folder)
        echo(f"Saved the trained model to {self.folder}", "green")

    def _evaluate(self, when: str) -> None:
        """Answer the held-out prompts, if there are any, and write down all evaluations so far."""
        if self.config.eval_prompts and self.eval_prompts:
            self._watchdog.beat(f"evaluation {when!r}")
            with self._interruptible(), random_state_kept():
                self.evaluations[when] = self.evaluate()
            self.run.state.evaluations[when] = self.evaluations[when].figures()
            if not self.ranks.is_main:
                return
            if self._resumed is None:  # else the file is there, with what a reward that draws lots said then
                save_answers(evaluation_file(self.folder, when), self.evaluations[when].columns())
            write_json(self.folder / "evaluation.json", self.run.state.evaluations)

    def _evaluate_if_due(self, step: int) -> None:
        every, when = self.config.eval_every, f"step {step}"
        if every and 0 < step < self.num_steps and step % every == 0 and when not in self.run.state.evaluations:
            self._evaluate(when)

    def _start_engine(self, choice: EngineChoice) -> RolloutEngine:
        if self.config.rollout == "auto":
            echo(f"Completions come from {choice.name}: {choice.reason}.")
        reserved = self.config.reward_workers * len(self.rewards.trained)
        return start_for_all(choice, self.policy, self.tokenizer, self.config, self.ranks, reserved, self.folder)

    # --- stopping, keeping, going back ------------------------------------------------------------------------------

    def _keep(self) -> str:
        """Save what is done of a run that stops, and say how far that is."""
        self._watchdog.beat("checkpoint")
        if self._resumed is None:  # else nothing has happened since the checkpoint that is to be restored
            self.run.save()
        return f"after step {self._resumed.step if self._resumed else self.run.state.step} of {self.num_steps}"

    def _interruptible(self) -> AbstractContextManager[None]:
        """Around work that can be done again; several ranks only stop together, between two steps."""
        return self._stop.anywhere() if self.ranks.count == 1 else nullcontext()

    def _between(self) -> None:
        """Called before each micro-batch and each optimiser step."""
        self._watchdog.beat(f"update of step {self.run.state.step + 1}")
        if self.ranks.count == 1:
            self._stop.check()

    def _check_stop(self) -> None:
        """Between two steps: has any rank been asked to stop?"""
        if self.ranks.any(self._stop.number is not None):
            raise StopAsked
