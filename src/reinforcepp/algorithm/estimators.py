"""The advantage estimators, each as what it is made of; the one place that knows their names. Imports no torch.

``reinforce_plus_plus`` and ``reinforce_plus_plus_baseline``: arXiv 2501.03262v9, equations 4 to 8. ``rloo``: arXiv
2402.14740. ``grpo``: arXiv 2402.03300. ``ppo``: arXiv 1707.06347 with GAE, arXiv 1506.02438, as arXiv 2203.02155 uses
it for language models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

EstimatorName = Literal["reinforce_plus_plus", "reinforce_plus_plus_baseline", "rloo", "grpo", "ppo"]
Baseline = Literal["none", "group_mean", "leave_one_out", "critic"]
Scale = Literal["batch", "group", "none"]


@dataclass(frozen=True)
class EstimatorSpec:
    """How advantages come from rewards.

    ``baseline`` is what is subtracted: nothing, the mean of the prompt's samples, the mean of its other samples, or a
    critic's estimate (with GAE). ``scale`` is what makes advantages comparable: mean and deviation over the whole
    batch, the deviation within the group, or nothing. ``kl_in_loss`` puts the KL into the loss (k2) instead of the
    reward (k1).
    """

    baseline: Baseline
    scale: Scale
    kl_in_loss: bool = False

    @property
    def uses_critic(self) -> bool:
        """Whether a second model learns the values of contexts."""
        return self.baseline == "critic"

    @property
    def grouped(self) -> bool:
        """Whether samples of one prompt are compared, so that at least two of each are needed."""
        return self.baseline in ("group_mean", "leave_one_out")


ESTIMATORS: dict[str, EstimatorSpec] = {
    "reinforce_plus_plus": EstimatorSpec("none", "batch"),
    "reinforce_plus_plus_baseline": EstimatorSpec("group_mean", "batch", kl_in_loss=True),
    "rloo": EstimatorSpec("leave_one_out", "none"),
    "grpo": EstimatorSpec("group_mean", "group", kl_in_loss=True),
    "ppo": EstimatorSpec("critic", "batch"),
}
assert tuple(ESTIMATORS) == get_args(EstimatorName)
