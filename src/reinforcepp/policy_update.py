"""What happens with a scored rollout batch: advantages, then one or several optimiser steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reinforcepp import algorithm
from reinforcepp.batching import micro_batches, optimizer_batches
from reinforcepp.config import ReinforceConfig
from reinforcepp.critic import Critic, value_loss
from reinforcepp.distributed import Ranks
from reinforcepp.errors import ConfigError
from reinforcepp.learner import Learner
from reinforcepp.logprobs import response_logprobs
from reinforcepp.observe import say
from reinforcepp.rollout.engine import request_seed
from reinforcepp.types import Completion, RolloutBatch


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
    """

    def __init__(
        self,
        config: ReinforceConfig,
        ranks: Ranks,
        policy: Learner,
        critic: Critic | None,
        *,
        pad_id: int,
        correction: algorithm.Correction,
        on_policy: bool,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.policy = policy
        self.critic = critic
        self.pad_id = pad_id
        self.correction = correction
        self.on_policy = on_policy
        self.micro_batch_size = config.micro_batch_size

    def run(self, batch: RolloutBatch, step: int) -> dict[str, float]:
        """All optimiser steps on a batch; returns their mean loss, clip fraction, gradient norm and learning rate."""
        config = self.config
        values_BT = self._values(batch)
        advantages_BT, returns_BT = self.advantages(batch, values_BT)
        history: list[dict[str, float]] = []
        for iteration in range(config.num_iterations):
            for rows in optimizer_batches(
                len(batch.completions), config.optimizer_batch_size, request_seed(config.seed, step, iteration)
            ):
                totals = self._accumulate(batch, advantages_BT, values_BT, returns_BT, rows)
                stats = self.policy.step(f"step {step + 1}")
                if self.critic is not None:
                    stats["critic/grad_norm"] = self.critic.step(f"step {step + 1} of the critic")["grad_norm"]
                summed = {name: float(self.ranks.sum(value)) for name, value in totals.items()}
                history.append(summed | stats)
        mean = {name: sum(h[name] for h in history) / len(history) for name in history[0]}
        mean["clip_ratio/region_mean"] = mean.pop("clip_fraction")
        return mean

    def advantages(self, batch: RolloutBatch, values_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Advantages, normalised over the batches of all ranks as the estimator says, and returns for a critic."""
        config = self.config
        own_BT = batch.rollout_logprobs_BT if self.on_policy else batch.old_logprobs_BT
        return algorithm.advantages(
            batch.rewards_B,
            algorithm.kl_estimate(own_BT, batch.ref_logprobs_BT, "k1"),
            batch.mask_BT,
            kl_coef=config.kl_in_reward,
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

    def _accumulate(
        self,
        batch: RolloutBatch,
        advantages_BT: Tensor,
        values_BT: Tensor | None,
        returns_BT: Tensor,
        rows: Sequence[int],
    ) -> dict[str, Tensor]:
        """Gradients of one optimiser step, a micro-batch at a time; fewer completions at a time if memory runs out."""
        tokens = self.ranks.sum(batch.mask_BT[rows].sum())
        while True:
            totals: dict[str, Tensor] = {}
            try:
                for micro in micro_batches(batch.completions, rows, self.micro_batch_size):
                    loss, stats = self._policy_loss(batch, advantages_BT, micro, tokens)
                    self.policy.backward(loss)
                    stats["loss"] = loss.detach()
                    if self.critic is not None and values_BT is not None:
                        loss = self._critic_loss(batch, values_BT, returns_BT, micro, tokens)
                        self.critic.backward(loss)
                        stats["critic/loss"] = loss.detach()
                    for name, value in stats.items():
                        totals[name] = totals.get(name, torch.zeros_like(value)) + value
                return totals
            except torch.OutOfMemoryError as error:
                self._take_fewer(error)

    def _policy_loss(
        self, batch: RolloutBatch, advantages_BT: Tensor, rows: list[int], tokens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the optimiser step's token mean."""
        config = self.config
        width = advantages_BT.shape[1]
        logprobs_BT, entropy_BT, mask_BT = self.logprobs(self.policy.model, batch.completions, rows, width)
        if self.on_policy:
            batch.old_logprobs_BT[rows], batch.entropy_BT[rows] = logprobs_BT.detach(), entropy_BT
        loss, stats = algorithm.policy_loss(
            logprobs_BT,
            batch.old_logprobs_BT[rows],
            advantages_BT[rows],
            mask_BT,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            weights_BT=algorithm.rollout_weights(
                batch.old_logprobs_BT[rows],
                batch.rollout_logprobs_BT[rows],
                batch.mask_BT[rows],
                mode=self.correction,
                low=config.importance_low,
                high=config.importance_high,
            ),
            denominator=tokens,
        )
        if config.kl_in_loss:
            k2_BT = algorithm.kl_estimate(logprobs_BT, batch.ref_logprobs_BT[rows], "k2")
            loss = loss + config.kl_in_loss * algorithm.masked_mean(k2_BT, mask_BT, tokens)
        return loss, stats

    def _critic_loss(
        self, batch: RolloutBatch, values_BT: Tensor, returns_BT: Tensor, rows: list[int], tokens: Tensor
    ) -> Tensor:
        assert self.critic is not None
        return value_loss(
            self.critic.values(batch.completions, rows, values_BT.shape[1], self.pad_id),
            values_BT[rows],
            returns_BT[rows],
            batch.mask_BT[rows],
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
        if size == 1 or self.ranks.count > 1:  # other ranks are in the middle of a sum that can't be taken back
            cure = "lower max_new_tokens or max_prompt_length" if size == 1 else f"set mini_batch_size to {size // 2}"
            raise ConfigError(
                f"Memory ran out while training on {size} completions at a time: {cure}, or use --mixed_precision bf16."
            ) from error
        for learner in (self.policy, self.critic):
            if learner is not None:
                learner.drop_gradients()
        self.micro_batch_size = size // 2
        say(
            f"Memory ran out with mini_batch_size {size}; going on with {size // 2}, with the same result. Set "
            f"mini_batch_size {size // 2} to start like that.",
            "yellow",
        )
