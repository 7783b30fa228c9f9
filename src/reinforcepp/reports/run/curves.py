"""The charts of a run report: the outcome first, then diagnostics, then speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from markupsafe import Markup

from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.charts import (
    MAX_POINTS,
    Bars,
    Line,
    Points,
    bar_chart,
    histogram,
    line_chart,
    scatter_chart,
)
from reinforcepp.reports.numbers import correlation, number
from reinforcepp.reports.run.samples import Pairs, Samples, step_of

NEAR_LIMIT = 0.25  # fraction of kl_limit; it is drawn only if the curve comes this near
SHOWN_GAP = 1e-5  # nats; an engine that shares the trainer's forward pass stays below
ALL_POINTS = 2 * MAX_POINTS  # of a chart, for all its curves together
MAX_FUNCTIONS = 12

Runs = Mapping[str, RunRecord]
Values = list[float | None]


@dataclass(frozen=True)
class Curve:
    """A metric over the steps. ``band`` returns the edges of a band around it, drawn if the page shows a single run."""

    title: str
    note: str
    metric: str
    log: Literal["never", "offered", "on"] = "never"
    smooth: bool = True
    band: Callable[[Mapping[str, float]], tuple[float, float] | None] | None = None
    always: bool = False
    """Whether it is drawn even if it never changes."""


def _deviation(step: Mapping[str, float]) -> tuple[float, float] | None:
    if "reward" not in step or "reward_std" not in step:
        return None
    return step["reward"] - step["reward_std"], step["reward"] + step["reward_std"]


def _min_and_max_length(step: Mapping[str, float]) -> tuple[float, float] | None:
    names = ("completions/min_length", "completions/max_length")
    return (step[names[0]], step[names[1]]) if all(name in step for name in names) else None


OUTCOME = (
    Curve("Reward", "mean over the completions of a step; band: standard deviation", "reward", band=_deviation),
    Curve("KL to the reference policy", "mean k3 estimate, in nats per token", "kl", log="offered"),
    Curve("Entropy", "of the next-token distribution, in nats per token", "entropy", log="offered"),
    Curve(
        "Completion length",
        "mean, in tokens; band: shortest and longest",
        "completions/mean_length",
        band=_min_and_max_length,
    ),
)
DIAGNOSTICS = (
    Curve("Truncated", "share of completions that reach the length limit", "completions/clipped_ratio", always=True),
    Curve(
        "Distinct completions", "share of distinct texts among the completions of a step", "completions/distinct_ratio"
    ),
    Curve("Turns", "mean messages of the policy per episode", "episodes/mean_turns"),
    Curve("Environment tokens", "mean per episode; they are masked in training", "episodes/mean_environment_tokens"),
    Curve("Failed episodes", "episodes of a step that an error ended, so they aren't trained on", "episodes/failed"),
    Curve("Tool calls", "mean per episode", "tools/call_frequency", always=True),
    Curve("Failed tool calls", "share of tool calls that returned an error", "tools/failure_frequency"),
    Curve("Repetition", "share of word 4-grams that repeat within a completion", "completions/repeated_ratio"),
    Curve("Top reward", "share of completions with the highest reward of their step", "reward_top_ratio"),
    Curve("Groups without signal", "share of prompts whose completions all have one reward", "frac_reward_zero_std"),
    Curve("Success rate", "of the prompts that the curriculum chose", "curriculum/success_rate"),
    Curve("Never solved", "prompts without a success so far", "curriculum/never_solved"),
    Curve("Always solved", "prompts without a failure so far", "curriculum/always_solved"),
    Curve(
        "Dropped completions",
        "completions of prompts without signal, which dynamic sampling replaced",
        "dynamic_sampling/dropped_completions",
    ),
    Curve("Clipped rewards", "share of rewards beyond reward_clip", "reward_clipped_ratio"),
    Curve("Clip fraction", "share of tokens whose policy ratio is clipped", "clip_ratio/region_mean", always=True),
    Curve("KL per update", "to the policy that sampled, in nats per token", "approx_kl"),
    Curve("Gradient norm", "before clipping to max_grad_norm", "grad_norm", log="offered"),
    Curve("Loss", "of the policy; near 0 is normal because advantages have mean 0", "loss"),
    Curve("Learning rate", "of the policy, after warmup and schedule", "learning_rate", smooth=False),
    Curve("KL coefficient", "weight of the KL penalty, adapted to kl_target", "kl_coef", smooth=False),
    Curve("Critic loss", "of the value estimates", "critic/loss", log="offered"),
    Curve("Critic gradient norm", "before clipping to max_grad_norm", "critic/grad_norm", log="offered"),
    Curve(
        "Skipped updates", "because of a non-finite value or too large a policy ratio", "skipped_updates", smooth=False
    ),
)
SAMPLING = (
    Curve(
        "Sampling gap, mean",
        "difference of the engine's and the trainer's log-probabilities, in nats per token",
        "sampling/logprob_gap_mean",
        log="offered",
    ),
    Curve("Sampling gap, largest", "of one token, in nats", "sampling/logprob_gap_max", log="offered"),
    Curve(
        "Outside of the trust region",
        "share of completions whose policy loss is dropped",
        "sampling/trust_region_dropped_ratio",
    ),
)
# Drawn only if a value differs from 0.
RARE = ("skipped_updates", "reward_clipped_ratio", "kl_coef", "episodes/failed", "tools/failure_frequency")


def outcome_charts(runs: Runs) -> list[Markup]:
    """Return the charts of held-out metrics, reward, rewards by function, KL, entropy, and length."""
    limits = [record.settings.get("kl_limit") for record in runs.values()]
    highest = max((value for record in runs.values() for value in record.series("kl")), default=0.0)
    near = [limit for limit in limits if limit is not None and highest > NEAR_LIMIT * limit]
    charts = [*_evaluations(runs), _chart(OUTCOME[0], runs), *_by_function(runs), *_by_source(runs)]
    charts += [
        _chart(curve, runs, {"kl_limit": near[0]} if curve.metric == "kl" and near else None) for curve in OUTCOME[1:]
    ]
    return [chart for chart in charts if chart]


def diagnostic_charts(runs: Runs) -> tuple[list[Markup], list[str]]:
    """Return charts that explain the outcome, and in words the metrics that never changed, which get no chart."""
    curves = [curve for curve in DIAGNOSTICS if curve.metric not in RARE or _any(runs, curve.metric)]
    if any(value > SHOWN_GAP for r in runs.values() for value in r.series("sampling/logprob_gap_mean")):
        curves += SAMPLING
    charts, constant = [], []
    for curve in curves:
        values = {value for record in runs.values() for value in record.series(curve.metric)}
        if len(values) == 1 and not curve.always:
            constant.append(f"{_short(curve)} {number(values.pop())}")
        elif values:
            charts.append(_chart(curve, runs))
    return charts, constant


def speed_charts(runs: Runs) -> list[Markup]:
    """Return the charts of tokens per second, seconds per step, and seconds per phase."""
    speed = [
        Line(name if len(runs) > 1 else "throughput", steps, throughput(record), style=index)
        for index, (name, record) in enumerate(runs.items())
        if any(value is not None for value in throughput(record)) and (steps := steps_of(record))
    ]
    seconds = Curve("Step time", "seconds per step", "step_time", log="offered")
    charts = [
        line_chart("Throughput", speed, note="tokens of prompts and completions per second", points=_points(len(runs)))
        if speed
        else Markup(),
        _chart(seconds, runs),
        _phases(runs),
    ]
    return [chart for chart in charts if chart]


def length_charts(samples: Samples) -> list[Markup]:
    """Return reward against length and the reward distribution, early and late; nothing without points."""
    named = {"early third": samples.early, "late third": samples.late}
    clouds = [
        Points(name, [p[0] for p in points], [p[1] for p in points], [f"step {p[2]}" for p in points])
        for name, points in named.items()
        if points
    ]
    if not clouds:
        return []
    correlations = [f"{cloud.name} {r:+.2f}" for cloud in clouds if (r := correlation(cloud.x, cloud.y)) is not None]
    note = "one point per completion" + (f"; correlation: {', '.join(correlations)}" if correlations else "")
    return [
        scatter_chart("Reward against length", clouds, x_name="length in tokens", y_name="reward", note=note),
        histogram(
            "Reward distribution",
            {cloud.name: cloud.y for cloud in clouds},
            x_name="reward",
            note="share of completions",
        ),
    ]


def held_out_charts(pairs: Pairs) -> list[Markup]:
    """Return the reward distribution before and after, and the judge's scores or, without a judge, the lengths."""
    moments = ("before", pairs.when)
    rewards = {when: _known(pair.rewards[i] for pair in pairs.pairs) for i, when in enumerate(moments)}
    lengths = {when: _known(pair.lengths[i] for pair in pairs.pairs) for i, when in enumerate(moments)}
    judged = []
    for i, when in enumerate(moments):
        both = [(p.judge[i], p.rewards[i]) for p in pairs.pairs if p.judge[i] is not None and p.rewards[i] is not None]
        if both:
            judged.append(Points(when, _known(judge for judge, _ in both), _known(reward for _, reward in both)))
    charts = []
    if any(rewards.values()):
        charts.append(
            histogram("Held-out reward distribution", rewards, x_name="reward", note="share of held-out prompts")
        )
    if judged:
        note = "responses at the upper left are overrated by the reward"
        charts.append(
            scatter_chart("Reward against judge score", judged, x_name="judge score", y_name="reward", note=note)
        )
    elif any(lengths.values()):
        title = "Held-out response length distribution"
        charts.append(histogram(title, lengths, x_name="length in tokens", note="share of held-out prompts"))
    return charts


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# --- one chart --------------------------------------------------------------------------------------------------------


