"""What the micro-batches of an optimizer step share: sums over all their rows, and the weights of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.importance import (
    Correction,
    high_entropy_mask,
    importance_weights,
    negative_token_mask,
    off_policy_mask,
    trust_region,
    weight_stats,
)
from reinforcepp.algorithm.means import StepSize
from reinforcepp.config import ReinforceConfig
from reinforcepp.training.passes import row_index
from reinforcepp.types import RolloutBatch


class OptimizerStep(NamedTuple):
    """An optimizer step over all micro-batches and ranks.

    Attributes:
        size: denominators of its means.
        kl_coef: weight of the KL.
        focus_BT: 1 on the tokens with a policy loss and an entropy bonus, over all rows of the rollout batch.
        focus_tokens: number of these tokens, at least 1.
    """

    size: StepSize
    kl_coef: float
    focus_BT: Tensor
    focus_tokens: Tensor | float

    @staticmethod
    def of(rollout: RolloutBatch, rows: Sequence[int], kl_coef: float, config: ReinforceConfig) -> OptimizerStep:
        """Return the step on ``rows`` of a rollout batch.

        Tokens of high entropy are chosen among all rows by their entropy at sampling, so micro-batches and ranks change nothing.
        """
        mask_BT, quantile = rollout.mask_BT, config.top_entropy_quantile
        rows_B = row_index(rows, mask_BT)
        size = StepSize(mask_BT[rows_B].sum().clamp_min(1), len(rows), config.max_new_tokens)
        if quantile == 1:
            return OptimizerStep(size, kl_coef, mask_BT, size.tokens)
        focus_BT = torch.zeros_like(mask_BT)
        focus_BT[rows_B] = high_entropy_mask(rollout.entropy_BT[rows_B], mask_BT[rows_B], quantile)
        return OptimizerStep(size, kl_coef, focus_BT, focus_BT.sum().clamp_min(1))

    def token_weights(
        self,
        rollout: RolloutBatch,
        rows_B: Tensor,
        logprobs_BT: Tensor,
        advantages_BT: Tensor,
        config: ReinforceConfig,
        correction: Correction,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return the weights of a micro-batch's tokens in the policy loss, None if all are 1, and their statistics."""
        mask_BT, old_BT, engine_BT = (
            rollout.mask_BT[rows_B],
            rollout.old_logprobs_BT[rows_B],
            rollout.rollout_logprobs_BT[rows_B],
        )
        bounds = {"low": config.importance_low, "high": config.importance_high}
        importance_BT = importance_weights(old_BT, engine_BT, mask_BT, mode=correction, **bounds)
        factors, stats = [], {}
        if importance_BT is not None:
            factors.append(importance_BT)
            stats = weight_stats(importance_BT, mask_BT, self.size.tokens)
        if correction == "binary_kl":
            factors.append(trust_region(logprobs_BT, engine_BT, mask_BT, config.importance_max_kl))
            stats["sampling/trust_region_dropped_ratio"] = (1 - factors[-1][:, 0]).sum() / self.size.sequences
        if config.negative_token_fraction < 1:
            factors.append(negative_token_mask(old_BT, advantages_BT, mask_BT, config.negative_token_fraction))
        if config.off_policy_mask_threshold is not None:
            sampling_BT = old_BT if importance_BT is None else engine_BT
            threshold = config.off_policy_mask_threshold
            factors.append(off_policy_mask(logprobs_BT, sampling_BT, advantages_BT, mask_BT, threshold))
        if config.top_entropy_quantile < 1:
            factors.append(self.focus_BT[rows_B])
        return (reduce(torch.mul, factors) if factors else None), stats
