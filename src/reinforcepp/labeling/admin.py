"""What the administrator's page shows: progress, speed and agreement, as numbers, tables and charts."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from markupsafe import Markup

from reinforcepp.labeling.quality import ALL, LabelerQuality, Quality, Share
from reinforcepp.monitoring.live_view import duration
from reinforcepp.reports.charts import Bars, Line, bar_chart, line_chart

LABELER_TITLES = (
    "labeler",
    "votes",
    "skipped",
    "median time",
    "gold right",
    "same on repeats",
    "first better",
    "alpha",
)
MAX_POINTS = 400
NOTHING = "-"


def admin_values(quality: Quality) -> dict[str, Any]:
    """Return the values of the template ``admin.html``."""
    return {
        "facts": _facts(quality),
        "charts": _charts(quality),
        "titles": LABELER_TITLES,
        "rows": [labeler_row(each) for each in quality.labelers],
        "topics": [[name, shown(value)] for name, value in quality.alpha.items()],
        "judges": [[name, share(value)] for name, value in quality.judges.items()],
    }


def labeler_row(each: LabelerQuality) -> list[str]:
    """Return the measurements of a labeler as cells under ``LABELER_TITLES``."""
    name = each.name if each.kind == "human" else f"{each.name} ({each.kind})"
    seconds = NOTHING if each.seconds is None else f"{each.seconds:.0f} s"
    shares = [share(value) for value in (each.gold, each.repeats, each.first)]
    return [name, str(each.votes), str(each.skipped), seconds, *shares, shown(each.alpha)]


def share(value: Share) -> str:
    """Return a share as text, with the counts: small ones prove little."""
    return NOTHING if value.value is None else f"{value.value:.0%} ({value.count}/{value.total})"


def shown(value: float | None) -> str:
    """Return a number, or a dash."""
    return NOTHING if value is None else f"{value:.2f}"


def _facts(quality: Quality) -> list[tuple[str, str]]:
    people = [each for each in quality.labelers if each.kind == "human"]
    recent = [each for each in quality.times if each > time.time() - 600]
    left = quality.votes_left
    seconds_left = left * (recent[-1] - recent[0]) / (len(recent) - 1) if len(recent) > 1 else None
    return [
        ("Units labeled", f"{quality.units.count} of {quality.units.total}"),
        ("Votes", str(sum(each.votes for each in people))),
        ("Labelers", str(len(people))),
        ("Time left at the present speed", duration(seconds_left) if seconds_left and left else NOTHING),
        ("Krippendorff's alpha", shown(quality.alpha[ALL])),
    ]


def _charts(quality: Quality) -> list[Markup]:
    people = [each for each in quality.labelers if each.kind == "human" and each.votes]
    drawn = []
    if len(quality.times) > 1:
        start, step = quality.times[0], -(-len(quality.times) // MAX_POINTS)
        counts = list(enumerate(quality.times, 1))[step - 1 :: step]
        line = Line("votes", [(each - start) / 60 for _, each in counts], [float(count) for count, _ in counts])
        drawn.append(
            line_chart("Votes over time", [line], x_name="minutes", smooth=False, note="of all people, since the first")
        )
    if people:
        names = [each.name for each in people]
        drawn.append(bar_chart("Votes by labeler", names, [Bars("votes", [float(each.votes) for each in people])]))
        seconds = [Bars("seconds", [each.seconds for each in people])]
        drawn.append(bar_chart("Median time per vote", names, seconds, y_name="seconds"))
    if any(each.gold.total for each in people):
        rates = [Bars("right", [each.gold.value for each in people])]
        drawn.append(bar_chart("Gold units", names, rates, note="share of known answers that the labeler found"))
    topics = Counter({name: value for name, value in quality.alpha.items() if value is not None and name != ALL})
    if topics:
        values = [Bars("alpha", list(topics.values()))]
        drawn.append(
            bar_chart("Agreement by topic", list(topics), values, note="Krippendorff's alpha, 1 is perfect, 0 chance")
        )
    return drawn
