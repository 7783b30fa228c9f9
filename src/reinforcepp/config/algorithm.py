"""Settings of the algorithm: advantages, KL and loss."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from reinforcepp.algorithm.estimators import ESTIMATORS, DiscountPer, EstimatorName, EstimatorSpec, Scale
from reinforcepp.algorithm.loss_types import LossType, Objective, RatioLevel
from reinforcepp.config.base import Config, NonNegativeFloat, PositiveFloat, Range
from reinforcepp.errors import ConfigError

Discount = Annotated[float, Range(at_least=0, at_most=1)]


@dataclass(frozen=True)
class AlgorithmConfig(Config):
    """How rewards become advantages, and advantages a loss."""

    estimator: EstimatorName = "reinforce_plus_plus"
    """Advantage estimator; rloo, grpo and ppo are for comparison"""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Only grpo: deviation that rewards are divided by; true: group, the default"""
    normalize_advantages: bool = False
    """Only rloo: standardize the advantages over the batch"""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Only grpo: normalize the sum of the rewards, or each reward in its group first"""
    gamma: Discount = 1.0
    """Discount of later rewards"""
    discount_per: DiscountPer = "tokens"
    """Apply gamma between tokens, or between the turns of an episode only"""
    normalize_over: Literal["tokens", "sequences"] = "tokens"
    """Population of the advantage normalization; tokens as in the paper's code"""
    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL to the reference policy; higher stays closer to it"""
    use_bias_correction_kl: bool | None = None
    """KL in a loss as in TRL: k3, if true times the policy ratio. Default: k2"""

    loss_type: LossType = "dapo"
    """Mean of the token losses, and bound of the policy ratio, as in TRL; or rloo"""
    importance_sampling_level: RatioLevel = "token"
    """Policy ratio of each token, or the geometric mean of a sequence's (GSPO)"""
    clip_low: Annotated[float, Range(above=0, below=1)] = 0.2
    """Clip the policy ratio below 1 - clip_low; no effect with one update per batch"""
    clip_high: PositiveFloat = 0.2
    """Clip the policy ratio above 1 + clip_high; with cispo, above clip_high"""
    dual_clip: Annotated[float, Range(above=1)] | None = None
    """Bound on the loss at negative advantages, in multiples of the advantage"""
    mask_truncated_completions: bool = False
    """Exclude completions that are truncated at max_new_tokens from the loss"""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Drop a sequence's negative advantages if its policy moved more nats/token"""
    negative_token_fraction: Annotated[float, Range(at_least=0, at_most=1)] = 1.0
    """Fraction of negative-advantage tokens, the least likely, with a policy loss"""
    top_entropy_quantile: Annotated[float, Range(at_least=0, at_most=1)] = 1.0
    """Fraction of tokens, those of highest entropy, with a policy loss; 1: all"""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus, the mean entropy per token in nats"""
    sapo_temperature_pos: PositiveFloat = 1.0
    """Only sapo: temperature of the gate at positive advantages"""
    sapo_temperature_neg: PositiveFloat = 1.05
    """Only sapo: temperature of the gate at other advantages"""

    gae_lambda: Discount = 0.95
    """Only ppo: lambda of GAE; 0 trusts the critic, 1 the observed returns"""
    value_clip: PositiveFloat | None = 0.2
    """Only ppo: clip values to +- this around their value at sampling"""

    @property
    def estimator_spec(self) -> EstimatorSpec:
        """Parts of the estimator."""
        return ESTIMATORS[self.estimator]

    @property
    def advantage_scale(self) -> Scale:
        """Scale of the advantages."""
        if self.normalizes_each_reward or self.scale_rewards == "batch":
            return "reward_std"
        return "sequences" if self.normalize_advantages else self.scale_rewards or self.estimator_spec.scale

    @property
    def normalizes_each_reward(self) -> bool:
        """Whether each reward function is normalized before they are added."""
        return self.multi_objective_aggregation == "normalize_then_sum"

    @property
    def objective(self) -> Objective:
        """Type and bounds of the loss."""
        return Objective(**{part.name: getattr(self, part.name) for part in fields(Objective)})

    @property
    def kl_of_loss(self) -> Literal["k2", "k3"]:
        """KL estimate of a loss."""
        return "k2" if self.use_bias_correction_kl is None else "k3"

    def _check_rules(self) -> None:
        if self.gamma != 1 and not self.estimator_spec.credits_time:
            raise ConfigError(
                f"gamma: {self.gamma} doesn't work with the estimator {self.estimator}, which has no rewards per token. "
                "Set gamma to 1."
            )
        if self.discount_per == "turns" and self.gamma == 1:
            raise ConfigError(
                "discount_per: turns has no effect, because gamma is 1 (no discount). Set gamma below 1, or omit discount_per."
            )
        for setting, given, fits in (
            ("scale_rewards", self.scale_rewards is not None, self.estimator_spec.scale == "group"),
            ("normalize_advantages", self.normalize_advantages, self.estimator_spec.baseline == "leave_one_out"),
            ("multi_objective_aggregation", self.normalizes_each_reward, self.estimator_spec.scale == "group"),
        ):
            if given and not fits:
                raise ConfigError(
                    f"{setting}: {getattr(self, setting)} doesn't work with the estimator {self.estimator}. It is a setting of "
                    f"{'rloo' if setting == 'normalize_advantages' else 'grpo'}; reinforce_plus_plus and its baseline always "
                    "standardize advantages over the batch. Omit it or change the estimator."
                )
        if self.use_bias_correction_kl is not None and not self.estimator_spec.kl_in_loss:
            in_loss = " or ".join(name for name, spec in ESTIMATORS.items() if spec.kl_in_loss)
            raise ConfigError(
                f"use_bias_correction_kl is a setting of a KL in the loss, but {self.estimator} has k1 in the reward. Omit it, "
                f"or use the estimator {in_loss}."
            )
        self._check_loss()

    def _check_loss(self) -> None:
        if self.objective.spec.whole_sequences and self.importance_sampling_level != "token":
            raise ConfigError(
                f"importance_sampling_level: {self.importance_sampling_level} is the geometric mean of a sequence's policy "
                f"ratios, but loss_type {self.loss_type} multiplies them. Omit one of the two."
            )
        if self.dual_clip is not None and self.objective.spec.surrogate != "clip":
            raise ConfigError(f"dual_clip: loss_type {self.loss_type} doesn't clip its loss. Omit dual_clip.")
        if self.dual_clip is not None and self.dual_clip < 1 + self.clip_high:
            raise ConfigError(
                f"dual_clip: {self.dual_clip} is below 1 + clip_high, {1 + self.clip_high:g}. Raise dual_clip or lower clip_high."
            )
