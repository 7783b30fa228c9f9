"""The results of a comparison, as records that are written to files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, Literal

from reinforcepp.data import words
from reinforcepp.reports.comparison.statistics import Outcome
from reinforcepp.types import Conversation

Better = Literal["A", "B", "tie"]


@dataclass(frozen=True)
class ModelMetrics:
    """Metrics of one model over all its responses; None if a metric can't be measured.

    ``judge_error`` is the standard error of the mean score over prompts. ``length`` is the mean in tokens, ``characters``
    in characters. ``truncated`` is the share truncated at the length limit, ``distinct`` the share of distinct responses.
    ``distinct_1`` and ``distinct_2`` are distinct words and word pairs divided by all of them (Li et al. 2016,
    arXiv:1510.03055). ``kl`` is in nats per token, with its standard error. ``perplexity`` is per token of the chosen
    responses.
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
    """Two responses to a prompt with their judge scores; ``sample`` numbers a model's responses to the prompt from 0."""

    prompt: Conversation
    sample: int
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float
    better: Better
    finish_a: str
    finish_b: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return a line of answers.jsonl, whose prompts training reads as they were sampled."""
        kept = asdict(self)
        return kept if self.chat_template_kwargs else {k: v for k, v in kept.items() if k != "chat_template_kwargs"}


@dataclass(frozen=True)
class ModelComparison:
    """All results; ``reference`` is the reference model of the KL, ``notes`` are limitations of the metrics."""

    settings: dict[str, Any]
    judge: str
    reference: str
    chosen_answers: int
    outcome: Outcome
    metrics: dict[str, ModelMetrics]
    notes: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def summary(self) -> dict[str, Any]:
        """Return everything except the responses, for compare.json."""
        return {
            "model_a": self.settings["model_a"],
            "model_b": self.settings["model_b"],
            "better": self.outcome.winner,
            "better_at_equal_length": self.outcome.length_controlled_winner,
            **{name: value for name, value in asdict(self).items() if name not in ("metrics", "pairs", "settings")},
            "figures": {side: asdict(metrics) for side, metrics in self.metrics.items()},
            "settings": self.settings,
        }


def distinct_share(texts: Sequence[str]) -> float:
    """Return the share of distinct texts."""
    return len(set(texts)) / len(texts)


def distinct_ngrams(texts: Sequence[str], length: int) -> float:
    """Return the share of distinct word n-grams of ``length`` within the texts; 0 without any."""
    ngrams = []
    for text in texts:
        tokens = words(text)
        ngrams += [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def mean_by_prompt(values: Sequence[float], samples: int) -> list[float]:
    """Return the mean of each prompt's ``samples`` consecutive values."""
    return [fmean(values[start : start + samples]) for start in range(0, len(values), samples)]
