"""The report on a reward model: accuracy, length bias, and calibration on held-out pairs."""

from reinforcepp.reports.reward_model.metrics import Analysis, RewardMetrics, analyze, analyze_by_criterion, summary
from reinforcepp.reports.reward_model.terminal import print_criteria, print_summary
from reinforcepp.reports.reward_model.write import reward_report, save_pairs, write_page

__all__ = [
    "Analysis",
    "RewardMetrics",
    "analyze",
    "analyze_by_criterion",
    "print_criteria",
    "print_summary",
    "reward_report",
    "save_pairs",
    "summary",
    "write_page",
]
