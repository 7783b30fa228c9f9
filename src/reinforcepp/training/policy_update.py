"""From completions to new weights: score a batch, compute its advantages, and make its optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.algorithm.advantages import clip_rewards
from reinforcepp.algorithm.groups import normalized_sum
from reinforcepp.algorithm.importance import Correction
from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.losses import policy_loss
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import UnusableUpdate
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.tokenization import pad_values
from reinforcepp.rewards.functions import FAILED_KEY, RewardScores, drop_failed, drop_unscored
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.training.batches import UpdateBatch, batch_advantages, planned_batches, turn_rewards
from reinforcepp.training.critic import Critic
from reinforcepp.training.guardrails import Guardrails
from reinforcepp.training.learner import Learner
from reinforcepp.training.optimizer_step import OptimizerStep
from reinforcepp.training.passes import Passes, row_index
from reinforcepp.training.update_stats import LOG_RATIO, UpdateStats
from reinforcepp.types import Completion, RolloutBatch

if TYPE_CHECKING:
    from reinforcepp.training.run_guard import Heartbeat


def with_rewards(
    completions: list[Completion], rewards: RewardSum, update: PolicyUpdate
) -> tuple[list[Completion], RewardScores]:
    """Return this rank's completions that a reward function scores, and their scores."""

    def score_local() -> tuple[list[Completion], RewardScores]:
        finished, failed = drop_failed(completions)
        scores = rewards.score(finished)
        if update.config.has_episodes:
            scores.counts[FAILED_KEY] = float(len(failed))
        return drop_unscored(finished, scores, grouped=update.config.estimator_spec.grouped)

    return update.ranks.run_or_raise_all(score_local)


def rollout_batch(
    completions: list[Completion], scores: RewardScores, rewards: RewardSum, update: PolicyUpdate, reference: object
) -> RolloutBatch:
    """Return this rank's completions as tensors with one row per completion (B) and one column per token (T).

    Args:
        completions: scored completions.
        scores: their scores.
        rewards: the reward functions.
        update: gives log-probabilities under the current policy, unless its own forward pass gives them (``on_policy``)
            or the completions bring them from the older weights that sampled them (``staleness``).
        reference: the reference policy.

    Raises:
        UnusableUpdate: a log-probability isn't finite.
    """
    config, device = update.config, update.ranks.device

    def compute() -> RolloutBatch:
        mask_BT = pad_values([[float(sampled) for sampled in c.mask] for c in completions]).to(device)
        width, (old_BT, ref_BT, entropy_BT) = mask_BT.shape[1], (torch.zeros_like(mask_BT) for _ in range(3))

        def score_rows(rows: list[int]) -> None:
            rows_B = row_index(rows, mask_BT)
            if config.needs_reference:
                ref_BT[rows_B], _, _ = update.logprobs(reference, completions, rows, width)
            if not update.on_policy and not config.staleness:
                old_BT[rows_B], entropy_BT[rows_B], _ = update.logprobs(update.policy.scoring, completions, rows, width)

        update.passes.score(completions, score_rows)
        if config.staleness:  # the policy no longer has the weights that sampled
            old_BT = pad_values([c.old_logprobs for c in completions]).to(device)
            entropy_BT = pad_values([c.entropy for c in completions]).to(device)
        if not bool(torch.isfinite(torch.stack([ref_BT, old_BT])).all()):
            raise UnusableUpdate("a completion's log-probability isn't finite under the policy or its reference")
        if config.mask_truncated_completions:
            mask_BT *= torch.tensor([[c.finish_reason != "length"] for c in completions], device=device)
        group_ids_B = torch.tensor([c.prompt.key for c in completions], dtype=torch.long, device=device)
        rewards_B = clip_rewards(torch.tensor(scores.known, device=device), config.reward_bounds)
        if config.normalizes_each_reward:
            rewards_B = normalized_sum([scores.by_function[n] for n in rewards.names], rewards.weights, group_ids_B)
        return RolloutBatch(
            completions=completions,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pad_values([c.logprobs for c in completions]).to(device),
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT if config.needs_reference else torch.full_like(ref_BT, torch.nan),
            entropy_BT=entropy_BT,
            rewards_B=rewards_B,
            group_ids_B=group_ids_B,
            turn_rewards_BT=turn_rewards(completions, rewards).to(device) if config.has_episodes else None,
        )

    return update.ranks.run_or_raise_all(compute)


