"""The policy losses and their components, named as in TRL. No other file compares their names. Imports no torch.

``dapo``, the default: arXiv 2503.14476; ``grpo``: 2402.03300; ``dr_grpo``: 2503.20783; ``luspo``: 2602.05261; ``cispo``:
2506.13585; ``sapo``: 2511.20347; ``rloo``: 2402.14740, as TRL's RLOOTrainer computes it. ``bnpo`` is TRL's token mean over a
micro-batch; a micro-batch here only saves memory, so it is the mean over the optimizer step, as in ``dapo``.

Each one is a sum over tokens of weight · loss, where the weights depend only on the mask and on sums over the optimizer step.
Splitting the step over micro-batches or ranks therefore changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

LossType = Literal["dapo", "bnpo", "grpo", "dr_grpo", "luspo", "cispo", "sapo", "rloo"]
RatioLevel = Literal["token", "sequence"]
Surrogate = Literal["clip", "cispo", "sapo"]
Mean = Literal["tokens", "sequence_means", "max_length", "sequence_sums"]


@dataclass(frozen=True)
class LossSpec:
    """How per-token terms become a loss.

    Attributes:
        mean: over all tokens of the optimizer step, over sequences of their token means, over as many tokens as the longest
            completions would have, or over sequences of their token sums.
        surrogate: bounds the policy ratio by clipping (PPO), by clipping without a gradient (CISPO), or softly (SAPO).
        whole_sequences: the ratio is that of whole sequences, the product of their tokens' ratios.
    """

    mean: Mean
    surrogate: Surrogate = "clip"
    whole_sequences: bool = False


LOSS_TYPES: dict[str, LossSpec] = {
    "dapo": LossSpec("tokens"),
    "bnpo": LossSpec("tokens"),
    "grpo": LossSpec("sequence_means"),
    "dr_grpo": LossSpec("max_length"),
    "luspo": LossSpec("sequence_sums"),
    "cispo": LossSpec("tokens", "cispo"),
    "sapo": LossSpec("sequence_means", "sapo"),
    "rloo": LossSpec("sequence_sums", whole_sequences=True),
}
assert tuple(LOSS_TYPES) == get_args(LossType)


@dataclass(frozen=True)
class Objective:
    """Type and bounds of a policy loss.

    Attributes:
        loss_type: a name from ``LOSS_TYPES``.
        importance_sampling_level: one policy ratio per token, or the geometric mean of a sequence's. [arXiv 2507.18071]
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high; with cispo, above clip_high.
        dual_clip: bound c > 1 of the loss, c · |A|, at negative advantages A; None disables it.
        sapo_temperature_pos: of sapo's gate, at positive advantages.
        sapo_temperature_neg: of sapo's gate, at other advantages.
    """

    loss_type: str = "dapo"
    importance_sampling_level: RatioLevel = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    @property
    def spec(self) -> LossSpec:
        """Parts of the loss."""
        return LOSS_TYPES[self.loss_type]

    @property
    def unclipped(self) -> Objective:
        """The same objective with a policy ratio that isn't clipped."""
        return replace(self, clip_low=1.0, clip_high=math.inf)
