"""The loss of the policy, as a pure function over tensors.

Dimensions: B sequences, T response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import kl_estimate
from reinforcepp.algorithm.loss_types import Objective
from reinforcepp.algorithm.means import StepSize, masked_mean, mean_loss
from reinforcepp.algorithm.surrogates import clip_shares, policy_ratio, surrogate

DEFAULT = Objective()


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    objective: Objective = DEFAULT,
    *,
    weights_BT: Tensor | None = None,
    kl_BT: Tensor | None = None,
    correct_kl: bool = False,
    size: StepSize | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean over tokens of -w · min(s · A, clip(s, 1 - clip_low, 1 + clip_high) · A) + kl.

    s = exp(logprobs - old) is the policy ratio. [arXiv 2501.03262v9 Eq. 1] An objective of another type has another mean, ratio
    or bound: see ``loss_types`` and ``surrogates``.

    Args:
        logprobs_BT: of the policy in training, with gradient.
        old_logprobs_BT: of the policy that sampled the batch.
        advantages_BT: from :func:`reinforcepp.algorithm.advantages.compute_advantages`.
        mask_BT: 1 on sampled tokens.
        objective: type and bounds.
        weights_BT: the detached weights w, see :func:`reinforcepp.algorithm.importance.importance_weights`; 1 by default.
        kl_BT: a KL estimate times its coefficient, with gradient.
        correct_kl: multiply ``kl_BT`` by the ratio, because an older policy sampled the tokens.
        size: of the optimizer step over all micro-batches and ranks; by default of this batch.

    Returns:
        The loss, and the detached metrics of :func:`clip_shares` and ``approx_kl`` (k3 of old against new). With a common
        ``size`` loss and metrics add up over micro-batches.
    """
    mask_BT = mask_BT.bool()
    if size is None:
        size = StepSize(mask_BT.sum().clamp_min(1), len(mask_BT), mask_BT.shape[1])
    advantages_BT, logprobs_BT, old_logprobs_BT = (
        torch.where(mask_BT, x, 0.0) for x in (advantages_BT, logprobs_BT, old_logprobs_BT)
    )
    ratio = policy_ratio(logprobs_BT - old_logprobs_BT, mask_BT, objective)
    objective_BT = surrogate(ratio, logprobs_BT, advantages_BT, objective)
    if objective.spec.whole_sequences:  # one term per sequence, spread over its tokens
        objective_BT = objective_BT / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    if weights_BT is not None:
        objective_BT = torch.where(mask_BT, weights_BT.detach(), 0.0) * objective_BT
    losses_BT = -objective_BT
    if kl_BT is not None:
        losses_BT = losses_BT + torch.where(mask_BT, kl_BT, 0.0) * (ratio if correct_kl else 1.0)
    with torch.no_grad():
        approx_kl = masked_mean(kl_estimate(old_logprobs_BT, logprobs_BT, "k3"), mask_BT, size.tokens)
        stats = {**clip_shares(ratio, advantages_BT, mask_BT, objective, size), "approx_kl": approx_kl}
    return mean_loss(losses_BT, mask_BT, objective.spec.mean, size), stats
