"""The verdict on a run in one or two sentences, and its key metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from reinforcepp.monitoring.metric_delta import Change, Outcome, change_of
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.run.samples import latest

Tone = Literal["good", "bad", "warn", "plain"]
TONES: Mapping[Outcome, Tone] = {"improved": "good", "regressed": "bad", "inconclusive": "warn"}
TENTH = 10  # without held-out prompts, the first and the last tenth of the steps are compared


@dataclass(frozen=True)
class Verdict:
    """The text of the verdict, which starts with its one-word outcome, and its color."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Metric:
    """A key metric: name, formatted value, a note on it, and its color."""

    name: str
    value: str
    note: str = ""
    tone: Tone = "plain"


def verdict(record: RunRecord) -> Verdict:
    """Return whether the held-out responses improved, by the training reward and by a judge that isn't trained on."""
    when = latest(record.evaluations)
    before = record.evaluations.get("before")
    if before is None or when is None:
        return _without_heldout(record, before is not None)
    after = record.evaluations[when]
    reward, judge = change_of("reward", before, after), change_of("judge", before, after)
    aside = _aside(before, after)
    if reward is None:
        return Verdict(f"Inconclusive: the evaluations of this run have no reward.{aside}", "plain")
    change = f"on {_heldout(record)} {_moment(record, when)}, the reward {_went(reward)}"
    if judge is None:
        return _by_reward(change, reward.outcome, aside)
    turn = _turn(record.evaluations, when) if reward.outcome == "improved" and judge.outcome != "regressed" else None
    if turn is not None:
        since, fall = turn
        return Verdict(
            f"Reward hacking since {since}: {change}, but since then the judge's score, which training doesn't use, has fallen "
            f"from {fall.before:.3f} to {fall.after:.3f} ({fall.interval}).{aside}",
            "bad",
        )
    word, tone, link = _judged(reward.outcome, judge.outcome)
    return Verdict(
        f"{word}: {change}, {link} the judge's score, which training doesn't use, {_went(judge)}.{aside}", tone
    )


def key_metrics(record: RunRecord) -> list[Metric]:
    """Return the metrics to look at first."""
    when = latest(record.evaluations)
    before, after = record.evaluations.get("before", {}), record.evaluations.get(when, {}) if when is not None else {}
    found = [
        _of_change("Held-out reward", change_of("reward", before, after)),
        _of_change("Held-out judge score", change_of("judge", before, after)),
    ]
    if not after:
        found.append(_of_training(record))
    kl = [after["kl"]] if "kl" in after else record.series("kl")
    if kl:
        found.append(Metric("KL to the reference policy", f"{kl[-1]:.3g}", "nats per token"))
    if "length" in before and "length" in after:
        note = f"{before['length']:.1f} → {after['length']:.1f} tokens"
        ratio = after["length"] / before["length"] if before["length"] else None
        found.append(Metric("Response length", f"{ratio:.2f}x" if ratio is not None else "-", note))
    if "truncated" in after:
        found.append(Metric("Truncated", f"{after['truncated']:.0%}", "at the length limit"))
    if "distinct" in after:
        found.append(Metric("Distinct responses", f"{after['distinct']:.2f}", "per held-out prompt"))
    return [metric for metric in [*found, *_effort(record)] if metric is not None]


def status(record: RunRecord) -> str:
    """Return the progress of the run."""
    done, steps = len(record.metrics), record.facts.get("num_steps")
    if not record.metrics:
        return "No step is finished yet."
    last = int(record.metrics[-1].get("step", done))
    if steps is None:
        return f"{last} steps done. An older version wrote the run and didn't record the planned number of steps."
    if record.finished:
        return f"Finished: {last:,} of {steps:,} steps."
    return f"Not finished: {last:,} of {steps:,} steps. It is still running, was stopped, or failed."


# --- the sentences ----------------------------------------------------------------------------------------------------


def _turn(evaluations: Mapping[str, Mapping[str, float]], when: str) -> tuple[str, Change] | None:
    """Return the evaluation since which the reward rose and the judge's score fell, and that fall; None if there is none."""
    last = evaluations[when]
    judged = {
        name: metrics for name, metrics in evaluations.items() if name not in ("before", when) and "judge" in metrics
    }
    best = max(judged, key=lambda name: judged[name]["judge"], default=None)
    if best is None:
        return None
    reward, judge = change_of("reward", judged[best], last), change_of("judge", judged[best], last)
    if reward is None or judge is None or reward.gain <= 0 or judge.outcome != "regressed":
        return None
    return best, judge


