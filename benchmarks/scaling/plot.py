"""The plot of benchmarks/scaling.py: predicted beside measured steps, projections, and the simulated pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLORS = ("#1f5fa8", "#d1812e", "#4a8f5c", "#9b4f96", "#7a7a7a", "#b03030")


def plot(result: dict[str, Any], path: Path) -> None:
    """Four panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (steps, projected), (throughput, load) = figure.subplots(2, 2)
    _steps(steps, result["step"])
    _projected(projected, result["projections"])
    _throughput(throughput, result["pool"]["rows"])
    _load(load, result["pool"]["rows"])
    for axes in (steps, projected, throughput, load):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _steps(axes: Any, step: dict[str, Any]) -> None:
    for (kind, title), marker in zip({"fitted": "fitted on", "checked": "held out"}.items(), "ox", strict=True):
        for phase, color in zip(("rollout", "scoring", "update"), COLORS, strict=False):
            rows = step[kind].values()
            points = [row["measured"][phase] for row in rows], [row["predicted"][phase] for row in rows]
            axes.scatter(*points, marker=marker, color=color, label=f"{phase}, {title}")
    limits = axes.get_xlim()[0] or 0.01, axes.get_xlim()[1]
    ends = [max(0.01, limits[0]), limits[1]]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.set(
        xscale="log", yscale="log", xlabel="measured seconds of a phase", ylabel="predicted", title="Steps on one core"
    )
    axes.legend(fontsize=7)


def _projected(axes: Any, projections: dict[str, Any]) -> None:
    for (name, one), color in zip(projections.items(), COLORS, strict=False):
        scales = one["scales"]
        if len(scales) > 1:
            devices = [scale["devices"] for scale in scales]
            axes.plot(devices, [scale["efficiency"] for scale in scales], marker="o", color=color, label=name)
    axes.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs or rollout workers", title="Projected, never checked on a GPU")
    axes.set_ylabel("speed-up of a step over that of devices")
    axes.legend(fontsize=7)


def _courses(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    courses: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        pieces = "1 piece" if row["pieces"] == 1 else f"{row['pieces']} pieces"
        courses.setdefault(f"{pieces} each, {row['failures_per_hour']:g} failures an hour each", []).append(row)
    return courses


def _throughput(axes: Any, rows: list[dict[str, Any]]) -> None:
    for (name, own), color in zip(_courses(rows).items(), COLORS, strict=True):
        workers = [row["workers"] for row in own]
        axes.plot(workers, [row["tokens_per_second"] for row in own], marker="o", color=color, label=name)
    first = rows[0]
    axes.plot(workers, [first["tokens_per_second"] * n for n in workers], color="black", linewidth=0.8, label="ideal")
    axes.set(
        xscale="log", yscale="log", xlabel="workers", ylabel="tokens a second", title="Simulated pool, real scheduler"
    )
    axes.legend(fontsize=7)


def _load(axes: Any, rows: list[dict[str, Any]]) -> None:
    for (name, own), color in zip(_courses(rows).items(), COLORS, strict=True):
        workers = [row["workers"] for row in own]
        axes.plot(workers, [row["scheduler_share_of_time"] for row in own], marker="o", color=color, label=name)
        if own[0]["failures_per_hour"] == 0:
            ray = [row["ray_share_of_time"] for row in own]
            axes.plot(
                workers, ray, marker="x", linestyle="--", color=color, label=f"Ray's own calls, {name.split(',')[0]}"
            )
    axes.set(
        xscale="log", yscale="log", xlabel="workers", ylabel="share of the rollout's time", title="Load of the driver"
    )
    axes.legend(fontsize=7)
