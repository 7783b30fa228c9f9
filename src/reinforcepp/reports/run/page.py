"""The run report: the data of its page, for one run or for several compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from reinforcepp.data import count
from reinforcepp.monitoring.doctor import Finding
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports import charts
from reinforcepp.reports.charts.palette import color_and_dash
from reinforcepp.reports.html import asset, macro, render
from reinforcepp.reports.numbers import number
from reinforcepp.reports.run import curves, summary
from reinforcepp.reports.run.episodes import FAILED_SHOWN, REASONS_SHOWN, read_failed, transcript
from reinforcepp.reports.run.samples import Group, Pair, Sample, choose_pairs, choose_samples
from reinforcepp.reports.run.settings import differing, reproduce, settings_of
from reinforcepp.run_dir import FAILED_EPISODES
from reinforcepp.runtime.redaction import HIDDEN
from reinforcepp.runtime.terminal import printable

PAIR_BYTES, SAMPLE_BYTES, FAILED_BYTES = 1_200_000, 800_000, 200_000  # of the page, for all runs together
EVENTS_SHOWN = 200
LONGEST_EVENT = 500
JUDGE = "builtin:judge"  # the judge that "auto" stands for
NAMED_FILES = 3
MASKED = "masked"

ORDERS = {
    "gain": "largest gain first",
    "loss": "largest loss first",
    "judge": "lowest judge score first",
}
# Labels of a reward model's metrics. Its own report shows the others.
CARD_METRICS = {
    "pairs": "held-out pairs",
    "accuracy": "accuracy",
    "longer_wins": "length-only baseline",
    "mean_margin": "mean margin",
    "calibration_error": "calibration error",
    "length_correlation": "correlation of score and length",
}
DOCTOR, RESPONSES, SAMPLES = ("findings", "Doctor"), ("responses", "Before and after"), ("samples", "Samples")
FAILED = ("failed", "Failed episodes")
DETAILS = [("settings", "Settings"), ("environment", "Environment and data"), ("again", "Reproduce the run")]


def report_page(
    runs: Mapping[str, RunRecord], samples: int, findings: Mapping[str, Sequence[Finding]] | None = None
) -> str:
    """Return the page of one run, or of several runs with overlaid curves.

    Args:
        runs: by the names to show.
        samples: completions to show of each group.
        findings: of the doctor, by the same names; None omits that section.
    """
    views = [
        _view(name, index, record, samples, 1 / len(runs), (findings or {}).get(name))
        for index, (name, record) in enumerate(runs.items())
    ]
    groups = {"curves": _curves(runs), "diagnostics": _diagnostics(runs), "speed": _speed(runs)}
    drawn = [
        (id, title)
        for id, title in (("curves", "Curves"), ("diagnostics", "Diagnostics"), ("speed", "Speed"))
        if any(groups[id].values())
    ]
    if len(views) == 1:
        listed = views[0]["sections"]
        first = [s for s in listed if s == DOCTOR]
        responses = [s for s in listed if s in (RESPONSES, SAMPLES, FAILED)]
        last = [s for s in listed if s not in (*first, *responses)]
        sections = [*first, *drawn[:1], *responses, *drawn[1:], *last]
    else:
        sections = [("metrics", "Metrics"), ("differences", "Settings that differ"), *drawn, ("runs", "Each run")]
    return render(
        "run.html",
        title=f"Run report: {views[0]['name']}" if len(views) == 1 else "Runs compared",
        style=charts.STYLE + asset("static/run.css"),
        scripts=(*charts.SCRIPTS, asset("static/fold.js"), asset("static/run.js")),
        runs=views,
        names=list(runs),
        sections=sections,
        charts=groups,
        metric_table=_metric_table(runs),
        differences=[[name, *values] for name, values in differing(runs)],
    )


def _view(
    name: str, index: int, record: RunRecord, samples: int, share: float, findings: Sequence[Finding] | None
) -> dict[str, Any]:
    """Return what the page shows of one run; ``share`` is its part of the page's size."""
    command, recipe = record.facts.get("command"), reproduce(record)
    failed = _failed(record, share)
    sections = [DOCTOR] if findings is not None else []
    sections += [
        RESPONSES,
        SAMPLES,
        *([FAILED] if failed else []),
        *([("events", "Events")] if record.events else []),
        *DETAILS,
    ]
    return {
        "name": name,
        "style": color_and_dash(index),
        "sections": sections,
        "origin": _origin(record),
        "verdict": summary.verdict(record),
        "metrics": summary.key_metrics(record),
        "findings": findings,
        "responses": _responses(record, share),
        "samples": _samples(record, samples, share),
        "failed": failed,
        "events": _events(record),
        "settings": settings_of(record),
        "environment": _environment(record),
        "again": {"command": command, "recipe": recipe, "hidden": HIDDEN in f"{command} {recipe}" and HIDDEN},
    }


