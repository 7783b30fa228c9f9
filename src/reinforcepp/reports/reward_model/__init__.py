"""The report on a reward model: is it right, on which pairs, does it go by length, is it as sure as it should be."""

from reinforcepp.reports.reward_model.figures import Analysis, RewardFigures, analyse, summary
from reinforcepp.reports.reward_model.terminal import tell
from reinforcepp.reports.reward_model.write import save_pairs, write_page, write_reward_report

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