def with_advantages(batch: RolloutBatch, scores: RewardScores, update: PolicyUpdate, kl_coef: float) -> UpdateBatch:
    """Add advantages to this rank's batch, then join the batches of all ranks, so that every rank has all rows.

    Raises:
        UnusableUpdate: no row is left on any rank.
    """
    critic = update.critic
    values_BT = critic.batch_values(batch, update.passes, update.pad_id) if critic is not None else None
    advantages_BT, returns_BT = batch_advantages(
        batch, update.config, kl_coef, on_policy=update.on_policy, values_BT=values_BT, sum_over_ranks=update.ranks.sum
    )
    joined = UpdateBatch(batch, scores, advantages_BT, returns_BT, values_BT).gather(update.ranks)
    if not joined.rollout.completions:
        raise UnusableUpdate("no completion of the batch was scored by a reward")
    return joined


@dataclass(eq=False)
class PolicyUpdate:
    """Owns the policy, the critic, and their optimizers; updates them from one batch at a time.

    Attributes:
        config: the run's settings.
        ranks: the data-parallel ranks that share each batch.
        policy: the policy with its optimizer.
        critic: the critic with its optimizer, for the estimator ppo.
        pad_id: the tokenizer's padding token.
        correction: how the rollout engine's log-probabilities are corrected, see ``importance_weights``.
        on_policy: each batch gets one optimizer step and was sampled, from the full distribution, by the trainer's own
            forward pass. The engine's log-probabilities are then the policy's, so the pass that would compute them
            again is skipped: the ratio is 1 by definition.
        guardrails: decide whether an optimizer step is made.
        heartbeat: called before every micro-batch and optimizer step, where a stopped run loses nothing.
    """

    config: ReinforceConfig
    ranks: Ranks
    policy: Learner
    critic: Critic | None
    pad_id: int
    correction: Correction
    on_policy: bool
    guardrails: Guardrails
    heartbeat: Heartbeat

    def __post_init__(self) -> None:
        self.learners: dict[str, Learner] = {"policy": self.policy}
        if self.critic is not None:
            self.learners["critic"] = self.critic
        trust_region = self.correction == "binary_kl"  # it replaces the clipping of policy ratios
        self.objective = self.config.objective.unclipped if trust_region else self.config.objective
        self.passes = Passes(self.config, self.ranks, list(self.learners.values()))
        self._pass: Sequence[int] = ()

    def run(self, batch: UpdateBatch, step: int, kl_coef: float) -> dict[str, float]:
        """Make the optimizer steps on a batch that are still to be made; return the mean of their statistics."""
        planned = planned_batches(self.config, len(batch.rollout.completions), step)
        remaining = planned[len(batch.history) :]
        for rows in remaining:
            batch.history.append(self._optimizer_step(batch, rows, step, kl_coef))
        if remaining:
            self._share_results(batch.rollout)
        return batch.mean_stats()

    def logprobs(
        self, model: object, completions: Sequence[Completion], rows: Sequence[int], width: int, **options: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(logprobs_BT, entropy_BT, mask_BT)`` of the chosen completions under ``model``, ``width`` columns wide."""
        return response_logprobs(
            model,
            [completions[i].prompt.ids for i in rows],
            [completions[i].ids for i in rows],
            pad_id=self.pad_id,
            temperature=self.config.temperature,
            width=width,
            padding_free=self.passes.packed,
            **options,
        )

    def _optimizer_step(self, batch: UpdateBatch, rows: Sequence[int], step: int, kl_coef: float) -> dict[str, float]:
        """Compute gradients, check them, and make the step unless the guardrails skip it."""
        totals = self._accumulate(batch, rows, kl_coef)
        self.heartbeat.safe_point()
        stats = totals.combine(self.ranks)
        log_ratio = stats.pop(LOG_RATIO)
        norms = {name: learner.clip() for name, learner in self.learners.items()}
        try:
            self.guardrails.check_update(stats["loss"] + stats.get("critic/loss", 0.0), log_ratio, norms)
        except UnusableUpdate as problem:
            self._drop_gradients()
            self.guardrails.skip(problem, step + 1)
            return {"skipped_updates": 1.0}
        self.guardrails.update_made()
        if self.critic is not None:
            stats["critic/grad_norm"] = self.critic.step(norms["critic"])["grad_norm"]
        return stats | self.policy.step(norms["policy"]) | {"skipped_updates": 0.0}

    def _accumulate(self, batch: UpdateBatch, rows: Sequence[int], kl_coef: float) -> UpdateStats:
        """Accumulate the gradients of one optimizer step; if memory runs out, start over with smaller micro-batches."""
        while True:
            try:
                return self._backward(batch, rows, kl_coef)
            except torch.OutOfMemoryError as error:
                self.passes.halve([batch.rollout.completions[i] for i in self._pass], error)
                self._drop_gradients()

    def _backward(self, batch: UpdateBatch, rows: Sequence[int], kl_coef: float) -> UpdateStats:
        """Run forward and backward passes over all micro-batches of one optimizer step; return summed statistics."""
        step = OptimizerStep.of(batch.rollout, rows, kl_coef, self.config)
        totals = UpdateStats()
        passes = self.passes.of_update(batch.rollout.completions, rows)
        for number, (micro, weight) in enumerate(passes, 1):
            self.heartbeat.safe_point()
            self._pass = micro
            last = number == len(passes)
            with self.policy.learning(last=last):
                loss, stats = self._policy_loss(batch, micro, step, new=weight > 0)
                self.policy.backward(loss * weight)
            stats["loss"] = loss.detach()
            if self.critic is not None:
                stats["critic/loss"] = self.critic.accumulate(
                    batch, micro, step.size.tokens, self.pad_id, weight, last=last, packed=self.passes.packed
                )
            totals.add(stats, weight)
        return totals

    def _policy_loss(
        self, batch: UpdateBatch, rows: list[int], step: OptimizerStep, *, new: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a micro-batch's share of the loss of an optimizer step; ``new`` if these rows aren't repeated."""
        rows_B = row_index(rows, batch.advantages_BT)
        config, rollout, advantages_BT = self.config, batch.rollout, batch.advantages_BT[rows_B]
        given = self.policy.model, rollout.completions, rows, advantages_BT.shape[1]
        logprobs_BT, entropy_BT, _ = self.logprobs(*given, entropy_gradient=config.entropy_coef != 0)
        mask_BT = rollout.mask_BT[rows_B]
        if self.on_policy and new:
            rollout.old_logprobs_BT[rows_B], rollout.entropy_BT[rows_B] = logprobs_BT.detach(), entropy_BT.detach()
        old_BT = rollout.old_logprobs_BT[rows_B]
        weights_BT, weighing = step.token_weights(rollout, rows_B, logprobs_BT, advantages_BT, config, self.correction)
        kl_BT = None
        if config.estimator_spec.kl_in_loss and step.kl_coef:
            kl_BT = step.kl_coef * kl_estimate(logprobs_BT, rollout.ref_logprobs_BT[rows_B], config.kl_of_loss)
        tensors, correct_kl = (logprobs_BT, old_BT, advantages_BT, mask_BT), config.use_bias_correction_kl is True
        loss, stats = policy_loss(
            *tensors, self.objective, weights_BT=weights_BT, kl_BT=kl_BT, correct_kl=correct_kl, size=step.size
        )
        if config.entropy_coef:
            stats["policy_loss"] = loss.detach()
            loss = loss - config.entropy_coef * masked_mean(entropy_BT, step.focus_BT[rows_B], step.focus_tokens)
        log_ratio_BT = (logprobs_BT.detach() - old_BT).abs()
        stats[LOG_RATIO] = torch.where(mask_BT.bool(), log_ratio_BT, 0.0).max()
        return loss, stats | weighing

    @torch.no_grad()
    def _share_results(self, rollout: RolloutBatch) -> None:
        """Give every rank the new weights and the log-probabilities of the rows that the other ranks trained on."""
        for learner in self.learners.values():
            learner.refresh()
        if self.on_policy and self.ranks.count > 1:
            for partial_BT in (rollout.old_logprobs_BT, rollout.entropy_BT):
                partial_BT.copy_(self.ranks.sum(partial_BT))

    def _drop_gradients(self) -> None:
        for learner in self.learners.values():
            learner.drop_gradients()
