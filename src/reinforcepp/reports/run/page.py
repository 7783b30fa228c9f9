"""The report as one page that opens offline: what became of the run, why, what it said, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from reinforcepp.monitoring.doctor import Finding
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports import charts
from reinforcepp.reports.charts.palette import look
from reinforcepp.reports.charts.words import number
from reinforcepp.reports.html import page
from reinforcepp.reports.run import curves, summary
from reinforcepp.reports.run.answers import pairs_html, samples_html
from reinforcepp.reports.run.html import copyable, facts, missing, section, table, text
from reinforcepp.reports.run.samples import choose_pairs, choose_samples
from reinforcepp.reports.run.settings import Setting, differing, recipe, settings_of

EVENTS_SHOWN = 200
LONGEST_EVENT = 500
JUDGE = "builtin:judge"  # what auto means, where there is one
# A reward model's figures in words; others are left to its own report.
CARD_FIGURES = {
    "pairs": "held-out pairs",
    "accuracy": "accuracy on them",
    "longer_wins": "accuracy of: the longer answer wins",
    "mean_margin": "mean margin",
    "calibration_error": "calibration error",
    "length_correlation": "correlation of score and length",
}

_FOLDER = Path(__file__).parent


def report_page(
    runs: Mapping[str, RunRecord], samples: int, findings: Mapping[str, Sequence[Finding]] | None = None
) -> str:
    """The page of one run, or of several laid over each other.

    Args:
        runs: by the names under which they are shown.
        samples: completions to show of each moment.
        findings: by the same names, what a check of the runs has found; None for no such part of the page.
    """
    if len(runs) == 1:
        ((name, record),) = runs.items()
        title, parts = f"Run report: {name}", _of_one(name, record, samples, (findings or {}).get(name))
    else:
        title, parts = "Runs compared", _of_several(runs, samples, findings)
    style = charts.STYLE + (_FOLDER / "report.css").read_text(encoding="utf-8")
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    return page(title, "".join(parts), style, (*charts.SCRIPTS, script))


# --- one run ----------------------------------------------------------------------------------------------------------


def _of_one(name: str, record: RunRecord, samples: int, findings: Sequence[Finding] | None) -> list[str]:
    verdict = summary.verdict(record)
    named = {name: record}
    parts = [
        ("findings", "What the doctor says", _findings(findings) if findings is not None else ""),
        ("curves", "Curves", _curves(named)),
        ("answers", "Before and after", pairs_html(choose_pairs(record), 1)),
        ("samples", "Samples", samples_html(choose_samples(record, samples), 1)),
        ("diagnostics", "Diagnostics", _diagnostics(named)),
        ("speed", "Speed", _charts(curves.speed_charts(named))),
        ("events", "Events", _events(record)),
        ("settings", "Settings", _settings(record)),
        ("environment", "Environment and data", _environment(record)),
        ("again", "How to reproduce", _again(record)),
    ]
    return [
        f'<header><p class="kicker">Run report</p><h1>{text(name)}</h1><p class="quiet">{_origin(record)}</p>'
        f'<p class="verdict {verdict.tone}">{text(verdict.text)}</p></header>',
        _contents([(key, title) for key, title, part in parts if part]),
        f"<main>{_cards(summary.figures(record))}{''.join(section(*part) for part in parts if part[2])}</main>",
    ]


def _origin(record: RunRecord) -> str:
    settings, rewards = record.settings, record.facts.get("rewards") or ()
    trained = f"{settings['model']} trained" if "model" in settings else "A model that was passed in, trained"
    named = settings.get("rewards") or filter(None, [settings.get("reward_model")])
    against = ", ".join(named) or ", ".join(str(reward.get("name")) for reward in rewards)
    parts = [f"{trained} with {settings.get('estimator', 'an estimator that it does not tell')}"]
    parts += [f"on {settings['data']}"] if "data" in settings else []
    parts += [f"against {against}"] if against else []
    began = f" Started {record.facts['started'][:16].replace('T', ' ')}." if record.facts.get("started") else ""
    return text(f"{' '.join(parts)}. {summary.status(record)}{began}")


def _cards(figures: Sequence[summary.Figure]) -> str:
    cards = "".join(
        f'<div class="card {figure.tone}"><dt>{text(figure.name)}</dt><dd><b>{text(figure.value)}</b>'
        f"<span>{text(figure.note)}</span></dd></div>"
        for figure in figures
    )
    return f'<dl class="cards">{cards}</dl>'


def _contents(parts: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{text(title)}</a>' for name, title in parts)
    return f'<nav aria-label="Contents">{links}</nav>'


def _curves(runs: Mapping[str, RunRecord]) -> str:
    drawn = curves.outcome_charts(runs)
    if not drawn:
        return missing("The log holds no steps yet, so there are no curves.")
    skipped = sum(1 for record in runs.values() for step in record.metrics if "reward" not in step)
    told = f'<p class="quiet">Gaps are steps without an update; there are {skipped:,}.</p>' if skipped else ""
    return f"{charts.controls()}{told}{_charts(drawn)}"


def _diagnostics(runs: Mapping[str, RunRecord]) -> str:
    drawn, constant = curves.diagnostic_charts(runs)
    told = f'<p class="quiet">The same at every step: {text(", ".join(constant))}.</p>' if constant else ""
    return _charts(drawn) + told


def _charts(drawn: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="quiet">The doctor found nothing wrong.</p>'
    items = "".join(
        f'<li class="finding {text(found.severity)}"><h3><span class="badge">{text(found.severity)}</span> '
        f'{text(found.title)}</h3><dl class="facts">'
        + "".join(
            f"<div><dt>{label}</dt><dd>{text(value)}</dd></div>"
            for label, value in (("Evidence", found.evidence), ("Cause", found.cause), ("Cure", found.cure))
            if value
        )
        + "</dl></li>"
        for found in findings
    )
    return f'<ul class="findings">{items}</ul>'


def _events(record: RunRecord) -> str:
    if not record.events:
        return ""
    items = "".join(
        f"<li><time>{text(str(event.get('time', ''))[:19].replace('T', ' '))}</time> "
        f"{text(str(event.get('event', ''))[:LONGEST_EVENT])}</li>"
        for event in record.events[-EVENTS_SHOWN:]
    )
    more = len(record.events) - EVENTS_SHOWN
    earlier = f'<p class="quiet">{more:,} earlier ones are in events.jsonl.</p>' if more > 0 else ""
    return f'<p class="quiet">What was out of the ordinary.</p>{earlier}<ol class="events">{items}</ol>'


def _settings(record: RunRecord) -> str:
    settings = settings_of(record)
    if not settings:
        return missing("The run noted no settings: it is from an older version.")
    known = any(setting.default is not None for setting in settings)
    changed = [setting for setting in settings if setting.differs]
    rows = table(("setting", "value", "default"), map(_row, changed), "Settings that differ from the defaults")
    some = rows if changed else '<p class="quiet">All are the defaults.</p>'
    unknown = missing("This version knows no defaults for the kind of these settings, so they aren't compared.")
    everything = table(("setting", "value", "default"), map(_row, settings), "All settings")
    return (
        f'<p class="quiet">{len(changed)} of {len(settings)} differ from the defaults.</p>{some}' if known else unknown
    ) + f"<details{'' if known else ' open'}><summary>All {len(settings)} settings</summary>{everything}</details>"


def _row(setting: Setting) -> list[str]:
    value = f"<b>{text(setting.value)}</b>" if setting.differs else text(setting.value)
    return [text(setting.name), value, text(setting.default if setting.default is not None else "-")]


def _environment(record: RunRecord) -> str:
    where = record.facts.get("environment") or {}
    parts = [facts(where.items()) if where else missing("The run noted no environment: it is from an older version.")]
    inputs = record.facts.get("inputs") or {}
    counted = [
        (title, f"{record.facts[key]:,}")
        for key, title in (("prompts", "training prompts"), ("heldout_prompts", "held-out prompts"))
        if key in record.facts
    ]
    judged = record.settings.get("judge") or record.facts.get("judge")
    judge = [("judge", JUDGE if judged == "auto" else judged)] if record.facts.get("judge") else []
    sources = [(name, f"{record.settings.get(name, 'passed in')}, fingerprint {inputs[name]}") for name in inputs]
    parts.append("<h3>What it started from</h3>")
    known = [*sources, *counted, *judge]
    parts.append(facts(known) if known else missing("The run noted no fingerprints: it is from an older version."))
    for card in record.reward_cards:
        figures = card.get("figures") or {}
        parts.append("<h3>Reward model</h3>")
        origin = [
            ("made from", card.get("base_model")),
            ("on", card.get("data")),
            ("training pairs", card.get("train_pairs")),
        ]
        told = [(label, number(figures[name])) for name, label in CARD_FIGURES.items() if name in figures]
        digest = [("SHA-256 of the data", card["data_sha256"])] if card.get("data_sha256") else []
        parts.append(facts([*((name, value) for name, value in origin if value is not None), *told, *digest]))
    return "".join(parts)


def _again(record: RunRecord) -> str:
    parts = []
    if record.facts.get("command"):
        parts.append(
            f"<h3>It was started with</h3>{copyable('The command it was started with', record.facts['command'])}"
        )
    again = recipe(record)
    if again is not None:
        parts.append("<h3>The same training, from its settings</h3><p>Save this as run.yaml,</p>")
        parts.append(copyable("run.yaml", again.yaml) + "<p>and then:</p>" + copyable("The command", again.command))
        parts.append(
            '<p class="quiet">With the same versions on a CPU in float32 it gives the same weights and the same log, byte '
            "for byte; on a GPU they agree to rounding.</p>"
        )
    elif record.settings:
        parts.append(
            missing(
                "It was started from Python, with the settings above as ReinforceConfig, so there is no command for it."
            )
        )
    return "".join(parts) or missing("The run noted neither a command nor settings: it is from an older version.")


# --- several runs -----------------------------------------------------------------------------------------------------


def _of_several(
    runs: Mapping[str, RunRecord], samples: int, findings: Mapping[str, Sequence[Finding]] | None
) -> list[str]:
    verdicts = "".join(
        f'<li class="verdict {(verdict := summary.verdict(record)).tone}">{_swatch(place)} <b>{text(name)}</b> '
        f'{text(verdict.text)}<span class="quiet">{_origin(record)}</span></li>'
        for place, (name, record) in enumerate(runs.items())
    )
    different = differing(runs)
    told = (
        table(
            ["setting", *runs], ([text(name), *map(text, values)] for name, values in different), "Differing settings"
        )
        if different
        else '<p class="quiet">None: the runs differ in nothing that they note.</p>'
    )
    details = "".join(
        f'<details class="run"><summary>{_swatch(place)} {text(name)}</summary>'
        f"{_details(record, samples, 1 / len(runs), (findings or {}).get(name))}</details>"
        for place, (name, record) in enumerate(runs.items())
    )
    parts = [
        ("figures", "Figures", _figure_table(runs)),
        ("differences", "Settings that differ", told),
        ("curves", "Curves", _curves(runs)),
        ("diagnostics", "Diagnostics", _diagnostics(runs)),
        ("speed", "Speed", _charts(curves.speed_charts(runs))),
        ("runs", "Each run", details),
    ]
    return [
        f'<header><p class="kicker">Run report</p><h1>{len(runs)} runs compared</h1>'
        f'<ul class="verdicts">{verdicts}</ul></header>',
        _contents([(key, title) for key, title, part in parts if part]),
        f"<main>{''.join(section(*part) for part in parts if part[2])}</main>",
    ]


def _details(record: RunRecord, samples: int, share: float, findings: Sequence[Finding] | None) -> str:
    parts = [
        ("What the doctor says", _findings(findings) if findings is not None else ""),
        ("Before and after", pairs_html(choose_pairs(record), share)),
        ("Samples", samples_html(choose_samples(record, samples), share)),
        ("Events", _events(record)),
        ("Settings", _settings(record)),
        ("Environment and data", _environment(record)),
        ("How to reproduce", _again(record)),
    ]
    return "".join(f"<h3>{title}</h3>{part}" for title, part in parts if part)


def _figure_table(runs: Mapping[str, RunRecord]) -> str:
    found = {name: {figure.name: figure for figure in summary.figures(record)} for name, record in runs.items()}
    names = list(dict.fromkeys(name for own in found.values() for name in own))
    notes = {name: {own[name].note for own in found.values() if name in own} for name in names}
    shared = {name: own.pop() for name, own in notes.items() if len(own) == 1}  # said once, above
    titles = [f"{name}, {shared[name]}" if shared.get(name) else name for name in names]
    rows = [
        [f"{_swatch(place)} {text(run)}", *(_cell(own.get(name), name not in shared) for name in names)]
        for place, (run, own) in enumerate(found.items())
    ]
    return table(["run", *titles], rows, "Figures of each run")


def _cell(figure: summary.Figure | None, noted: bool) -> str:
    if figure is None:
        return "-"
    return f"<b>{text(figure.value)}</b>" + (f'<span class="quiet">{text(figure.note)}</span>' if noted else "")


def _swatch(place: int) -> str:
    color, dash = look(place)
    return f'<span class="swatch dash-{dash}" style="--own:var(--series-{color})"></span>'