def _origin(record: RunRecord) -> str:
    settings, rewards = record.settings, record.facts.get("rewards") or ()
    trained = f"{settings['model']} trained" if "model" in settings else "A model passed from Python, trained"
    named = settings.get("rewards") or filter(None, [settings.get("reward_model")])
    against = ", ".join(named) or ", ".join(str(reward.get("name")) for reward in rewards)
    parts = [f"{trained} with {settings.get('estimator', 'an unrecorded estimator')}"]
    parts += [f"on {settings['data']}"] if "data" in settings else []
    parts += [f"against {against}"] if against else []
    began = f" Started {record.facts['started'][:16].replace('T', ' ')}." if record.facts.get("started") else ""
    return f"{' '.join(parts)}. {summary.status(record)}{began}"


# --- charts -----------------------------------------------------------------------------------------------------------


def _curves(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    drawn = curves.outcome_charts(runs)
    if not drawn:
        return {"missing": "The log has no steps yet, so there are no curves."} | dict.fromkeys(
            ("controls", "before", "drawn", "after"), ""
        )
    gaps = sum(1 for record in runs.values() for step in record.metrics if "reward" not in step)
    before = f"Gaps are steps without an update ({gaps:,} in total)." if gaps else ""
    return {"missing": "", "controls": charts.controls(), "before": before, "drawn": drawn, "after": ""}


def _diagnostics(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    drawn, constant = curves.diagnostic_charts(runs)
    after = f"Constant at every step: {', '.join(constant)}." if constant else ""
    return {"missing": "", "controls": "", "before": "", "drawn": drawn, "after": after}


def _speed(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    return {"missing": "", "controls": "", "before": "", "drawn": curves.speed_charts(runs), "after": ""}


# --- responses --------------------------------------------------------------------------------------------------------


def _responses(record: RunRecord, share: float) -> dict[str, Any]:
    """Return the held-out responses before and after training, as many as fit into this run's part of the page."""
    pairs = choose_pairs(record)
    if pairs.missing:
        return {"missing": pairs.missing}
    show = macro("run_parts.html", "pair")
    shown = [show(_pair(pair, pairs.when)) for pair in pairs.pairs]
    by_change = sorted(range(len(shown)), key=lambda i: -abs(pairs.pairs[i].change))
    fitting = set(by_change[: len(_within((shown[i] for i in by_change), int(PAIR_BYTES * share)))])
    skipped = (
        f" The page shows {len(fitting)} of {len(shown)} prompts, those with the largest reward change; evaluations/ in the "
        "run's folder has all of them."
        if len(fitting) < len(shown)
        else ""
    )
    judged = any(None not in pair.judge for pair in pairs.pairs)
    moment = "after it" if pairs.when == "after" else f"at {pairs.when}"
    return {
        "missing": "",
        "introduction": f"Responses to {count(len(shown), 'held-out prompt')} before training and {moment}, sampled with the "
        f"same seeds.{skipped}",
        "charts": curves.held_out_charts(pairs),
        "orders": [(name, label) for name, label in ORDERS.items() if judged or name != "judge"],
        "pairs": [pair for i, pair in enumerate(shown) if i in fitting],
    }


def _pair(pair: Pair, when: str) -> dict[str, Any]:
    return {
        "prompt": pair.prompt,
        "gain": f"{pair.change:.6g}",
        "judge": f"{pair.judge[1] if pair.judge[1] is not None else 0.0:.6g}",
        "same": pair.same,
        "change": f"{pair.change:+.2f}" if None not in pair.rewards else "",
        "tone": "gain" if pair.change > 0 else "loss" if pair.change < 0 else "",
        "responses": [
            (title, _score(reward, judge), response, transcript(turns) if turns else None)
            for title, reward, judge, response, turns in zip(
                ("Before", when.capitalize()), pair.rewards, pair.judge, pair.responses, pair.turns, strict=True
            )
        ],
    }


def _score(reward: float | None, judge: float | None) -> str:
    parts = [f"reward {reward:+.2f}"] if reward is not None else []
    parts += [f"judge {number(judge)}"] if judge is not None else []
    return ", ".join(parts)


def _samples(record: RunRecord, per_group: int, share: float) -> dict[str, Any]:
    """Return completions of an early, a middle and the last step and the highest-reward ones, with reward against length."""
    samples = choose_samples(record, per_group)
    if samples.missing:
        return {"missing": samples.missing}
    budget = int(SAMPLE_BYTES * share) // len(samples.groups)
    show = macro("run_parts.html", "sample")
    untrained = bool(record.settings.get("mask_truncated_completions"))

    def group(each: Group) -> dict[str, Any]:
        shown = (show(_sample(one, untrained and one.finish_reason == "length")) for one in each.samples)
        return {"title": each.title, "samples": _within(shown, budget)}

    *steps, highest = map(group, samples.groups)
    return {
        "missing": "",
        "damaged": _damaged(samples.damaged) if samples.damaged else "",
        "episodes": any(one.turns for each in samples.groups for one in each.samples),
        "steps": steps,
        "highest": highest,
        "charts": curves.length_charts(samples),
    }


def _sample(sample: Sample, untrained: bool) -> dict[str, Any]:
    metrics = [f"reward {sample.reward:+.2f}"]
    metrics += [f"{name} {value:+.2f}" for name, value in sample.rewards.items()]
    metrics += [f"step {sample.step}"]
    metrics += [count(sample.length, "token")] if sample.length is not None else []
    metrics += [f"KL {sample.kl:.3f}"] if sample.kl is not None else []
    metrics += ["truncated"] if sample.finish_reason == "length" else []
    metrics += [f"generated {sample.seen} times"] if sample.seen > 1 else []
    episode = transcript(sample.turns, MASKED if untrained else "trained", MASKED) if sample.turns else None
    return {"metrics": metrics, "prompt": sample.prompt, "completion": sample.completion, "episode": episode}


def _failed(record: RunRecord, share: float) -> dict[str, Any] | None:
    """Return the failed episodes: their number, their reasons, and some of them; None if there are none."""
    failed = read_failed(record.folder)
    if failed is None:
        return None
    show = macro("run_parts.html", "failed_episode")
    shown = (
        show({"reason": reason, "prompt": prompt, "episode": transcript(turns) if turns else None})
        for reason, prompt, turns in failed.shown
    )
    more = len(failed.reasons) - REASONS_SHOWN
    return {
        "introduction": f"{count(failed.number, 'episode')} of training and evaluation failed and got no reward. "
        f"{FAILED_EPISODES} in the run's folder has all of them; the page shows up to {FAILED_SHOWN}.",
        "damaged": f"Skipped {count(failed.damaged, 'line')} of {FAILED_EPISODES} because of damage."
        if failed.damaged
        else "",
        "reasons": [[reason, f"{number:,}"] for reason, number in failed.reasons[:REASONS_SHOWN]],
        "more": f"{count(more, 'more reason')}." if more > 0 else "",
        "shown": _within(shown, int(FAILED_BYTES * share)),
    }


def _damaged(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
    return f"Skipped because they can't be read: {', '.join(names[:NAMED_FILES])}{more}."


def _within(parts: Iterable[Markup], budget: int) -> list[Markup]:
    """Return the first ``parts`` that fit into ``budget`` bytes."""
    kept = []
    for part in parts:
        budget -= len(part.encode())
        if budget < 0:
            break
        kept.append(part)
    return kept


# --- details ----------------------------------------------------------------------------------------------------------


def _events(record: RunRecord) -> dict[str, Any]:
    more = len(record.events) - EVENTS_SHOWN
    shown = [
        (str(event.get("time", ""))[:19].replace("T", " "), str(event.get("event", ""))[:LONGEST_EVENT])
        for event in record.events[-EVENTS_SHOWN:]
    ]
    return {"earlier": f"{more:,}" if more > 0 else "", "shown": shown}


def _environment(record: RunRecord) -> dict[str, Any]:
    inputs = record.facts.get("inputs") or {}
    counted = [
        (title, f"{record.facts[key]:,}")
        for key, title in (("prompts", "training prompts"), ("heldout_prompts", "held-out prompts"))
        if key in record.facts
    ]
    judged = record.settings.get("judge") or record.facts.get("judge")
    judge = [("judge", JUDGE if judged == "auto" else judged)] if record.facts.get("judge") else []
    sources = [
        (name, f"{record.settings.get(name, 'passed from Python')}, fingerprint {inputs[name]}") for name in inputs
    ]
    return {
        "packages": [
            *(record.facts.get("environment") or {}).items(),
            *([("precision", record.facts["precision"])] if "precision" in record.facts else []),
        ],
        "inputs": [*sources, *counted, *judge],
        "reward_models": [_reward_model(card) for card in record.reward_cards],
    }


def _reward_model(card: Mapping[str, Any]) -> list[tuple[str, Any]]:
    metrics = card.get("figures") or {}
    rows = [
        ("base model", card.get("base_model")),
        ("data", card.get("data")),
        ("training pairs", card.get("train_pairs")),
        *((label, number(metrics[name])) for name, label in CARD_METRICS.items() if name in metrics),
        ("SHA-256 of the data", card.get("data_sha256") or None),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _metric_table(runs: Mapping[str, RunRecord]) -> dict[str, Any]:
    found = {name: {metric.name: metric for metric in summary.key_metrics(record)} for name, record in runs.items()}
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    notes = {name: {metrics[name].note for metrics in found.values() if name in metrics} for name in names}
    shared = {name: values.pop() for name, values in notes.items() if len(values) == 1}  # once, in the header
    swatch = macro("macros.html", "swatch")
    return {
        "titles": ["run", *(f"{name}, {shared[name]}" if shared.get(name) else name for name in names)],
        "rows": [
            [
                swatch(color_and_dash(index)) + Markup(" {}").format(printable(run)),
                *(_cell(metrics.get(name), name not in shared) for name in names),
            ]
            for index, (run, metrics) in enumerate(found.items())
        ],
    }


def _cell(metric: summary.Metric | None, with_note: bool) -> str:
    if metric is None:
        return "-"
    note = Markup('<span class="quiet">{}</span>').format(metric.note) if with_note else ""
    return Markup("<b>{}</b>").format(metric.value) + note
