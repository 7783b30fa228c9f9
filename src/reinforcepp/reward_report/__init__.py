"""The report on a reward model: is it right, on which pairs, does it go by length, is it as sure as it should be."""

from reinforcepp.reward_report.command import save_pairs, write_page, write_reward_report
from reinforcepp.reward_report.figures import Analysis, RewardFigures, analyse, summary
from reinforcepp.reward_report.terminal import tell

__all__ = [
    "Analysis",
    "RewardFigures",
    "analyse",
    "save_pairs",
    "summary",
    "tell",
    "write_page",
    "write_reward_report",
]
