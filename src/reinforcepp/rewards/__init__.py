"""Where rewards come from: trained models, Python functions, servers and rules, and any weighted sum of them."""

from reinforcepp.rewards.card import RewardCard
from reinforcepp.rewards.functions import (
    GoldReward,
    RewardFunction,
    RewardScores,
    distinct_names,
    name_of,
    only_scored,
    score_all,
    score_with,
)
from reinforcepp.rewards.sources import RewardSum, load_rewards
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model

__all__ = [
    "GoldReward",
    "RewardCard",
    "RewardFunction",
    "RewardScores",
    "RewardSum",
    "TrainedReward",
    "check_reward_folder",
    "distinct_names",
    "load_reward_model",
    "load_rewards",
    "name_of",
    "only_scored",
    "score_all",
    "score_with",
]
