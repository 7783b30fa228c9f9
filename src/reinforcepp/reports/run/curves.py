"""Which charts a report has: outcome first, then what explains it, then speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.charts import POINTS, Bars, Cloud, Line, bar_chart, histogram, line_chart, scatter_chart
from reinforcepp.reports.charts.words import number
from reinforcepp.reports.run.samples import Pairs, Samples, step_of

IN_REACH = 0.25  # of a limit; a curve far below it would be a flat line
GAP_OF_NOTE = 1e-5  # nats; an engine that shares the trainer's forward pass is below
ALL_POINTS = 2 * POINTS  # of a chart, however many curves there are
MOST_FUNCTIONS = 12

Runs = Mapping[str, RunRecord]
Values = list[float | None]


@dataclass(frozen=True)
class Curve:
    """A metric over the steps; ``low`` and ``high``, of one run's record, are the edges of a band around it."""

    title: str
    note: str
    metric: str
    log: Literal["never", "offered", "on"] = "never"
    smooth: bool = True
    band: Callable[[Mapping[str, float]], tuple[float, float] | None] | None = None
    always: bool = False
    """Also where it never changes, since one looks for it."""


def _deviation(step: Mapping[str, float]) -> tuple[float, float] | None:
    if "reward" not in step or "reward_std" not in step:
        return None
    return step["reward"] - step["reward_std"], step["reward"] + step["reward_std"]


def _shortest_and_longest(step: Mapping[str, float]) -> tuple[float, float] | None:
    names = ("completions/min_length", "completions/max_length")
    return (step[names[0]], step[names[1]]) if all(name in step for name in names) else None


OUTCOME = (
    Curve("Reward", "mean of a step's completions, and standard deviation", "reward", band=_deviation),
    Curve("KL to the start", "nats per token", "kl", log="offered"),
    Curve("Entropy", "nats per token", "entropy", log="offered"),
    Curve("Answer length", "tokens: mean, shortest, longest", "completions/mean_length", band=_shortest_and_longest),
)
DIAGNOSTICS = (
    Curve(
        "Cut off", "share of the completions that reached the length limit", "completions/clipped_ratio", always=True
    ),
    Curve("Different completions", "share of a step's completions", "completions/distinct_ratio"),
    Curve("Repetition", "share of runs of four words that a completion said before", "completions/repeated_ratio"),
    Curve("Top reward", "share of the completions with the highest reward of their step", "reward_top_ratio"),
    Curve("Groups without signal", "share of prompts whose completions all have one reward", "frac_reward_zero_std"),
    Curve("Rewards cut", "share of the rewards beyond reward_clip", "reward_clipped_ratio"),
    Curve("Policy ratio clipped", "share of the tokens", "clip_ratio/region_mean", always=True),
    Curve("KL of one update", "from the policy that sampled, nats per token", "approx_kl"),
    Curve("Gradient norm", "before it is scaled down to max_grad_norm", "grad_norm", log="offered"),
    Curve("Loss", "near 0 is normal, as advantages have mean 0", "loss"),
    Curve("Learning rate", "", "learning_rate", smooth=False),
    Curve("KL coefficient", "adapted to kl_target", "kl_coef", smooth=False),
    Curve("Critic's loss", "", "critic/loss", log="offered"),
    Curve("Critic's gradient norm", "", "critic/grad_norm", log="offered"),
    Curve("Updates left out", "because a value wasn't finite or a ratio too large", "skipped_updates", smooth=False),
)
SAMPLING = (
    Curve(
        "Sampling gap, mean", "between engine and trainer, nats per token", "sampling/logprob_gap_mean", log="offered"
    ),
    Curve("Sampling gap, largest", "nats, of one token", "sampling/logprob_gap_max", log="offered"),
)
RARE = ("skipped_updates", "reward_clipped_ratio", "kl_coef")  # shown only where there is something to see


def outcome_charts(runs: Runs) -> list[str]:
    """Held-out figures, reward, rewards of each function, KL, entropy, length."""
    limits = [record.settings.get("kl_limit") for record in runs.values()]
    highest = max((value for record in runs.values() for value in record.series("kl")), default=0.0)
    near = [limit for limit in limits if limit is not None and highest > IN_REACH * limit]
    charts = [*_evaluations(runs), _chart(OUTCOME[0], runs), *_by_function(runs)]
    charts += [
        _chart(curve, runs, {"kl_limit": near[0]} if curve.metric == "kl" and near else None) for curve in OUTCOME[1:]
    ]
    return [chart for chart in charts if chart]


