"""Update the policy from one batch: one or several optimizer steps, each over one or several micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.losses import Correction, importance_weights, masked_mean, policy_loss
from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import UnusableUpdate
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.training.batches import UpdateBatch, halved_micro_batch, planned_batches, rank_passes
from reinforcepp.training.critic import Critic
from reinforcepp.training.guardrails import Guardrails
from reinforcepp.training.learner import Learner
from reinforcepp.types import Completion, RolloutBatch

if TYPE_CHECKING:
    from reinforcepp.training.run_guard import Heartbeat

LARGEST = "log_ratio_max"
"""The only statistic of a micro-batch that is combined by maximum instead of by sum."""


@dataclass(eq=False)
class PolicyUpdate:
    """Owns the policy, the critic, and their optimizers; updates them from one batch at a time.

    Attributes:
        config: the run's settings.
        ranks: the data-parallel ranks that share each batch.
        policy: the policy with its optimizer.
        critic: the critic with its optimizer, for the estimator ppo.
        pad_id: the tokenizer's padding token.
        correction: how the rollout engine's log-probabilities are corrected: ``tis``, ``icepop`` or ``off``.
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
        self.micro_batch_size = self.config.effective_micro_batch_size

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
        self, model: object, completions: Sequence[Completion], rows: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``(logprobs_BT, entropy_BT, mask_BT)`` of the chosen completions under ``model``, ``width`` columns wide."""
        return response_logprobs(
            model,
            [completions[i].prompt.ids for i in rows],
            [completions[i].ids for i in rows],
            pad_id=self.pad_id,
            temperature=self.config.temperature,
            width=width,
        )

    def values(self, batch: RolloutBatch) -> Tensor | None:
        """Return the critic's value before each token, None without a critic. -> (B, T)"""
        return None if self.critic is None else self.critic.batch_values(batch, self.micro_batch_size, self.pad_id)

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def _optimizer_step(self, batch: UpdateBatch, rows: Sequence[int], step: int, kl_coef: float) -> dict[str, float]:
        """Compute gradients, check them, and make the step unless the guardrails skip it."""
        totals = self._accumulate(batch, rows, kl_coef)
        self.heartbeat.safe_point()
        log_ratio = float(self.ranks.max(totals.pop(LARGEST)))
        stats = dict(zip(totals, self.ranks.sum(torch.stack(list(totals.values()))).tolist(), strict=True))
        stats["clip_ratio/region_mean"] = stats.pop("clip_fraction")
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

    def _accumulate(self, batch: UpdateBatch, rows: Sequence[int], kl_coef: float) -> dict[str, Tensor]:
        """Accumulate the gradients of one optimizer step; if memory runs out, start over with smaller micro-batches."""
        while True:
            try:
                return self._backward(batch, rows, kl_coef)
            except torch.OutOfMemoryError as error:
                self.micro_batch_size = halved_micro_batch(self.micro_batch_size, self.ranks, error)
                self._drop_gradients()

    def _backward(self, batch: UpdateBatch, rows: Sequence[int], kl_coef: float) -> dict[str, Tensor]:
        """Run forward and backward passes over all micro-batches of one optimizer step; return summed statistics."""
        tokens = batch.rollout.mask_BT[rows].sum()
        totals: dict[str, Tensor] = {}
        passes = rank_passes(batch.rollout.completions, rows, self.micro_batch_size, self.ranks)
        for number, (micro, weight) in enumerate(passes, 1):
            self.heartbeat.safe_point()
            with self.policy.learning(last=number == len(passes)):
                loss, stats = self._policy_loss(batch, micro, tokens, kl_coef, new=weight > 0)
                self.policy.backward(loss * weight)
            stats["loss"] = loss.detach()
            if self.critic is not None and batch.values_BT is not None:
                with self.critic.learning(last=number == len(passes)):
                    loss = self.critic.loss(batch, micro, tokens, self.pad_id)
                    self.critic.backward(loss * weight)
                stats["critic/loss"] = loss.detach()
            for name, value in stats.items():
                before, counted = totals.get(name, torch.zeros_like(value)), value * weight
                totals[name] = torch.maximum(before, counted) if name == LARGEST else before + counted
        return totals

    def _policy_loss(
        self, batch: UpdateBatch, rows: list[int], tokens: Tensor, kl_coef: float, *, new: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a micro-batch's share of the token mean over ``tokens``; ``new`` if these rows aren't repeated."""
        config, rollout, advantages_BT = self.config, batch.rollout, batch.advantages_BT
        width = advantages_BT.shape[1]
        logprobs_BT, entropy_BT, mask_BT = self.logprobs(self.policy.model, rollout.completions, rows, width)
        if self.on_policy and new:
            rollout.old_logprobs_BT[rows], rollout.entropy_BT[rows] = logprobs_BT.detach(), entropy_BT
        old_BT = rollout.old_logprobs_BT[rows]
        weights_BT = importance_weights(
            old_BT,
            rollout.rollout_logprobs_BT[rows],
            rollout.mask_BT[rows],
            mode=self.correction,
            low=config.importance_low,
            high=config.importance_high,
        )
        loss, stats = policy_loss(
            logprobs_BT,
            old_BT,
            advantages_BT[rows],
            mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weights_BT=weights_BT,
            denominator=tokens,
        )
        if config.estimator_spec.kl_in_loss:
            k2_BT = kl_estimate(logprobs_BT, rollout.ref_logprobs_BT[rows], "k2")
            loss = loss + kl_coef * masked_mean(k2_BT, mask_BT, tokens)
        log_ratio_BT = (logprobs_BT.detach() - old_BT).abs()
        stats[LARGEST] = torch.where(mask_BT.bool(), log_ratio_BT, 0.0).max()
        return loss, stats

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
