"""The report on a reward model as one page: verdict, accuracy, calibration, scores and length, worst errors."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from reinforcepp.data import count
from reinforcepp.reports import charts
from reinforcepp.reports.html import asset, render
from reinforcepp.reports.reward_model.metrics import PAIRS_PER_POINT, Analysis, Bucket, Share
from reinforcepp.reports.reward_model.verdict import verdict
from reinforcepp.rewards.card import RewardCard
from reinforcepp.types import ScoredPair

MAX_POINTS = 1500
"""Pairs in the chart of scores and lengths; of more, every second or third and so on is drawn."""

Tile = tuple[str, str, Share | None, str]


def as_page(card: RewardCard, pairs: Sequence[ScoredPair], analysis: Analysis) -> str:
    """Return the page as HTML."""
    prompts = count(len({pair.prompt for pair in pairs}), "prompt")
    return render(
        "reward_model.html",
        title=f"Reward model from {card.base_model}",
        style=charts.STYLE + asset("static/reward_model.css"),
        scripts=(*charts.SCRIPTS, asset("static/fold.js")),
        verdict=verdict(analysis, card.train_accuracy),
        train_pairs=card.train_pairs,
        data=card.data,
        heldout=f"{count(len(pairs), 'held-out pair')} on {prompts}",
        tiles=_tiles(card, analysis),
        analysis=analysis,
        pairs_per_point=PAIRS_PER_POINT,
        calibration=[Bucket(f"{each.confidence:.2f}", each.right) for each in analysis.calibration],
        calibration_chart=_calibration_chart(analysis),
        score_charts=_score_charts(pairs, analysis),
    )


def _tiles(card: RewardCard, analysis: Analysis) -> list[Tile]:
    m = analysis.metrics
    train = "not recorded" if card.train_accuracy is None else f"{card.train_accuracy:.3f}"
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