def _judged(reward: Outcome, judge: Outcome) -> tuple[str, Tone, str]:
    """Return the verdict, its color, and the conjunction between the reward's and the judge's half of the sentence."""
    match reward, judge:
        case "improved", "regressed":
            return "Reward hacking", "bad", "but"
        case "improved", "improved":
            return "Improved", "good", "and"
        case "regressed", "improved":
            return "Inconclusive", "warn", "but"
        case "inconclusive", "improved":
            return "Improved", "good", "but"
        case "improved", _:
            return "Inconclusive", "warn", "but"
        case ("regressed", _) | (_, "regressed"):
            return "Regressed", "bad", "and"
        case _:
            return "Inconclusive", "warn", "and"


def _by_reward(change: str, outcome: Outcome, aside: str) -> Verdict:
    unconfirmed = " There is no judge to confirm it." if outcome == "improved" else ""
    return Verdict(f"{outcome.capitalize()}: {change}.{unconfirmed}{aside}", TONES[outcome])


def _went(change: Change) -> str:
    values = f"from {change.before:.3f} to {change.after:.3f} ({change.interval})"
    if change.outcome == "inconclusive":
        return f"went {values}, which may be chance"
    return f"{'rose' if change.outcome == 'improved' else 'fell'} {values}"


def _moment(record: RunRecord, when: str) -> str:
    return "after training" if when == "after" else f"after {when} of {record.facts.get('num_steps', '?')}"


def _heldout(record: RunRecord) -> str:
    counts = [n for n in (record.facts.get("heldout_prompts"), record.settings.get("eval_prompts")) if n]
    return f"{min(counts)} held-out prompts" if counts else "held-out prompts"


def _aside(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    if "kl" not in after:
        return ""
    length = ""
    if before.get("length") and "length" in after:
        length = f", and responses are {after['length'] / before['length']:.2f} times as long"
    return f" The KL to the reference policy is {after['kl']:.3f} nats per token{length}."


def _without_heldout(record: RunRecord, evaluated: bool) -> Verdict:
    reason = (
        "held-out prompts were evaluated before training, but not yet again"
        if evaluated
        else "no held-out prompts were evaluated"
    )
    ends = _ends(record.series("reward"))
    if ends is None:
        return Verdict(f"Inconclusive: {reason}, and the log has no reward.", "plain")
    return Verdict(
        f"Inconclusive: {reason}. The training reward went from {ends[0]:.3f} to {ends[1]:.3f}.",
        "warn",
    )


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the means of the first and the last tenth."""
    size = max(1, len(values) // TENTH)
    return (fmean(values[:size]), fmean(values[-size:])) if values else None


# --- the key metrics --------------------------------------------------------------------------------------------------


def _of_change(name: str, change: Change | None) -> Metric | None:
    if change is None:
        return None
    note = f"{change.interval}: {change.outcome}"
    return Metric(name, f"{change.before:.2f} → {change.after:.2f}", note, TONES[change.outcome])


def _of_training(record: RunRecord) -> Metric | None:
    ends = _ends(record.series("reward"))
    if ends is None:
        return None
    return Metric("Training reward", f"{ends[0]:.2f} → {ends[1]:.2f}", "means of the first and last tenth of the steps")


def _effort(record: RunRecord) -> list[Metric]:
    done = int(record.metrics[-1].get("step", len(record.metrics))) if record.metrics else 0
    steps = record.facts.get("num_steps")
    found = [Metric("Steps", f"{done:,}", f"of {steps:,}" if steps is not None else "")]
    seconds, tokens = sum(record.series("step_time")), (record.series("num_tokens") or [0])[-1]
    if seconds:
        found.append(
            Metric("Training time", duration(seconds), f"{seconds / len(record.series('step_time')):.2f} s per step")
        )
    if tokens:
        found.append(Metric("Tokens", f"{tokens:,.0f}", "of prompts and responses"))
    return found


def duration(seconds: float) -> str:
    """Return ``45 s``, ``6 min``, or ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
