"""The comparison of estimators as one page that opens offline, and its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from reinforcepp.reports.html import page

COLORS = ("#1f5fa8", "#2a9d6f", "#d1812e", "#7b5ea7", "#c0395a")

STYLE = """
table { display: block; overflow-x: auto; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; }
"""


def write_page(comparison: Mapping[str, Any], path: Path) -> None:
    """Tables and pictures of ``comparison.json``."""
    settings = comparison["settings"]
    rewards = settings.get("rewards") or [settings["reward_model"]]
    sections = [
        f"<h1>Estimators compared on {escape(settings['data'])}</h1>",
        f"<p>{escape(verdict(comparison))}</p>",
        f"<p>Model {escape(settings['model'])}, reward {escape(', '.join(rewards))}; {settings['seeds']} seeds, "
        f"{settings['max_steps']} steps of {settings['batch_size'] * settings['num_generations']} completions, learning "
        f"rate {settings['learning_rate']:g}, KL coefficient {settings['kl_coef']:g}. Held-out prompts; ± is the 95 % "
        "interval over seeds. The target is nine tenths of the way from the start to the best final score.</p>",
        *(_by_estimator(comparison, columns) for columns in (OUTCOME, COST)),
        _picture(draw_frontier, comparison, "Score against KL to the reference, one line for each estimator"),
        _picture(draw_curves, comparison, "Score against training step, with the range over seeds"),
        _picture(draw_phases, comparison, "Seconds of a step by phase"),
    ]
    if comparison["sensitivity"]:
        sections.append("<h2>Sensitivity</h2><p>Final score with other learning rates and batch sizes, one seed.</p>")
        sections.append(_grid(comparison["sensitivity"]))
    path.write_text(page("Estimators compared", "\n".join(sections), STYLE), encoding="utf-8")


def verdict(comparison: Mapping[str, Any]) -> str:
    """One sentence: which estimator reached the best score, and which can't be told from it."""
    ranked = sorted(_items(comparison), key=lambda item: -_final(item[1])["mean"])
    best_name, best = ranked[0]
    floor = _final(best)["mean"] - _final(best)["interval"]
    close = [n for n, o in ranked[1:] if _final(o)["mean"] + _final(o)["interval"] >= floor]
    tied = f"; no difference from it is shown for {', '.join(close)}" if close else ", ahead of all others"
    return f"The best held-out {best['measure']} score, {_final(best)['mean']:.3f}, was {best_name}'s{tied}."


# --- tables ---------------------------------------------------------------------------------------------------------


def _items(comparison: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return list(comparison["estimators"].items())


def _final(own: Mapping[str, Any]) -> dict[str, float]:
    final: dict[str, float] = own["final"][own["measure"]]
    return final


def plus_minus(value: Mapping[str, float] | None, digits: int) -> str:
    """``0.913 ± 0.012``, or a dash where there is nothing."""
    return "-" if value is None else f"{value['mean']:.{digits}f} ± {value['interval']:.{digits}f}"


Columns = dict[str, Callable[[Mapping[str, Any]], str]]
OUTCOME: Columns = {
    "final score": lambda own: plus_minus(_final(own), 3),
    "worst seed": lambda own: f"{own['worst_seed']:.3f}",
    "reward": lambda own: plus_minus(own["final"]["reward"], 2),
    "KL, nats a token": lambda own: plus_minus(own["final"]["kl"], 3),
    "runs that diverged": lambda own: str(own["diverged"]),
}
COST: Columns = {
    "seconds to target": lambda own: plus_minus(own["to_target"]["seconds"], 0),
    "tokens to target": lambda own: plus_minus(own["to_target"]["tokens"], 0),
    "seconds a step": lambda own: plus_minus(own["step_seconds"], 2),
    "peak MiB": lambda own: plus_minus(own["peak_rss_mib"], 0),
}


def _by_estimator(comparison: Mapping[str, Any], columns: Columns) -> str:
    rows = [[name, *(column(own) for column in columns.values())] for name, own in _items(comparison)]
    return _table(["estimator", *columns], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(titles, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _grid(sensitivity: Mapping[str, Any]) -> str:
    cells = next(iter(sensitivity.values()))["cells"]
    places = [(cell["learning_rate"], cell["completions"]) for cell in cells]
    titles = ["estimator", *(f"{rate:.1e}, {size}" for rate, size in places), "worst", "deviation"]
    rows = []
    for name, own in sensitivity.items():
        finals = [f"{cell['final']:.2f}{'*' if cell['diverged'] else ''}" for cell in own["cells"]]
        rows.append([name, *finals, f"{own['worst']:.2f}", f"{own['spread']:.3f}"])
    return _table(titles, rows) + "<p>Columns: learning rate, completions a step. * diverged.</p>"


# --- pictures -------------------------------------------------------------------------------------------------------


def _picture(draw: Callable[[Any, Mapping[str, Any]], None], comparison: Mapping[str, Any], alt: str) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    draw(figure.subplots(), comparison)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<h2>{escape(alt.split(",")[0])}</h2><img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def _courses(comparison: Mapping[str, Any], name: str) -> list[list[dict[str, float]]]:
    """The evaluations of every seed of an estimator, step by step; runs that ended early are left out."""
    runs = [run["evaluations"] for run in comparison["runs"] if run["estimator"] == name]
    longest = max(map(len, runs))
    return [list(step) for step in zip(*(run for run in runs if len(run) == longest), strict=True)]


def draw_frontier(axes: Any, comparison: Mapping[str, Any]) -> None:
    """Mean score against mean KL, from the first evaluation to the last."""
    for (name, own), color in zip(_items(comparison), COLORS, strict=False):
        steps = _courses(comparison, name)
        kl = [fmean(e["kl"] for e in step) for step in steps]
        score = [fmean(e[own["measure"]] for e in step) for step in steps]
        axes.plot(kl, score, marker="o", markersize=4, color=color, label=name)
    axes.set(xlabel="KL to the reference, nats a token", ylabel=f"held-out {_items(comparison)[0][1]['measure']} score")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_curves(axes: Any, comparison: Mapping[str, Any]) -> None:
    """Mean score against the step; the band is the range over seeds."""
    for (name, own), color in zip(_items(comparison), COLORS, strict=False):
        steps = _courses(comparison, name)
        places = [step[0]["step"] for step in steps]
        scores = [[e[own["measure"]] for e in step] for step in steps]
        axes.plot(places, list(map(fmean, scores)), color=color, label=name)
        axes.fill_between(places, list(map(min, scores)), list(map(max, scores)), color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="step", ylabel=f"held-out {_items(comparison)[0][1]['measure']} score")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_phases(axes: Any, comparison: Mapping[str, Any]) -> None:
    """Where a step's time goes."""
    names = [name for name, _ in _items(comparison)]
    begin = [0.0] * len(names)
    for phase, color in zip(_items(comparison)[0][1]["phase_seconds"], COLORS, strict=False):
        seconds = [own["phase_seconds"][phase] for _, own in _items(comparison)]
        axes.barh(names, seconds, left=begin, color=color, label=phase)
        begin = [a + b for a, b in zip(begin, seconds, strict=True)]
    axes.set(xlabel="seconds a step")
    axes.invert_yaxis()
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=len(COLORS))
