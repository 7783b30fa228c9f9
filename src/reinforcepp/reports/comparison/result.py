"""What a comparison found out, as records that go into files as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from reinforcepp.data import words
from reinforcepp.reports.comparison.statistics import Outcome

Better = Literal["A", "B", "tie"]


@dataclass(frozen=True)
class Figures:
    """One model's figures over all its answers; None where one couldn't be measured.

    ``judge_error`` is the standard error of the mean score, over prompts; ``length`` the mean in tokens, ``characters`` in
    characters; ``truncated`` the share cut off at the length limit; ``distinct`` the share of different answers;
    ``distinct_1`` and ``distinct_2`` the number of different words, and of pairs of neighbouring words, over that of all
    (Li et al. 2016, arXiv:1510.03055); ``kl`` in nats per token, with its standard error; ``perplexity`` per token of the
    chosen answers.
    """

    judge: float
    judge_error: float
    length: float
    characters: float
    truncated: float
    distinct: float
    distinct_1: float
    distinct_2: float
    kl: float | None
    kl_error: float | None
    perplexity: float | None


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, with what the judge gave them; ``sample`` counts the answers of a model to it from 0."""

    prompt: str
    sample: int
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float
    better: Better
    finish_a: str
    finish_b: str


@dataclass(frozen=True)
class ModelComparison:
    """Everything; ``reference`` is the model to which the KL was measured, ``notes`` say what limits the figures."""

    settings: dict[str, Any]
    judge: str
    reference: str
    chosen_answers: int
    outcome: Outcome
    figures: dict[str, Figures]
    notes: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def summary(self) -> dict[str, Any]:
        """All but the answers, for compare.json."""
        return {
            "model_a": self.settings["model_a"],
            "model_b": self.settings["model_b"],
            "better": self.outcome.winner,
            "better_at_equal_length": self.outcome.length_controlled_winner,
            **{name: value for name, value in asdict(self).items() if name not in ("pairs", "settings")},
            "settings": self.settings,
        }


def distinct_share(texts: Sequence[str]) -> float:
    """The number of different answers over the number of answers."""
    return len(set(texts)) / len(texts)


def distinct_runs(texts: Sequence[str], length: int) -> float:
    """Different runs of ``length`` words over all such runs, none reaching from one answer into the next; 0 of none."""
    runs = []
    for text in texts:
        own = words(text)
        runs += [tuple(own[i : i + length]) for i in range(len(own) - length + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def mean_by_prompt(values: Sequence[float], samples: int) -> list[float]:
    """The mean over each prompt's ``samples`` values, which stand side by side."""
    return [fmean(values[start : start + samples]) for start in range(0, len(values), samples)]
