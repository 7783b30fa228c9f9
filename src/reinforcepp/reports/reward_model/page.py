"""The report as one page that opens offline: the verdict, where the model is right, how sure it is, its worst errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from reinforcepp.data import count
from reinforcepp.reports import charts
from reinforcepp.reports.html import page
from reinforcepp.reports.reward_model.figures import PAIRS_PER_POINT, Analysis, Bucket, Share
from reinforcepp.reports.reward_model.verdict import verdict
from reinforcepp.rewards.card import RewardCard
from reinforcepp.types import ScoredPair

POINTS = 1500
"""Pairs in the chart of scores and lengths; of more, every second or third and so on is drawn."""
SHOWN = 400
"""Characters of a text that are shown at once."""

STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def as_page(card: RewardCard, pairs: Sequence[ScoredPair], analysis: Analysis) -> str:
    """Everything, as HTML."""
    title = f"Reward model from {card.base_model}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict(analysis, card.train_accuracy))}</p>',
        _source(card, pairs),
        _key_figures(card, analysis),
        _where_right(analysis),
        _how_sure(analysis),
        _scores(pairs, analysis),
        _errors(analysis),
    ]
    return page(title, "<main>" + "\n".join(body) + "</main>", charts.STYLE + STYLE, charts.SCRIPTS)


def _source(card: RewardCard, pairs: Sequence[ScoredPair]) -> str:
    prompts = count(len({pair.prompt for pair in pairs}), "prompt")
    return (
        f'<p class="quiet">Trained on {escape(str(card.train_pairs))} pairs of {escape(str(card.data))}. All figures '
        f"are of the {count(len(pairs), 'pair')} on {prompts} that took no part in it. A pair is right where the chosen "
        "answer has the higher score, a tie counts as half. Intervals are 95 %; they take pairs as independent, so they "
        "are too narrow where there are many to a prompt.</p>"
    )


def _key_figures(card: RewardCard, analysis: Analysis) -> str:
    f = analysis.figures
    train = "not noted" if card.train_accuracy is None else f"{card.train_accuracy:.3f}"
    tiles = [
        ("accuracy", f"{f.accuracy:.3f} {_interval(analysis.right)}", f"{count(f.ties, 'tie')}; chance is 0.5"),
        ("on training pairs", train, "accuracy there; much higher means learned by heart"),
        ("if the longer answer won", f"{f.longer_wins:.3f}", "accuracy of guessing by length"),
        ("without length", f"{analysis.without_length:.3f}", "accuracy once the effect of length is taken off"),
        ("score and length", f"{f.length_correlation:+.2f}", f"correlation; of ranks {analysis.rank_correlation:+.2f}"),
        ("calibration error", f"{f.calibration_error:.3f}", "expected gap between confidence and accuracy"),
        ("mean margin", f"{f.mean_margin:+.2f}", "score of the chosen answer less that of the rejected"),
        ("scores", f"{f.mean_score:.2f} ± {f.score_std:.2f}", "mean and standard deviation of all answers"),
    ]
    shown = (f'<div><dt>{n}</dt><dd class="value">{v}</dd><dd class="what">{what}</dd></div>' for n, v, what in tiles)
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def _interval(share: Share) -> str:
    return f'<span class="interval">{share.low:.2f} to {share.high:.2f}</span>'


def _where_right(analysis: Analysis) -> str:
    tables = [
        _buckets("By margin", "margin, either way", analysis.by_margin),
        _buckets("By length difference", "chosen answer is", analysis.by_length_difference),
        _buckets("By length", "tokens, mean of both", analysis.by_length),
    ]
    return (
        '<h2>Where it is right</h2><p class="hint">A sound model is right more often where its margin is large, and as '
        f'often where the chosen answer is the shorter one.</p><div class="tables">{"".join(tables)}</div>'
    )


def _buckets(caption: str, of: str, buckets: Sequence[Bucket], marks: Sequence[float] = ()) -> str:
    """A table whose last column draws what the one before says, so it is left out for those who have it read."""
    scale = '<div class="scale"><span>0</span><span>0.5</span><span>1</span></div>'
    head = f'<th scope="col">{of}</th><th scope="col">pairs</th><th scope="col">right</th>'
    rows = "".join(
        f'<tr><th scope="row">{bucket.label}</th><td>{bucket.right.count}</td><td>{bucket.right.value:.2f} '
        f'{_interval(bucket.right)}</td><td class="picture" aria-hidden="true">{_track(bucket.right, marks[i : i + 1])}</td></tr>'
        for i, bucket in enumerate(buckets)
    )
    return (
        f'<table class="buckets"><caption>{caption}</caption><thead><tr>{head}<th class="picture" aria-hidden="true">'
        f"{scale}</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _track(share: Share, due: Sequence[float]) -> str:
    """A line from 0 to 1 with the interval, the share and, where that is given, a mark at what it should be."""
    places = f"--low:{share.low:.1%};--high:{share.high:.1%};--at:{share.value:.1%}"
    marks = "".join(f'<span class="due" style="--due:{value:.1%}"></span>' for value in due)
    return f'<div class="track" style="{places}"><span class="between"></span>{marks}<span class="at"></span></div>'


def _how_sure(analysis: Analysis) -> str:
    bins = analysis.calibration
    chart = charts.calibration_chart(
        "Calibration",
        {"held-out pairs": [charts.Bin(b.confidence, b.right.value, b.right.count) for b in bins]},
        x_name="confidence",
        y_name="share right",
        note="on the diagonal, the model is as sure as it is right",
    )
    table = _buckets(
        "By confidence",
        "confidence (mark)",
        [Bucket(f"{b.confidence:.2f}", b.right) for b in bins],
        [b.confidence for b in bins],
    )
    return (
        '<h2>How sure it is</h2><p class="hint">The confidence in an order is the sigmoid of the margin. Points below the '
        "diagonal are pairs of which the model was too sure: train for fewer epochs, or with a lower learning rate. Each "
        f'point stands for {PAIRS_PER_POINT} pairs or more.</p><div class="tables">{chart}{table}</div>'
    )


def _scores(pairs: Sequence[ScoredPair], analysis: Analysis) -> str:
    step = -(-len(pairs) // POINTS)
    drawn = pairs[::step]
    which = "" if step == 1 else f"; {len(drawn)} of {len(pairs)} pairs"
    scores = {"chosen": [p.chosen_score for p in pairs], "rejected": [p.rejected_score for p in pairs]}

    def cloud(name: str, length: Callable[[ScoredPair], float], score: Callable[[ScoredPair], float]) -> charts.Cloud:
        return charts.Cloud(name, [*map(length, drawn)], [*map(score, drawn)], [f"row {p.row}" for p in drawn])

    clouds = [
        cloud("chosen", lambda p: p.chosen_length, lambda p: p.chosen_score),
        cloud("rejected", lambda p: p.rejected_length, lambda p: p.rejected_score),
    ]
    shown = [
        charts.histogram("Scores", scores, x_name="score", note="share of the answers of each kind"),
        charts.scatter_chart(
            "Score and length",
            clouds,
            x_name="tokens",
            y_name="score",
            note=f"correlation {analysis.figures.length_correlation:+.2f}{which}",
        ),
    ]
    return (
        '<h2>Scores and length</h2><p class="hint">Where the two kinds of answers overlap, the model can\'t tell them '
        "apart by score alone. If scores rise with length whatever the answer, a policy will learn to write longer: add "
        f'pairs whose shorter answer is the better one.</p><div class="charts">{"".join(shown)}</div>'
    )


# --- worst errors ---------------------------------------------------------------------------------------------------


def _errors(analysis: Analysis) -> str:
    if not analysis.worst:
        return "<h2>Worst errors</h2><p>No pair is in the wrong order.</p>"
    items = "".join(f"<li>{_error(pair)}</li>" for pair in analysis.worst)
    return (
        '<h2>Worst errors</h2><p class="hint">The pairs in the wrong order of which the model is surest. Some will be '
        "labelled the wrong way round: correct those in the data. Others show what the model has yet to learn.</p>"
        f'<ol class="errors">{items}</ol>'
    )


def _error(pair: ScoredPair) -> str:
    answers = [
        ("Chosen", pair.chosen, pair.chosen_score, pair.chosen_length),
        ("Rejected", pair.rejected, pair.rejected_score, pair.rejected_length),
    ]
    shown = "".join(
        f'<div><p class="says">{name}, score {score:.2f}, {length} tokens</p>{_text(text)}</div>'
        for name, text, score, length in answers
    )
    return (
        f"<h3>Row {pair.row}, margin {pair.margin:.2f}</h3>"
        f'<div class="prompt"><p class="says">Prompt</p>{_text(pair.prompt)}</div><div class="answers">{shown}</div>'
    )


def _text(text: str) -> str:
    """A text of the data, the rest of a long one folded away; ``dir`` lets it run the way its script does."""
    if len(text) <= SHOWN:
        return f'<p class="text" dir="auto">{escape(text)}</p>'
    return (
        f'<details class="text" dir="auto"><summary><span class="start">{escape(text[:SHOWN])}… </span>'
        f"<span class=quiet>({len(text):,} characters)</span></summary>{escape(text)}</details>"
    )