def steps_of(record: RunRecord) -> list[float]:
    """Return the steps of the log; if an old log doesn't number them, their positions in it."""
    return [step.get("step", index) for index, step in enumerate(record.metrics, 1)]


def throughput(record: RunRecord) -> Values:
    """Return tokens per second for each step; None for a step without an update or without timings."""
    found: Values = []
    before = 0.0
    for step in record.metrics:
        tokens, seconds = step.get("num_tokens"), step.get("step_time")
        known = tokens is not None and seconds and tokens > before
        found.append((tokens - before) / seconds if known and tokens is not None and seconds else None)
        before = tokens if tokens is not None else before
    return found


def _chart(curve: Curve, runs: Runs, limits: dict[str, float] | None = None) -> Markup:
    lines = [
        _line(curve, name if len(runs) > 1 else _short(curve), record, index, band=len(runs) == 1)
        for index, (name, record) in enumerate(runs.items())
        if record.series(curve.metric)
    ]
    if not lines:
        return Markup()
    return line_chart(
        curve.title,
        lines,
        note=curve.note if len(runs) == 1 else curve.note.split("; band")[0],
        log=curve.log,
        smooth=curve.smooth,
        limits=limits,
        points=_points(len(runs)),
    )


def _line(curve: Curve, name: str, record: RunRecord, index: int, *, band: bool) -> Line:
    values: Values = [step.get(curve.metric) for step in record.metrics]
    edges = [curve.band(step) for step in record.metrics] if band and curve.band is not None else []
    if not any(edges):
        return Line(name, steps_of(record), values, style=index)
    low, high = ([edge[i] if edge is not None else None for edge in edges] for i in range(2))
    return Line(name, steps_of(record), values, low, high, index)


