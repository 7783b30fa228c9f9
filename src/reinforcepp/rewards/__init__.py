"""Where rewards come from: a trained reward model or any Python function of the same signature."""

from reinforcepp.reward_card import RewardCard
from reinforcepp.rewards.functions import GoldReward, RewardFunction, RewardScores, name_of, score_with
from reinforcepp.rewards.trained import (
    TrainedReward,
    check_reward_folder,
    describe_reward,
    load_reward_model,
    load_rewards,
)

__all__ = [
    "GoldReward",
    "RewardCard",
    "RewardFunction",
    "RewardScores",
    "TrainedReward",
    "check_reward_folder",
    "describe_reward",
    "load_reward_model",
    "load_rewards",
    "name_of",
    "score_with",
]