def diagnostic_charts(runs: Runs) -> tuple[list[str], list[str]]:
    """What tells why: repetition, clipping, gradients, rates; and in words what never changed, of which there is no chart."""
    curves = [curve for curve in DIAGNOSTICS if curve.metric not in RARE or _any(runs, curve.metric)]
    if any(value > GAP_OF_NOTE for r in runs.values() for value in r.series("sampling/logprob_gap_mean")):
        curves += SAMPLING
    charts, constant = [], []
    for curve in curves:
        values = {value for record in runs.values() for value in record.series(curve.metric)}
        if len(values) == 1 and not curve.always:
            constant.append(f"{_short(curve)} {number(values.pop())}")
        elif values:
            charts.append(_chart(curve, runs))
    return charts, constant


def speed_charts(runs: Runs) -> list[str]:
    """Tokens per second, seconds of a step, and of its phases."""
    speed = [
        Line(name if len(runs) > 1 else "throughput", steps, throughput(record), place=place)
        for place, (name, record) in enumerate(runs.items())
        if any(value is not None for value in throughput(record)) and (steps := steps_of(record))
    ]
    seconds = Curve("Time of a step", "seconds", "step_time", log="offered")
    charts = [
        line_chart("Throughput", speed, note="tokens of prompts and answers per second", points=_points(len(runs)))
        if speed
        else "",
        _chart(seconds, runs),
        _phases(runs),
    ]
    return [chart for chart in charts if chart]


def length_charts(samples: Samples) -> str:
    """Reward against length, and how rewards lie, early and late; empty without points."""
    named = {"early third": samples.early, "late third": samples.late}
    clouds = [
        Cloud(name, [p[0] for p in points], [p[1] for p in points], [f"step {p[2]}" for p in points])
        for name, points in named.items()
        if points
    ]
    if not clouds:
        return ""
    told = [f"{cloud.name} {r:+.2f}" for cloud in clouds if (r := correlation(cloud.x, cloud.y)) is not None]
    note = f"one point for a completion; correlation: {', '.join(told)}" if told else "one point for a completion"
    rewards = {cloud.name: cloud.y for cloud in clouds}
    return scatter_chart(
        "Reward against length", clouds, x_name="length in tokens", y_name="reward", note=note
    ) + histogram("Rewards of completions", rewards, x_name="reward", note="share of the completions")


def held_out_charts(pairs: Pairs) -> str:
    """How rewards lie before and after, and beside them the judge's scores or, without a judge, the lengths."""
    moments = ("before", pairs.when)
    rewards = {when: _known(pair.rewards[i] for pair in pairs.pairs) for i, when in enumerate(moments)}
    lengths = {when: _known(pair.lengths[i] for pair in pairs.pairs) for i, when in enumerate(moments)}
    judged = []
    for i, when in enumerate(moments):
        both = [(p.judge[i], p.rewards[i]) for p in pairs.pairs if p.judge[i] is not None and p.rewards[i] is not None]
        if both:
            judged.append(Cloud(when, _known(judge for judge, _ in both), _known(reward for _, reward in both)))
    charts = []
    if any(rewards.values()):
        charts.append(
            histogram("Rewards of the held-out answers", rewards, x_name="reward", note="share of the prompts")
        )
    if judged:
        note = "an answer at the upper left is paid well for nothing"
        charts.append(scatter_chart("Reward against judge", judged, x_name="judge", y_name="reward", note=note))
    elif any(lengths.values()):
        title = "Lengths of the held-out answers"
        charts.append(histogram(title, lengths, x_name="length in tokens", note="share of the prompts"))
    return "".join(charts)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# --- one chart --------------------------------------------------------------------------------------------------------


def steps_of(record: RunRecord) -> list[float]:
    """The steps of the log; where an old log doesn't number them, their places in it."""
    return [step.get("step", place) for place, step in enumerate(record.metrics, 1)]


def throughput(record: RunRecord) -> Values:
    """Tokens per second at each step; None at a step without an update, and where the log doesn't tell."""
    found: Values = []
    before = 0.0
    for step in record.metrics:
        tokens, seconds = step.get("num_tokens"), step.get("step_time")
        known = tokens is not None and seconds and tokens > before
        found.append((tokens - before) / seconds if known and tokens is not None and seconds else None)
        before = tokens if tokens is not None else before
    return found


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two doesn't vary."""
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((v - mean_x) ** 2 for v in x) * sum((v - mean_y) ** 2 for v in y)
    if spread <= 0:
        return None
    return float(sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread**0.5)