def _short(curve: Curve) -> str:
    """Return the title in lower case as the name of a curve, but keep abbreviations."""
    title = {"completions/mean_length": "length", "kl": "KL"}.get(curve.metric, curve.title)
    return title if title[1].isupper() else title[0].lower() + title[1:]


def _points(curves: int) -> int:
    return min(MAX_POINTS, ALL_POINTS // curves)


def _any(runs: Runs, metric: str) -> bool:
    return any(value for record in runs.values() for value in record.series(metric))


def _by_function(runs: Runs) -> list[Markup]:
    """Return the reward of each function, if there are several. Several runs get a chart per function."""
    found = dict.fromkeys(
        key for record in runs.values() for step in record.metrics for key in step if key.startswith("rewards/")
    )
    deviations = {f"{key.removesuffix('/mean')}/std" for key in found if key.endswith("/mean")}
    names = [key for key in found if key not in deviations][:MAX_FUNCTIONS]
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
            note="mean; the reward is their weighted sum",
            points=_points(len(lines)),
        )
    ]


def _by_source(runs: Runs) -> list[Markup]:
    """Return mean reward and share of successes of each dataset, if prompts are drawn from several."""
    charts = []
    for metric, title, note in (
        ("reward", "Reward by dataset", "mean"),
        ("success_rate", "Successes by dataset", "share of completions with a reward of at least success_threshold"),
    ):
        lines = [
            Line(
                source if len(runs) == 1 else f"{name}: {source}",
                steps_of(record),
                [step.get(f"sources/{source}/{metric}") for step in record.metrics],
            )
            for name, record in runs.items()
            for source in _sources(record)[:MAX_FUNCTIONS]
        ]
        charts += [line_chart(title, lines, note=note, points=_points(len(lines)))] if lines else []
    return charts


