"""REINFORCE++ training: generate, score, normalise, update, hand the weights to the engine, repeat.

``train`` is the whole algorithm, read from top to bottom; the maths is in ``algorithm``, files and figures are beside.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp import algorithm, checkpoint
from reinforcepp.batching import PromptBatches, micro_batches
from reinforcepp.config import ReinforceConfig, as_dict
from reinforcepp.critic import Critic
from reinforcepp.data import prompt_rows
from reinforcepp.distributed import Ranks
from reinforcepp.errors import DataError
from reinforcepp.evaluation import Evaluation, evaluate
from reinforcepp.learner import Learner, compute_dtype
from reinforcepp.models import (
    check_context,
    load_config,
    load_policy,
    save_model,
    tokenizer_for,
    weight_bytes,
    write_json,
)
from reinforcepp.observe import Clock, MetricLog, Progress, read_metrics, say, step_metrics
from reinforcepp.observe.interrupt import graceful_interrupt
from reinforcepp.policy_update import PolicyUpdate
from reinforcepp.precision import cast_parameters
from reinforcepp.rewards import RewardFunction, RewardScores, TrainedReward, load_rewards, score_with
from reinforcepp.rollout.canary import check_sync
from reinforcepp.rollout.choose import EngineChoice, choose_engine, start_engine
from reinforcepp.rollout.engine import RolloutEngine, request_seed
from reinforcepp.run_folder import check_output, check_resume, clear, describe_run
from reinforcepp.tokens import encode_prompts, pad_values
from reinforcepp.types import Completion, Prompt, RolloutBatch, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVALUATION_SEED = 1_000_003


class ReinforceTrainer:
    """Trains a causal language model with REINFORCE++; arguments are those that users of TRL know.

    Args:
        model: a model name or folder, or a loaded model (which is then trained in place).
        reward_funcs: one or several functions ``f(prompts, completions, **columns) -> list[float]``, or folders of
            trained reward models; their scores are added up.
        args: the settings.
        train_dataset: rows with a ``prompt`` (mappings, or a ``datasets.Dataset``); other columns go to reward functions.
        eval_dataset: held-out rows, answered before and after training.
        processing_class: the tokenizer; default: the one that belongs to ``model``.
        engine: generates the rollouts; default: as ``args.rollout`` says.

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
    ) -> None:
        self.config = args or ReinforceConfig()
        # a checkpoint, with Adam's two moments, the same of a critic, and the trained model
        needed = (8 if self.config.recipe.critic else 4) * weight_bytes(model) if isinstance(model, str) else 0
        self.folder = check_output(
            self.config.output_dir, overwrite=self.config.overwrite, resume=self.config.resume, needed_bytes=needed
        )
        if self.config.resume:
            check_resume(self.folder, as_dict(self.config))
        model_config = load_config(model) if isinstance(model, str) else model.config
        check_context(model_config, self.config.max_prompt_length, self.config.max_new_tokens)
        dtype = compute_dtype(self.config)
        choice = choose_engine(self.config.rollout, model_config, dtype) if engine is None else None
        self.tokenizer = tokenizer_for(model_config, processing_class)
        _warn_of_bias(self.config)
        self.prompts = self._encode(prompt_rows(train_dataset, "train_dataset"), "training")
        if not self.prompts:
            raise DataError("train_dataset is empty: give at least one row with a prompt.")
        self.eval_prompts = self._encode(prompt_rows(eval_dataset, "eval_dataset"), "held-out")
        self.batches = PromptBatches(self.prompts, self.config.batch_size, self.config.seed)
        self.num_steps = self.config.max_steps or self.batches.steps_per_epoch * self.config.num_train_epochs
        self.rewards = load_rewards(reward_funcs)

        self.ranks = Ranks()
        for reward in self.rewards:
            if isinstance(reward, TrainedReward):
                if self.config.mixed_precision == "bf16":
                    cast_parameters(reward.model, dtype)
                reward.model.to(self.ranks.device)
        policy = load_policy(model) if isinstance(model, str) else model
        updates = self.num_steps * self._updates_per_step
        self.critic = Critic(policy, self.ranks, self.config, steps=updates) if self.config.recipe.critic else None
        self.learner = Learner(policy, self.ranks, self.config, learning_rate=self.config.learning_rate, steps=updates)
        self.policy = self.learner.plain
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        if choice is not None:
            engine = self._start_engine(choice)
        assert engine is not None
        self.engine = engine
        self.update = self._policy_update()
        self.evaluations: dict[str, Evaluation] = {}
        self._sync_checked = False

    # --- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> list[dict[str, float]]:
        """Run all steps, or those that are left after a resume; returns the metrics of every step."""
        config = self.config
        position = self._begin()
        with (
            closing(MetricLog(self.folder / "metrics.jsonl", position.metrics_bytes)) as log,
            Progress("training", self.num_steps, position.step) as progress,
            graceful_interrupt() as stop,
        ):
            tokens_seen = read_metrics(log.path)[-1]["num_tokens"] if position.step else 0.0
            for step in range(position.step, self.num_steps):
                clock = Clock()
                completions = self.engine.generate(self._prompts_of(step), self._sampling(step))
                clock.lap("rollout")
                batch, scores = self._score(completions)
                clock.lap("score")
                stats = self.update.run(batch, step)
                clock.lap("update")
                self._sync(step)
                clock.lap("sync")
                place = {"step": step + 1, "epoch": (step + 1) / self.batches.steps_per_epoch}
                metrics = place | step_metrics(batch, scores) | stats | clock.seconds()
                tokens_seen += metrics["num_tokens"]
                metrics["num_tokens"] = tokens_seen
                if self.ranks.is_main:
                    log.write(metrics)
                    progress.step(f"reward {metrics['reward']:+.3f}  kl {metrics['kl']:.4f}")
                self._evaluate_if_due(step + 1)
                done = checkpoint.Position(step + 1, log.position)
                if stop.requested or (config.save_every and done.step % config.save_every == 0):
                    self._save_checkpoint(done)
                if stop.requested and done.step < self.num_steps:
                    raise KeyboardInterrupt(f"after step {done.step} of {self.num_steps}")
        self._finish()
        return read_metrics(self.folder / "metrics.jsonl")

    # --- the phases of a step ---------------------------------------------------------------------------------------

    def _prompts_of(self, step: int) -> list[Prompt]:
        return self.ranks.share(self.batches.at(step))

    def _sampling(self, step: int) -> Sampling:
        config = self.config
        return Sampling(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            num_samples=config.num_generations,
            seed=request_seed(config.seed, step, 0),
        )

    def _score(self, completions: list[Completion]) -> tuple[RolloutBatch, RewardScores]:
        """Rewards, and log-probabilities under the reference and, unless the update gives them, under the policy."""
        scores = score_with(self.rewards, completions)
        width = max(len(c.ids) for c in completions)
        shape, device = (len(completions), width), self.ranks.device
        old_BT, ref_BT, entropy_BT, mask_BT = (torch.zeros(shape, device=device) for _ in range(4))
        with torch.no_grad():
            for rows in micro_batches(completions, range(len(completions)), self.update.micro_batch_size):
                ref_BT[rows], _, mask_BT[rows] = self.update.logprobs(self.reference, completions, rows, width)
                if not self.update.on_policy:
                    old_BT[rows], entropy_BT[rows], _ = self.update.logprobs(
                        self.learner.model, completions, rows, width
                    )
        rewards_B = torch.tensor(scores.total, device=device)
        batch = RolloutBatch(
            completions=completions,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pad_values([c.logprobs for c in completions]).to(device),
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            entropy_BT=entropy_BT,
            rewards_B=algorithm.clip_rewards(rewards_B, self.config.reward_clip),
            group_ids_B=torch.tensor([c.prompt.key for c in completions], device=device),
        )
        return batch, scores

    def _sync(self, step: int) -> None:
        """Hand the new weights to the engine; the first time and now and then, prove that it has them."""
        self.engine.load_weights(self.policy)
        due = step % self.config.sync_check_every == 0 or not self._sync_checked
        if due and not self.engine.shares_trainer_forward:
            check_sync(self.engine, self.policy, self.tokenizer)
        self._sync_checked = True

    # --- before, beside and after -----------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Answer the held-out prompts with the present policy, always with the same random numbers."""
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, seed=EVALUATION_SEED)
        prompts = self.eval_prompts[: self.config.eval_prompts]
        return evaluate(self.engine, prompts, sampling, self.rewards, self.policy, self.reference, self._pad_id)

    def save_model(self, folder: str | Path) -> None:
        """Write the policy as a folder that ``from_pretrained`` reads."""
        save_model(self.policy, self.tokenizer, Path(folder))

    def _policy_update(self) -> PolicyUpdate:
        """How batches will be used, now that it is known which engine samples them."""
        config, own_forward = self.config, self.engine.shares_trainer_forward
        mode = config.importance_correction
        full_distribution = config.top_p == 1 and config.top_k == 0
        return PolicyUpdate(
            config,
            self.ranks,
            self.learner,
            self.critic,
            pad_id=self._pad_id,
            correction=("off" if own_forward else "tis") if mode == "auto" else mode,
            on_policy=own_forward and full_distribution and self._updates_per_step == 1,
        )

    @property
    def _learners(self) -> dict[str, Learner]:
        """What a checkpoint holds."""
        return {"policy": self.learner} | ({"critic": self.critic} if self.critic is not None else {})

    @property
    def _updates_per_step(self) -> int:
        return self.config.num_iterations * -(-self.config.completions_per_step // self.config.optimizer_batch_size)

    @property
    def _pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _begin(self) -> checkpoint.Position:
        """An empty folder with the settings, or the state in which an earlier run stopped."""
        if not self.config.resume:
            clear(self.folder)
            describe_run(self.folder, as_dict(self.config), {"num_steps": self.num_steps, "prompts": len(self.prompts)})
        self._evaluate("before")  # after a resume, too: the policy still is what training started from
        if not self.config.resume:
            return checkpoint.Position(0, 0)
        position = checkpoint.load(self.folder, self._learners)
        self.engine.load_weights(self.policy)
        say(f"Going on after step {position.step} of {self.num_steps}")
        return position

    def _finish(self) -> None:
        self._evaluate("after")
        self.save_model(self.folder)
        say(f"Saved the trained model to {self.folder}", "green")

    def _evaluate(self, when: str) -> None:
        """Answer the held-out prompts, if there are any, and write down all evaluations so far."""
        if self.config.eval_prompts and self.eval_prompts:
            self.evaluations[when] = self.evaluate()
            figures = {name: evaluation.figures() for name, evaluation in self.evaluations.items()}
            write_json(self.folder / "evaluation.json", figures)

    def _evaluate_if_due(self, step: int) -> None:
        if self.config.eval_every and step % self.config.eval_every == 0 and step < self.num_steps:
            self._evaluate(f"step {step}")

    def _start_engine(self, choice: EngineChoice) -> RolloutEngine:
        config = self.config
        if config.rollout == "auto":
            say(f"Completions come from {choice.name}: {choice.reason}.")
        return start_engine(
            choice,
            self.policy,
            self.tokenizer,
            max_length=config.max_prompt_length + config.max_new_tokens,
            batch_size=config.rollout_batch_size,
            gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        )

    def _save_checkpoint(self, position: checkpoint.Position) -> None:
        if self.ranks.is_main:
            checkpoint.save(self.folder, position, self._learners)

    def _encode(self, rows: Sequence[Any], part: str) -> list[Prompt]:
        limit, action = self.config.max_prompt_length, self.config.long_prompts
        prompts, long = encode_prompts(self.tokenizer, rows, max_prompt_length=limit, long_prompts=action)
        if long:
            did = "cut from the left" if action == "cut" else "left out"
            say(f"{len(long)} of {len(rows)} {part} prompts are longer than {limit} tokens and were {did}.", "yellow")
        if rows and not prompts:
            raise DataError(f"Every {part} prompt is longer than max_prompt_length {limit}: raise it.")
        return prompts


def _warn_of_bias(config: ReinforceConfig) -> None:
    if config.top_p < 1 or config.top_k > 0:
        say(
            f"top_p {config.top_p:g} and top_k {config.top_k} cut the sampled distribution but not the trained one, so "
            "the policy ratio is biased; train with top_p 1 and top_k 0 unless this is what you want to study.",
            "yellow",
        )
