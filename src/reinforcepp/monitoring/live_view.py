"""Live view of a training on the terminal: metrics with sparklines, time by phase, health, and one sample."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from reinforcepp.monitoring.turns import LABELS, one_line, turn_lines
from reinforcepp.types import Conversation

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 24
NAME_WIDTH, VALUE_WIDTH, NOTE_WIDTH = 7, 9, 24
SAMPLE_LINES = 3
PHASES = {"rollout": "blue", "score": "magenta", "update": "green", "sync": "yellow"}
PHASE_NAMES = {"score": "scoring"}
HEALTH = {"error": "bold red", "warning": "yellow", "info": "cyan", None: "green"}


@dataclass(frozen=True)
class Sample:
    """One completion of the newest batch, with its reward."""

    prompt: Conversation
    completion: str
    reward: float


@dataclass(frozen=True)
class Snapshot:
    """The state of a training after a step; ``history`` is oldest first, ``health`` is a verdict and its severity."""

    title: str
    step: int
    num_steps: int
    left: str
    history: Sequence[Mapping[str, float]]
    kl_limit: float | None
    health: tuple[str, str | None]
    sample: Sample | None


def view(snapshot: Snapshot, width: int) -> RenderableType:
    """Return the panel for a terminal of ``width`` columns."""
    now = snapshot.history[-1] if snapshot.history else {}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, width=NAME_WIDTH)
    table.add_column(justify="right", no_wrap=True, width=VALUE_WIDTH)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, style="dim")
    room = width - 4 - NAME_WIDTH - VALUE_WIDTH - 6  # borders and padding
    for *row, note in _metrics(now, snapshot, min(SPARK_WIDTH, room)):
        table.add_row(*row, note if room >= SPARK_WIDTH + NOTE_WIDTH else "")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, width=NAME_WIDTH)
    facts.add_column(ratio=1)
    facts.add_row("time", _times(now))
    if judged := judge_counts(now):
        facts.add_row("judges", Text(judged, "dim"))
    facts.add_row("health", Text(snapshot.health[0], HEALTH[snapshot.health[1]]))
    if snapshot.sample is not None:
        facts.add_row("sample", _sample(snapshot.sample))
    done = Bar(max(1, snapshot.num_steps), 0, snapshot.step, color="green")
    heading = Text(f"{snapshot.title}  ·  step {snapshot.step} of {snapshot.num_steps}  ·  {snapshot.left} left")
    return Panel(Group(done, table, facts), title=heading, title_align="left", border_style="dim")


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Return ``values`` as up to ``width`` blocks, each the mean of a stretch, scaled from lowest to highest."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """Return ``42 s``, ``3:05 min`` or ``2:10 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def judge_counts(metrics: Mapping[str, float]) -> str:
    """Return the sums of the metrics ``judges/NAME/COUNT``, as in "12 requests, 4 from the cache"; "" without judges."""
    sums = defaultdict[str, float](float)
    for name, value in metrics.items():
        if name.startswith("judges/"):
            sums[name.rpartition("/")[2]] += value
    texts = [f"{sums['requests']:.0f} requests, {sums['cache_hits']:.0f} from the cache"] if sums else []
    texts += [f"{sums['unscored']:.0f} without a verdict"] if sums["unscored"] else []
    texts += [f"${sums['dollars']:.4f}"] if "dollars" in sums else []
    return ", ".join(texts)


def trend_arrow(values: Sequence[float], spread: float) -> str:
    """Return an arrow for the change from the fourth to the last fifth of ``values``, in units of ``spread``."""
    size = max(1, len(values) // 5)
    if len(values) < 2 * size or not spread:
        return " "
    change = sum(values[-size:]) / size - sum(values[-2 * size : -size]) / size
    return "▲" if change > 0.05 * spread else "▼" if change < -0.05 * spread else "▶"


def _metrics(now: Mapping[str, float], snapshot: Snapshot, room: int) -> list[tuple[str, RenderableType, str, str]]:
    def series(name: str) -> list[float]:
        return [m[name] for m in snapshot.history if name in m]

    def number(name: str, form: str) -> str:
        return form.format(now[name]) if name in now else "-"

    rewards = series("reward")
    arrow = trend_arrow(rewards, now.get("reward_std", 0.0))
    color = {"▲": "bold green", "▼": "bold red"}.get(arrow, "bold")
    limit = f"nats per token, limit {snapshot.kl_limit:g}" if snapshot.kl_limit else "nats per token"
    first = f"from {rewards[0]:+.3f}" if rewards else ""
    truncated = now.get("completions/clipped_ratio", 0.0)
    episodes = []
    if "episodes/mean_turns" in now:
        failed = now.get("episodes/failed", 0.0)
        note = "per episode" + (f", {failed:.0f} failed" if failed else "")
        turns = series("episodes/mean_turns")
        episodes = [("turns", number("episodes/mean_turns", "{:.2f}"), sparkline(turns, room), note)]
    return [
        ("reward", Text(f"{arrow} {number('reward', '{:+.3f}')}", color), sparkline(rewards, room), first),
        ("KL", number("kl", "{:.4f}"), sparkline(series("kl"), room), limit),
        (
            "length",
            number("completions/mean_length", "{:.1f}"),
            sparkline(series("completions/mean_length"), room),
            "tokens" + (f", {truncated:.0%} truncated" if truncated else ""),
        ),
        ("entropy", number("entropy", "{:.4f}"), sparkline(series("entropy"), room), "nats per token"),
        *episodes,
    ]


def _times(now: Mapping[str, float]) -> Text:
    """Return tokens per second and the share of each phase, as a bar and as numbers."""
    total = now.get("step_time", 0.0)
    if not total:
        return Text("-")
    tokens = now.get("step_tokens", 0.0) / total
    text = Text(f"{tokens:,.0f} tokens/s  ") if tokens else Text()
    shares = {name: now.get(f"time/{name}", 0.0) / total for name in PHASES}
    for name, share in shares.items():
        text.append("█" * round(share * SPARK_WIDTH), PHASES[name])
    for name, share in shares.items():
        text.append(f"  {PHASE_NAMES.get(name, name)} {share:.0%}", PHASES[name])
    return text


def _sample(sample: Sample) -> RenderableType:
    lines = [Text(line, "dim") for line in turn_lines(sample.prompt)]
    completion = Text("" if isinstance(sample.prompt, str) else f"{LABELS['assistant']}: ", "dim")
    completion.append(one_line(sample.completion, 80 * SAMPLE_LINES) or "(empty)", "not dim")
    completion.append(f"  ({sample.reward:+.2f})")
    return Group(*lines, completion)
