"""Score the completions of a step: rewards, log-probabilities, and the advantages made of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reinforcepp.algorithm.advantages import clip_rewards, compute_advantages
from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import UnusableUpdate
from reinforcepp.models.tokenization import pad_values
from reinforcepp.rewards.functions import RewardScores, drop_unscored
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.training.batches import UpdateBatch, micro_batches
from reinforcepp.training.policy_update import PolicyUpdate
from reinforcepp.types import Completion, RolloutBatch


def score(
    completions: list[Completion], rewards: RewardSum, update: PolicyUpdate, reference: object
) -> tuple[RolloutBatch, RewardScores]:
    """Score this rank's completions; the tensors have one row per completion (B) and one column per token (T).

    Args:
        completions: from the rollout engine. Completions that no reward function scores are dropped.
        rewards: the reward functions.
        update: gives log-probabilities under the current policy, unless its own forward pass gives them (``on_policy``)
            or the completions bring them from the older weights that sampled them (``staleness``).
        reference: the reference policy.

    Raises:
        UnusableUpdate: a log-probability isn't finite.
    """
    config, device = update.config, update.ranks.device

    def score_local() -> tuple[RolloutBatch, RewardScores]:
        scores = rewards.score(completions)
        kept, scores = drop_unscored(completions, scores, grouped=config.estimator_spec.grouped)
        width = max((len(c.ids) for c in kept), default=0)
        shape = (len(kept), width)
        old_BT, ref_BT, entropy_BT, mask_BT = (torch.zeros(shape, device=device) for _ in range(4))
        with torch.no_grad():
            for rows in micro_batches(kept, range(len(kept)), update.micro_batch_size):
                ref_BT[rows], _, mask_BT[rows] = update.logprobs(reference, kept, rows, width)
                if not update.on_policy and not config.staleness:
                    old_BT[rows], entropy_BT[rows], _ = update.logprobs(update.policy.scoring, kept, rows, width)
        if config.staleness:  # the policy no longer has the weights that sampled
            old_BT = pad_values([c.old_logprobs for c in kept]).to(device)
            entropy_BT = pad_values([c.entropy for c in kept]).to(device)
        if not bool(torch.isfinite(torch.stack([ref_BT, old_BT])).all()):
            raise UnusableUpdate("a completion's log-probability isn't finite under the policy or its reference")
        batch = RolloutBatch(
            completions=kept,
            mask_BT=mask_BT,
            rollout_logprobs_BT=pad_values([c.logprobs for c in kept]).to(device),
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            entropy_BT=entropy_BT,
            rewards_B=clip_rewards(torch.tensor(scores.known, device=device), config.reward_clip),
            group_ids_B=torch.tensor([c.prompt.key for c in kept], dtype=torch.long, device=device),
        )
        return batch, scores

    return update.ranks.run_or_raise_all(score_local)


def with_advantages(batch: RolloutBatch, scores: RewardScores, update: PolicyUpdate, kl_coef: float) -> UpdateBatch:
    """Add advantages to this rank's batch, then join the batches of all ranks, so that every rank has all rows.

    Raises:
        UnusableUpdate: no row is left on any rank.
    """
    values_BT = update.values(batch)
    advantages_BT, returns_BT = batch_advantages(
        batch, update.config, kl_coef, on_policy=update.on_policy, values_BT=values_BT, sum_over_ranks=update.ranks.sum
    )
    joined = UpdateBatch(batch, scores, advantages_BT, returns_BT, values_BT).gather(update.ranks)
    if not joined.rollout.completions:
        raise UnusableUpdate("no completion of the batch was scored by a reward")
    return joined


def batch_advantages(
    batch: RolloutBatch,
    config: ReinforceConfig,
    kl_coef: float,
    *,
    on_policy: bool,
    values_BT: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """Return ``(advantages_BT, returns_BT)`` by the estimator that ``config`` names, normalized over all ranks.

    With ``on_policy`` the engine's log-probabilities stand for the policy's, which the update has yet to compute.
    """
    policy_BT = batch.rollout_logprobs_BT if on_policy else batch.old_logprobs_BT
    return compute_advantages(
        batch.rewards_B,
        kl_estimate(policy_BT, batch.ref_logprobs_BT, "k1"),
        batch.mask_BT,
        kl_coef=0.0 if config.estimator_spec.kl_in_loss else kl_coef,
        gamma=config.gamma,
        estimator=config.estimator,
        group_ids_B=batch.group_ids_B,
        normalize_over=config.normalize_over,
        values_BT=values_BT,
        gae_lambda=config.gae_lambda,
        sum_over_ranks=sum_over_ranks,
    )
