"""The report on a reward model as one page: verdict, accuracy, calibration, scores and length, worst errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from reinforcepp.data import count
from reinforcepp.reports import charts
from reinforcepp.reports.html import asset, render
from reinforcepp.reports.reward_model.metrics import PAIRS_PER_POINT, Analysis, Bucket, Share, by_criterion
from reinforcepp.reports.reward_model.verdict import verdict
from reinforcepp.rewards.card import CriterionCard, RewardCard
from reinforcepp.types import ScoredPair

MAX_POINTS = 1500
"""Pairs in the chart of scores and lengths; of more, every second or third and so on is drawn."""

Tile = tuple[str, str, Share | None, str]


@dataclass(frozen=True)
class Section:
    """The part of the page on one output."""

    name: str
    index: int
    """Number of the criterion from 1."""
    verdict: str
    tiles: list[Tile]
    analysis: Analysis
    calibration: list[Bucket]
    calibration_chart: Markup
    score_charts: list[Markup]


def as_page(card: RewardCard, pairs: Sequence[ScoredPair], analyses: Mapping[str, Analysis]) -> str:
    """Return the page as HTML; ``analyses`` are those of the pairs of each criterion."""
    prompts = count(len({pair.prompt for pair in pairs}), "prompt")
    groups = by_criterion(pairs)
    return render(
        "reward_model.html",
        title=f"Reward model from {card.base_model}",
        style=charts.STYLE + asset("static/reward_model.css"),
        scripts=(*charts.SCRIPTS, asset("static/fold.js")),
        train_pairs=card.train_pairs,
        data=card.data,
        heldout=f"{count(card.heldout_pairs, 'held-out pair')} on {prompts}",
        sections=[_section(card, name, groups[name], analysis) for name, analysis in analyses.items()],
        criteria=[_criterion_row(each, analyses) for each in card.criteria],
        correlations=_correlations(card),
        pairs_per_point=PAIRS_PER_POINT,
    )


def verdicts(card: RewardCard, analyses: Mapping[str, Analysis]) -> list[str]:
    """Return the verdict on each output, after the name of its criterion if there are any."""
    return [
        f"{name}: {text}" if name else text
        for name, text in ((name, verdict(one, _train_accuracy(card, name))) for name, one in analyses.items())
    ]


def _train_accuracy(card: RewardCard, name: str) -> float | None:
    return next((each.train_accuracy for each in card.criteria if each.name == name), card.train_accuracy)


def _criterion_row(each: CriterionCard, analyses: Mapping[str, Analysis]) -> list[Any]:
    """Return the cells of a criterion: name, counts, accuracy with its interval, and baseline."""
    analysis = analyses.get(each.name)
    right = analysis.right if analysis is not None else None
    shown = "-" if analysis is None else f"{analysis.metrics.longer_wins:.2f}"
    judged = f"{each.train_pairs} and {each.train_ties}"
    return [each.name, judged, f"{each.heldout_pairs} and {each.heldout_ties}", right, shown]


def _correlations(card: RewardCard) -> list[list[str]]:
    """Return the rows of the table of correlations: name, and the correlation with each criterion."""
    if len(card.criteria) < 2:
        return []
    return [
        [each.name, *(f"{value:+.2f}" for value in row)]
        for each, row in zip(card.criteria, card.correlations, strict=False)
    ]


def _section(card: RewardCard, name: str, pairs: Sequence[ScoredPair], analysis: Analysis) -> Section:
    accuracy = _train_accuracy(card, name)
    names = [each.name for each in card.criteria]
    return Section(
        name=name,
        index=names.index(name) + 1 if name in names else 1,
        verdict=verdict(analysis, accuracy),
        tiles=_tiles(accuracy, analysis),
        analysis=analysis,
        calibration=[Bucket(f"{each.confidence:.2f}", each.right) for each in analysis.calibration],
        calibration_chart=_calibration_chart(analysis),
        score_charts=_score_charts(pairs, analysis),
    )


def _tiles(train_accuracy: float | None, analysis: Analysis) -> list[Tile]:
    m = analysis.metrics
    train = "not recorded" if train_accuracy is None else f"{train_accuracy:.3f}"
    scores = f"{m.mean_score:.2f} ± {m.score_std:.2f}"
    return [
        ("Accuracy", f"{m.accuracy:.3f}", analysis.right, f"{count(m.ties, 'tie')}; chance is 0.5"),
        ("Training accuracy", train, None, "on training pairs; much higher means overfit"),
        ("Length-only baseline", f"{m.longer_wins:.3f}", None, "accuracy of choosing the longer response"),
        ("Accuracy without length", f"{analysis.without_length:.3f}", None, "after regressing the score on length"),
        (
            "Score-length correlation",
            f"{m.length_correlation:+.2f}",
            None,
            f"Pearson; Spearman {analysis.rank_correlation:+.2f}",
        ),
        ("Calibration error", f"{m.calibration_error:.3f}", None, "expected gap between confidence and accuracy"),
        ("Mean margin", f"{m.mean_margin:+.2f}", None, "score of the chosen minus score of the rejected response"),
        ("Score", scores, None, "mean and standard deviation over all responses"),
    ]


def _calibration_chart(analysis: Analysis) -> Markup:
    bins = [charts.Bin(each.confidence, each.right.value, each.right.count) for each in analysis.calibration]
    return charts.calibration_chart(
        "Calibration",
        {"held-out pairs": bins},
        x_name="confidence",
        y_name="accuracy",
        note="accuracy against confidence; equal on the diagonal",
    )


def _score_charts(pairs: Sequence[ScoredPair], analysis: Analysis) -> list[Markup]:
    step = -(-len(pairs) // MAX_POINTS)
    drawn = pairs[::step]
    which = "" if step == 1 else f"; {len(drawn)} of {len(pairs)} pairs"
    rows = [f"row {p.row}" for p in drawn]
    clouds = [
        charts.Points("chosen", [p.chosen_length for p in drawn], [p.chosen_score for p in drawn], rows),
        charts.Points("rejected", [p.rejected_length for p in drawn], [p.rejected_score for p in drawn], rows),
    ]
    scores = {"chosen": [p.chosen_score for p in pairs], "rejected": [p.rejected_score for p in pairs]}
    return [
        charts.histogram("Score distribution", scores, x_name="score", note="share of the responses of each kind"),
        charts.scatter_chart(
            "Score against length",
            clouds,
            x_name="tokens",
            y_name="score",
            note=f"correlation {analysis.metrics.length_correlation:+.2f}{which}",
        ),
    ]
