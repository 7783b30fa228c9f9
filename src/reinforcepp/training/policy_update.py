"""What happens with a scored rollout batch: advantages, then one or several optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from reinforcepp.algorithm.advantages import compute_advantages
from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.losses import Correction, importance_weights, masked_mean, policy_loss, value_loss
from reinforcepp.config import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError, UnusableUpdate
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.monitoring import echo
from reinforcepp.rewards.functions import RewardScores
from reinforcepp.rollout.engine import request_seed
from reinforcepp.training.batches import micro_batches, optimizer_batches
from reinforcepp.training.critic import Critic
from reinforcepp.training.guardrails import Guardrails
from reinforcepp.training.learner import Learner
from reinforcepp.training.update_batch import BatchInUse
from reinforcepp.types import Completion, RolloutBatch

LARGEST = "log_ratio_max"  # of what a micro-batch tells, the one figure that isn't a sum


class PolicyUpdate:
    """Updates the policy, and the critic where there is one, from one rollout batch at a time.

    Args:
        config: the run's settings.
        ranks: those who share each batch.
        policy: what is trained.
        critic: for the estimator ppo.
        pad_id: of the tokenizer.
        correction: of the rollout engine's log-probabilities: ``tis``, ``icepop`` or ``off``.
        on_policy: each batch is used for one optimiser step and was sampled, from the full distribution, by the trainer's
            own forward pass. Its log-probabilities then are the engine's, so the pass that would give them again is
            left out: the ratio is 1 by definition.
        guard: decides whether an update is made.
        between: called before every micro-batch and optimiser step, where nothing is half done.

    ``kl_coef`` is the coefficient in force.
    """

    def __init__(
        self,
        config: ReinforceConfig,
        ranks: Ranks,
        policy: Learner,
        critic: Critic | None,
        *,
        pad_id: int,
        correction: Correction,
        on_policy: bool,
        guard: Guardrails,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.critic = critic
        self.pad_id = pad_id
        self.correction = correction
        self.on_policy = on_policy
        self.guard = guard
        self.between = between
        self.kl_coef = config.kl_coef
        self.micro_batch_size = config.effective_micro_batch_size

    def begin(self, batch: RolloutBatch, scores: RewardScores) -> BatchInUse:
        """What :meth:`run` works on, made of this rank's part of the batch; every rank gets all of it."""
        values_BT = self._values(batch)
        return BatchInUse(batch, scores, *self.advantages(batch, values_BT), values_BT).gather(self.ranks)

    def run(self, work: BatchInUse, step: int) -> dict[str, float]:
        """All optimiser steps on a batch that have not been made; returns the mean of what they tell."""
        config, batch = self.config, work.batch
        planned = [
            rows
            for iteration in range(config.num_iterations)
            for rows in optimizer_batches(
                len(batch.completions), config.optimizer_batch_size, request_seed(config.seed, step, iteration)
            )
        ]
        left = planned[len(work.history) :]
        for rows in left:
            work.history.append(self._optimizer_step(work, rows, step))
        if left:
            self._after(batch)
        told: dict[str, list[float]] = {}
        for row in work.history:
            for name, value in row.items():
                told.setdefault(name, []).append(value)
        mean = {name: sum(values) / len(values) for name, values in told.items()}
        return mean | {"skipped_updates": sum(told["skipped_updates"])}

    def advantages(self, batch: RolloutBatch, values_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Advantages, normalised over the parts of all ranks as the estimator says, and returns for a critic."""
        config = self.config
        own_BT = batch.rollout_logprobs_BT if self.on_policy else batch.old_logprobs_BT
        return compute_advantages(
            batch.rewards_B,
            kl_estimate(own_BT, batch.ref_logprobs_BT, "k1"),
            batch.mask_BT,
            kl_coef=0.0 if config.estimator_spec.kl_in_loss else self.kl_coef,
            gamma=config.gamma,
            estimator=config.estimator,
            group_ids_B=batch.group_ids_B,
            normalize_over=config.normalize_over,
            values_BT=values_BT,
            gae_lambda=config.gae_lambda,
            sum_over_ranks=self.ranks.sum,
        )

    def logprobs(
        self, model: object, completions: Sequence[Completion], rows: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(logprobs, entropy, mask)`` of the chosen completions under ``model``, padded to ``width`` columns."""
        return response_logprobs(
            model,
            [completions[i].prompt.ids for i in rows],
            [completions[i].ids for i in rows],
            pad_id=self.pad_id,
            temperature=self.config.temperature,
            width=width,
        )

    # --- inside ---

    def _optimizer_step(self, work: BatchInUse, rows: Sequence[int], step: int) -> dict[str, float]:
        """Gradients, a look at them, and the step, unless the guard leaves it out."""
        totals = self._accumulate(work, rows)
        self.between()
        log_ratio = float(self.ranks.max(totals.pop(LARGEST)))
        told = dict(zip(totals, self.ranks.sum(torch.stack(list(totals.values()))).tolist(), strict=True))
        told["clip_ratio/region_mean"] = told.pop("clip_fraction")
        learners = {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})
        norms = {name: learner.clip() for name, learner in learners.items()}
        try:
            self.guard.check_update(told["loss"] + told.get("critic/loss", 0.0), log_ratio, norms)
        except UnusableUpdate as fault:
            for learner in learners.values():
                learner.drop_gradients()
            self.guard.leave_out(fault, step + 1)
            return {"skipped_updates": 1.0}
        self.guard.made()
        if self.critic is not None:
            told["critic/grad_norm"] = self.critic.step(norms["critic"])["grad_norm"]
        return told | self.policy.step(norms["policy"]) | {"skipped_updates": 0.0}

    def _accumulate(self, work: BatchInUse, rows: Sequence[int]) -> dict[str, Tensor]:
        """Gradients of one optimiser step, a micro-batch at a time; fewer completions at a time if memory runs out."""
        tokens = work.batch.mask_BT[rows].sum()
        while True:
            totals: dict[str, Tensor] = {}
            passes = list(self._passes(work.batch, rows))
            try:
                for place, (micro, weight) in enumerate(passes, 1):
                    self.between()
                    with self.policy.learning(last=place == len(passes)):
                        loss, stats = self._policy_loss(work, micro, tokens, new=weight > 0)
                        self.policy.backward(loss * weight)
                    stats["loss"] = loss.detach()
                    if self.critic is not None and work.values_BT is not None:
                        with self.critic.learning(last=place == len(passes)):
                            loss = self._critic_loss(work, micro, tokens)
                            self.critic.backward(loss * weight)
                        stats["critic/loss"] = loss.detach()
                    for name, value in stats.items():
                        before, counted = totals.get(name, torch.zeros_like(value)), value * weight
                        totals[name] = torch.maximum(before, counted) if name == LARGEST else before + counted
                return totals
            except torch.OutOfMemoryError as error:
                self._take_fewer(error)

    def _passes(self, batch: RolloutBatch, rows: Sequence[int]) -> Iterator[tuple[list[int], float]]:
        """This rank's micro-batches of an optimiser step, and what each counts for.

        Every pass of one rank may wait for those of the others, so all make as many as the one with the most rows. One
        that has none left repeats a row that counts for nothing.
        """
        most = math.ceil(math.ceil(len(rows) / self.ranks.count) / self.micro_batch_size)
        own = list(micro_batches(batch.completions, self.ranks.local_slice(rows), self.micro_batch_size))
        yield from ((micro, 1.0) for micro in own)
        yield from (([rows[0]], 0.0) for _ in range(most - len(own)))

    @torch.no_grad()
    def _after(self, batch: RolloutBatch) -> None:
        """What each rank knows now is told to all: the weights, and log-probabilities of the rows it has trained on."""
        self.policy.refresh()
        if self.critic is not None:
            self.critic.refresh()
        if self.on_policy and self.ranks.count > 1:
            for own_BT in (batch.old_logprobs_BT, batch.entropy_BT):
                own_BT.copy_(self.ranks.sum(own_BT))

    def _policy_loss(
        self, work: BatchInUse, rows: list[int], tokens: Tensor, *, new: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the optimiser step's token mean; ``new`` if these rows are not repeated."""
        config, batch, advantages_BT = self.config, work.batch, work.advantages_BT
        width = advantages_BT.shape[1]
        logprobs_BT, entropy_BT, mask_BT = self.logprobs(self.policy.model, batch.completions, rows, width)
        if self.on_policy and new:
            batch.old_logprobs_BT[rows], batch.entropy_BT[rows] = logprobs_BT.detach(), entropy_BT
        loss, stats = policy_loss(
            logprobs_BT,
            batch.old_logprobs_BT[rows],
            advantages_BT[rows],
            mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weights_BT=importance_weights(
                batch.old_logprobs_BT[rows],
                batch.rollout_logprobs_BT[rows],
                batch.mask_BT[rows],
                mode=self.correction,
                low=config.importance_low,
                high=config.importance_high,
            ),
            denominator=tokens,
        )
        if config.estimator_spec.kl_in_loss:
            k2_BT = kl_estimate(logprobs_BT, batch.ref_logprobs_BT[rows], "k2")
            loss = loss + self.kl_coef * masked_mean(k2_BT, mask_BT, tokens)
        log_ratio_BT = (logprobs_BT.detach() - batch.old_logprobs_BT[rows]).abs()
        stats[LARGEST] = torch.where(mask_BT.bool(), log_ratio_BT, 0.0).max()
        return loss, stats

    def _critic_loss(self, work: BatchInUse, rows: list[int], tokens: Tensor) -> Tensor:
        assert self.critic is not None and work.values_BT is not None
        return value_loss(
            self.critic.values(work.batch.completions, rows, work.values_BT.shape[1], self.pad_id),
            work.values_BT[rows],
            work.returns_BT[rows],
            work.batch.mask_BT[rows],
            clip=self.config.value_clip,
            denominator=tokens,
        )

    @torch.no_grad()
    def _values(self, batch: RolloutBatch) -> Tensor | None:
        """The critic's values when the batch was sampled."""
        if self.critic is None:
            return None
        values_BT = torch.zeros_like(batch.mask_BT)
        for rows in micro_batches(batch.completions, range(len(batch.completions)), self.micro_batch_size):
            values_BT[rows] = self.critic.values(batch.completions, rows, values_BT.shape[1], self.pad_id)
        return values_BT

    def _take_fewer(self, error: torch.OutOfMemoryError) -> None:
        """Halve the micro-batch and tell; gradients are sums over rows, so the step's result stays what it was."""
        size = self.micro_batch_size
        # of several ranks, and with DeepSpeed, a sum over ranks is under way that can't be taken back
        if size == 1 or self.ranks.count > 1 or self.ranks.uses_deepspeed:
            cure = "lower max_new_tokens or max_prompt_length" if size == 1 else f"set micro_batch_size to {size // 2}"
            raise ConfigError(
                f"Memory ran out while training on {size} completions at a time: {cure}, or use --mixed_precision bf16."
            ) from error
        for learner in (self.policy, self.critic):
            if learner is not None:
                learner.drop_gradients()
        self.micro_batch_size = size // 2
        echo(
            f"Memory ran out with micro_batch_size {size}; going on with {size // 2}, with the same result. Set "
            f"micro_batch_size {size // 2} to start like that.",
            "yellow",
        )
