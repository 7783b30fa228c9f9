"""The comparison of estimators as one page that opens offline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from reinforcepp.files import whole_file
from reinforcepp.reports import charts
from reinforcepp.reports.html import asset, render

Comparison = Mapping[str, Any]
"""The contents of ``comparison.json``."""
Columns = dict[str, Callable[[Mapping[str, Any]], str]]


def write_page(comparison: Comparison, path: Path) -> None:
    """Write tables and charts of ``comparison`` to ``path``."""
    settings = comparison["settings"]
    text = render(
        "estimators.html",
        title="Estimators compared",
        style=charts.STYLE + asset("static/estimators.css"),
        scripts=charts.SCRIPTS,
        heading=f"Estimators compared on {settings['data']}",
        verdict=verdict(comparison),
        settings=settings,
        rewards=settings.get("rewards") or [settings["reward_model"]],
        outcome=_by_estimator(comparison, OUTCOME),
        cost=_by_estimator(comparison, COST),
        controls=charts.controls(0),
        drawn=[_score_by_step(comparison), _score_by_kl(comparison), _phases(comparison)],
        sensitivity=_sensitivity(comparison["sensitivity"]) if comparison["sensitivity"] else None,
    )
    with whole_file(path) as file:
        file.write(text)


def verdict(comparison: Comparison) -> str:
    """Return one sentence: the estimator with the best score, and those not significantly different from it."""
    ranked = sorted(_items(comparison), key=lambda item: -_final(item[1])["mean"])
    best_name, best = ranked[0]
    floor = _final(best)["mean"] - _final(best)["interval"]
    close = [n for n, metrics in ranked[1:] if _final(metrics)["mean"] + _final(metrics)["interval"] >= floor]
    others = f"not significantly better than {', '.join(close)}" if close else "significantly better than all others"
    return f"{best_name} has the best held-out {best['measure']} score, {_final(best)['mean']:.3f}, {others}."


# --- tables ---------------------------------------------------------------------------------------------------------


def _items(comparison: Comparison) -> list[tuple[str, Any]]:
    return list(comparison["estimators"].items())


def _final(metrics: Mapping[str, Any]) -> dict[str, float]:
    final: dict[str, float] = metrics["final"][metrics["measure"]]
    return final


def plus_minus(value: Mapping[str, float] | None, digits: int) -> str:
    """Return ``0.913 ± 0.012``, or a dash for None."""
    return "-" if value is None else f"{value['mean']:.{digits}f} ± {value['interval']:.{digits}f}"


OUTCOME: Columns = {
    "final score": lambda metrics: plus_minus(_final(metrics), 3),
    "worst seed": lambda metrics: f"{metrics['worst_seed']:.3f}",
    "reward": lambda metrics: plus_minus(metrics["final"]["reward"], 2),
    "KL (nats/token)": lambda metrics: plus_minus(metrics["final"]["kl"], 3),
    "diverged runs": lambda metrics: str(metrics["diverged"]),
}
COST: Columns = {
    "seconds to target": lambda metrics: plus_minus(metrics["to_target"]["seconds"], 0),
    "tokens to target": lambda metrics: plus_minus(metrics["to_target"]["tokens"], 0),
    "seconds/step": lambda metrics: plus_minus(metrics["step_seconds"], 2),
    "peak memory (MiB)": lambda metrics: plus_minus(metrics["peak_rss_mib"], 0),
}


def _by_estimator(comparison: Comparison, columns: Columns) -> dict[str, Any]:
    rows = [[name, *(column(metrics) for column in columns.values())] for name, metrics in _items(comparison)]
    return {"titles": ["estimator", *columns], "rows": rows}


def _sensitivity(sensitivity: Mapping[str, Any]) -> dict[str, Any]:
    cells = next(iter(sensitivity.values()))["cells"]
    titles = [f"{cell['learning_rate']:.1e}, {cell['completions']}" for cell in cells]
    rows = []
    for name, metrics in sensitivity.items():
        finals = [f"{cell['final']:.2f}{'*' if cell['diverged'] else ''}" for cell in metrics["cells"]]
        rows.append([name, *finals, f"{metrics['worst']:.2f}", f"{metrics['spread']:.3f}"])
    return {"titles": ["estimator", *titles, "worst", "deviation"], "rows": rows}


# --- charts ---------------------------------------------------------------------------------------------------------


def evaluations_by_step(comparison: Comparison, name: str) -> list[list[dict[str, float]]]:
    """Return the evaluations of all seeds of an estimator, step by step, without runs that ended early."""
    runs: Sequence[list[dict[str, float]]] = [
        run["evaluations"] for run in comparison["runs"] if run["estimator"] == name
    ]
    longest = max(map(len, runs))
    return [list(step) for step in zip(*(run for run in runs if len(run) == longest), strict=True)]


def _score_by_step(comparison: Comparison) -> Markup:
    lines = []
    for name, metrics in _items(comparison):
        steps = evaluations_by_step(comparison, name)
        scores = [[evaluation[metrics["measure"]] for evaluation in step] for step in steps]
        x = [step[0]["step"] for step in steps]
        lines.append(charts.Line(name, x, [*map(fmean, scores)], [*map(min, scores)], [*map(max, scores)]))
    return charts.line_chart("Held-out score", lines, note="mean over seeds; band: lowest and highest seed")


def _score_by_kl(comparison: Comparison) -> Markup:
    clouds = []
    for name, metrics in _items(comparison):
        steps = evaluations_by_step(comparison, name)
        kl = [fmean(evaluation["kl"] for evaluation in step) for step in steps]
        score = [fmean(evaluation[metrics["measure"]] for evaluation in step) for step in steps]
        clouds.append(charts.Points(name, kl, score, [f"step {step[0]['step']:g}" for step in steps]))
    return charts.scatter_chart(
        "Held-out score against KL",
        clouds,
        x_name="KL to the reference policy",
        y_name="score",
        note="means over seeds, from the first to the last evaluation; KL in nats per token",
        connected=True,
    )


def _phases(comparison: Comparison) -> Markup:
    names = [name for name, _ in _items(comparison)]
    phases = list(_items(comparison)[0][1]["phase_seconds"])
    bars = [
        charts.Bars(phase, [metrics["phase_seconds"][phase] for _, metrics in _items(comparison)]) for phase in phases
    ]
    return charts.bar_chart("Time by phase", names, bars, y_name="seconds", note="mean seconds per step")