def _chart(curve: Curve, runs: Runs, limits: dict[str, float] | None = None) -> str:
    lines = [
        _line(curve, name if len(runs) > 1 else _short(curve), record, place, band=len(runs) == 1)
        for place, (name, record) in enumerate(runs.items())
        if record.series(curve.metric)
    ]
    if not lines:
        return ""
    return line_chart(
        curve.title,
        lines,
        note=curve.note if len(runs) == 1 else curve.note.split(", and ")[0].split(": ")[0],
        log=curve.log,
        smooth=curve.smooth,
        limits=limits,
        points=_points(len(runs)),
    )


def _line(curve: Curve, name: str, record: RunRecord, place: int, *, band: bool) -> Line:
    values: Values = [step.get(curve.metric) for step in record.metrics]
    edges = [curve.band(step) for step in record.metrics] if band and curve.band is not None else []
    if not any(edges):
        return Line(name, steps_of(record), values, place=place)
    low, high = ([edge[i] if edge is not None else None for edge in edges] for i in range(2))
    return Line(name, steps_of(record), values, low, high, place)


def _short(curve: Curve) -> str:
    """The title as the name of a curve: a small letter in front, unless it is an abbreviation's."""
    title = {"completions/mean_length": "length", "kl": "KL"}.get(curve.metric, curve.title)
    return title if title[1].isupper() else title[0].lower() + title[1:]


def _points(curves: int) -> int:
    return min(POINTS, ALL_POINTS // curves)


def _any(runs: Runs, metric: str) -> bool:
    return any(value for record in runs.values() for value in record.series(metric))


def _by_function(runs: Runs) -> list[str]:
    """The reward of each function, where there are several; of several runs, a chart for each function."""
    found = dict.fromkeys(
        key for record in runs.values() for step in record.metrics for key in step if key.startswith("rewards/")
    )
    names = list(found)[:MOST_FUNCTIONS]
    if len(names) < 2:
        return []
    titles = {metric: metric.removeprefix("rewards/").removesuffix("/mean") for metric in names}
    if len(runs) > 1:
        return [_chart(Curve(f"Reward of {title}", "mean", metric), runs) for metric, title in titles.items()]
    (record,) = runs.values()
    lines = [Line(title, steps_of(record), [s.get(metric) for s in record.metrics]) for metric, title in titles.items()]
    return [
        line_chart(
            "Reward by function",
            lines,
            note="mean of each; their weighted sum is the reward",
            points=_points(len(lines)),
        )
    ]


def _evaluations(runs: Runs) -> list[str]:
    """Held-out reward and judge in the course of training, where it was evaluated on the way."""
    if all(len(record.evaluations) < 3 for record in runs.values()):
        return []
    charts = []
    for key, title in (("reward", "Held-out reward"), ("judge", "Held-out judge")):
        lines = [
            _evaluation_line(name if len(runs) > 1 else key, record, key, place)
            for place, (name, record) in enumerate(runs.items())
            if any(key in own for own in record.evaluations.values())
        ]
        if lines:
            note = "mean over the prompts, and twice its standard error"
            charts.append(line_chart(title, lines, note=note, smooth=False))
    return charts


def _evaluation_line(name: str, record: RunRecord, key: str, place: int) -> Line:
    end = record.facts.get("num_steps") or (steps_of(record) or [0])[-1]
    moments = {"before": 0, "after": end}
    found = sorted(
        (moments[when] if when in moments else step_of(when), own[key], own.get(f"{key}_error", 0.0))
        for when, own in record.evaluations.items()
        if key in own
    )
    x, y = [point[0] for point in found], [point[1] for point in found]
    low, high = ([value + sign * 2 * error for _, value, error in found] for sign in (-1, 1))
    return Line(name, x, y, low, high, place)


def _phases(runs: Runs) -> str:
    names = dict.fromkeys(key for r in runs.values() for step in r.metrics for key in step if key.startswith("time/"))
    titles = [name.removeprefix("time/") for name in names]
    if not names:
        return ""
    if len(runs) == 1:
        (record,) = runs.values()
        lines = [
            Line(title, steps_of(record), [step.get(name) for step in record.metrics])
            for name, title in zip(names, titles, strict=True)
        ]
        return line_chart("Time by phase", lines, note="seconds of a step", log="offered", points=_points(len(lines)))
    bars = [
        Bars(run, [fmean(values) if (values := record.series(name)) else None for name in names], place)
        for place, (run, record) in enumerate(runs.items())
    ]
    return bar_chart("Time by phase", titles, bars, y_name="seconds", note="mean of a step")