def _sources(record: RunRecord) -> list[str]:
    return sorted({key.split("/")[1] for step in record.metrics for key in step if key.startswith("sources/")})


def _evaluations(runs: Runs) -> list[Markup]:
    """Return held-out reward and judge score over the steps, if there are evaluations during training."""
    if all(len(record.evaluations) < 3 for record in runs.values()):
        return []
    charts = []
    for key, title in (("reward", "Held-out reward"), ("judge", "Held-out judge score")):
        lines = [
            _evaluation_line(name if len(runs) > 1 else key, record, key, index)
            for index, (name, record) in enumerate(runs.items())
            if any(key in metrics for metrics in record.evaluations.values())
        ]
        if lines:
            note = "mean over the prompts; band: two standard errors"
            charts.append(line_chart(title, lines, note=note, smooth=False))
    return charts


def _evaluation_line(name: str, record: RunRecord, key: str, index: int) -> Line:
    end = record.facts.get("num_steps") or (steps_of(record) or [0])[-1]
    moments = {"before": 0, "after": end}
    found = sorted(
        (moments[when] if when in moments else step_of(when), metrics[key], metrics.get(f"{key}_error", 0.0))
        for when, metrics in record.evaluations.items()
        if key in metrics
    )
    x, y = [point[0] for point in found], [point[1] for point in found]
    low, high = ([value + sign * 2 * error for _, value, error in found] for sign in (-1, 1))
    return Line(name, x, y, low, high, index)


def _phases(runs: Runs) -> Markup:
    names = dict.fromkeys(key for r in runs.values() for step in r.metrics for key in step if key.startswith("time/"))
    titles = [name.removeprefix("time/") for name in names]
    if not names:
        return Markup()
    if len(runs) == 1:
        (record,) = runs.values()
        lines = [
            Line(title, steps_of(record), [step.get(name) for step in record.metrics])
            for name, title in zip(names, titles, strict=True)
        ]
        return line_chart("Time by phase", lines, note="seconds per step", log="offered", points=_points(len(lines)))
    bars = [
        Bars(run, [fmean(values) if (values := record.series(name)) else None for name in names], index)
        for index, (run, record) in enumerate(runs.items())
    ]
    return bar_chart("Time by phase", titles, bars, y_name="seconds", note="mean seconds per step")
