"""The training curve as an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PANELS = [
    ("reward", "reward", "mean score"),
    ("kl", "KL to the reference", "nats per token"),
    ("completions/mean_length", "length", "tokens per completion"),
]


def draw_curve(metrics: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Draw reward, KL and length against the step, side by side, as a PNG (or the format of the suffix of ``path``)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    figure.suptitle(title)
    metrics = [m for m in metrics if all(key in m for key, *_ in PANELS)]  # skips steps with non-finite rewards
    steps = [m["step"] for m in metrics]
    for axes, (key, name, unit) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        values = [m[key] for m in metrics]
        axes.plot(steps, values, color="#9db8d9", linewidth=1)
        axes.plot(steps, _smooth(values), color="#1f5fa8", linewidth=2)
        axes.set(title=name, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=min(0, *values) if key != "reward" else None)
    figure.savefig(path, dpi=110)


def _smooth(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Return the exponential moving average."""
    smooth: list[float] = []
    for value in values:
        smooth.append(weight * smooth[-1] + (1 - weight) * value if smooth else value)
    return smooth
