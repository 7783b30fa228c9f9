"""The database of human and AI feedback: prompts, answers, units of work, and votes. Loads SQLAlchemy, but no torch."""

from reinforcepp.config.labeling import Task
from reinforcepp.data.feedback.records import Answer, NewUnit, Unit
from reinforcepp.data.feedback.store import Store
from reinforcepp.data.feedback.votes import Choice, Edit, Ranking, Ratings, Skip, Vote, parse_vote

__all__ = [
    "Answer",
    "Choice",
    "Edit",
    "NewUnit",
    "Ranking",
    "Ratings",
    "Skip",
    "Store",
    "Task",
    "Unit",
    "Vote",
    "parse_vote",
]
