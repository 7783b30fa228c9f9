"""The advantage estimators and their components. No other file compares their names. Imports no torch.

``reinforce_plus_plus`` and ``reinforce_plus_plus_baseline``: arXiv 2501.03262v9, equations 4 to 8. ``rloo``: arXiv
2402.14740. ``grpo``: arXiv 2402.03300. ``ppo``: arXiv 1707.06347 with GAE, arXiv 1506.02438, as arXiv 2203.02155 uses
it for language models. ``flash_reinforce``: Hu et al. 2026, "FlashREINFORCE", as OpenRLHF 0.11.2 has it; its trust region is
``importance.trust_region``. docs/estimators.md compares them with other projects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from reinforcepp.errors import ConfigError, nearest

EstimatorName = Literal["reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo", "grpo", "ppo", "flash_reinforce"]
Baseline = Literal["none", "group_mean", "leave_one_out", "batch_mean", "critic"]
DiscountPer = Literal["tokens", "turns"]
Scale = Literal["batch", "group", "none", "reward_std", "sequences"]


@dataclass(frozen=True)
class EstimatorSpec:
    """How an estimator turns rewards into advantages.

    Attributes:
        baseline: subtracted from the reward: nothing, the mean of the prompt's samples, the mean of its other samples, the
            mean of all samples of the rollout batch, or a critic's value (with GAE).
        scale: standardization over the batch, division by the group's standard deviation, or none. Two more are chosen by
            settings: division by the standard deviation of the batch's rewards, and standardization in which each
            sequence counts once.
        kl_in_loss: the KL is a term of the loss (k2) instead of the reward (k1).
        trust_region: ``importance_correction: auto`` is ``binary_kl``.
    """

    baseline: Baseline
    scale: Scale
    kl_in_loss: bool = False
    trust_region: bool = False

    @property
    def uses_critic(self) -> bool:
        """Whether the estimator trains a critic."""
        return self.baseline == "critic"

    @property
    def grouped(self) -> bool:
        """Whether the estimator compares the samples of a prompt, so that it needs at least two."""
        return self.baseline in ("group_mean", "leave_one_out")

    @property
    def credits_time(self) -> bool:
        """Whether a token's advantage counts only the rewards after it, so that discounts and rewards of turns matter."""
        return self.baseline in ("none", "critic")


ESTIMATORS: dict[str, EstimatorSpec] = {
    "reinforce_plus_plus": EstimatorSpec("none", "batch"),
    "reinforce_plus_plus_baseline": EstimatorSpec("group_mean", "batch", kl_in_loss=True),
    "rloo": EstimatorSpec("leave_one_out", "none"),
    "grpo": EstimatorSpec("group_mean", "group", kl_in_loss=True),
    "ppo": EstimatorSpec("critic", "batch"),
    "flash_reinforce": EstimatorSpec("batch_mean", "none", trust_region=True),
}
assert tuple(ESTIMATORS) == get_args(EstimatorName)


def checked_spec(name: str, *, kl_coef: float, gamma: float = 1.0) -> EstimatorSpec:
    """Return the components of an estimator that gets ``kl_coef`` as the weight of the KL in the reward, and a discount.

    Raises:
        ConfigError: no estimator has this name, the KL would count in both reward and loss, or there is nothing to discount.
    """
    if name not in ESTIMATORS:
        raise ConfigError(
            f"estimator: {name!r} isn't valid. Choose {', '.join(ESTIMATORS)}.{nearest(name, ESTIMATORS)}"
        )
    spec = ESTIMATORS[name]
    if spec.kl_in_loss and kl_coef != 0:
        raise ConfigError(
            f"kl_coef: {name} has its KL in the loss, but kl_coef of the reward is {kl_coef}. "
            "Pass 0 and add the k2 KL to the loss."
        )
    if gamma != 1 and not spec.credits_time:
        raise ConfigError(f"gamma: {gamma} isn't valid for {name}. Use 1.")
    return spec
