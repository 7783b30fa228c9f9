"""A running training on the terminal: figures with their course, where the time goes, health, one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from reinforcepp.monitoring.progress import printable

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK = 24
NAMES, VALUES, NOTES = 7, 9, 24  # widths of columns
SAMPLE_LINES = 3
PHASES = {"rollout": "blue", "score": "magenta", "update": "green", "sync": "yellow"}
PHASE_NAMES = {"score": "scoring"}
HEALTH = {"error": "bold red", "warning": "yellow", "info": "cyan", None: "green"}


@dataclass(frozen=True)
class Sample:
    """One completion of the newest batch, with its reward."""

    prompt: str
    completion: str
    reward: float


@dataclass(frozen=True)
class Moment:
    """What there is to show after a step; ``history`` is oldest first, ``health`` a verdict and its severity."""

    title: str
    step: int
    num_steps: int
    left: str
    history: Sequence[Mapping[str, float]]
    kl_limit: float | None
    health: tuple[str, str | None]
    sample: Sample | None


def view(moment: Moment, width: int) -> RenderableType:
    """The panel, for a terminal of ``width`` columns."""
    now = moment.history[-1] if moment.history else {}
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, width=NAMES)
    table.add_column(justify="right", no_wrap=True, width=VALUES)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True, style="dim")
    room = width - 4 - NAMES - VALUES - 6  # borders and padding
    for *row, note in _figures(now, moment, min(SPARK, room)):
        table.add_row(*row, note if room >= SPARK + NOTES else "")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True, width=NAMES)
    facts.add_column(ratio=1)
    facts.add_row("time", _times(now))
    facts.add_row("health", Text(moment.health[0], HEALTH[moment.health[1]]))
    if moment.sample is not None:
        facts.add_row("sample", _sample(moment.sample))
    done = Bar(max(1, moment.num_steps), 0, moment.step, color="green")
    heading = Text(f"{moment.title}  ·  step {moment.step} of {moment.num_steps}  ·  {moment.left} left")
    return Panel(Group(done, table, facts), title=heading, title_align="left", border_style="dim")


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """The course of ``values`` in ``width`` characters at most, each the mean of a stretch; lowest to highest."""
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
    """``42 s``, ``3:05 min`` or ``2:10 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def trend(values: Sequence[float], spread: float) -> str:
    """Whether ``values`` go up or down: the last fifth against the one before, in units of ``spread``."""
    size = max(1, len(values) // 5)
    if len(values) < 2 * size or not spread:
        return " "
    change = sum(values[-size:]) / size - sum(values[-2 * size : -size]) / size
    return "▲" if change > 0.05 * spread else "▼" if change < -0.05 * spread else "▶"


def _figures(now: Mapping[str, float], moment: Moment, room: int) -> list[tuple[str, RenderableType, str, str]]:
    def course(name: str) -> list[float]:
        return [m[name] for m in moment.history if name in m]

    def number(name: str, form: str) -> str:
        return form.format(now[name]) if name in now else "-"

    rewards = course("reward")
    arrow = trend(rewards, now.get("reward_std", 0.0))
    colour = {"▲": "bold green", "▼": "bold red"}.get(arrow, "bold")
    limit = f"nats per token, limit {moment.kl_limit:g}" if moment.kl_limit else "nats per token"
    first = f"from {rewards[0]:+.3f}" if rewards else ""
    cut = now.get("completions/clipped_ratio", 0.0)
    return [
        ("reward", Text(f"{arrow} {number('reward', '{:+.3f}')}", colour), sparkline(rewards, room), first),
        ("KL", number("kl", "{:.4f}"), sparkline(course("kl"), room), limit),
        (
            "length",
            number("completions/mean_length", "{:.1f}"),
            sparkline(course("completions/mean_length"), room),
            "tokens" + (f", {cut:.0%} cut off" if cut else ""),
        ),
        ("entropy", number("entropy", "{:.4f}"), sparkline(course("entropy"), room), "nats per token"),
    ]


def _times(now: Mapping[str, float]) -> Text:
    """Tokens per second and the share of each phase, as a bar and in words."""
    total = now.get("step_time", 0.0)
    if not total:
        return Text("-")
    tokens = now.get("step_tokens", 0.0) / total
    text = Text(f"{tokens:,.0f} tokens/s  ") if tokens else Text()
    shares = {name: now.get(f"time/{name}", 0.0) / total for name in PHASES}
    for name, share in shares.items():
        text.append("█" * round(share * SPARK), PHASES[name])
    for name, share in shares.items():
        text.append(f"  {PHASE_NAMES.get(name, name)} {share:.0%}", PHASES[name])
    return text


def _sample(sample: Sample) -> RenderableType:
    def short(text: str, most: int) -> str:
        text = " ".join(printable(text).split())
        return text if len(text) <= most else text[: most - 1] + "…"

    answer = Text(short(sample.completion, 80 * SAMPLE_LINES) or "(empty)")
    answer.append(f"  ({sample.reward:+.2f})", "dim")
    return Group(Text(short(sample.prompt, 160), "dim"), answer)
