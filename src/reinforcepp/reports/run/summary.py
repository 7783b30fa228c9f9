"""What became of a run, in one sentence and a few figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from reinforcepp.monitoring.metric_delta import Change, change_of
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.run.samples import latest

Tone = Literal["good", "bad", "warn", "plain"]
SHARE = 10  # the first and the last tenth of the steps are compared where there is nothing held out


@dataclass(frozen=True)
class Verdict:
    """One sentence, and in which colour to say it."""

    text: str
    tone: Tone


@dataclass(frozen=True)
class Figure:
    """A key figure: what it is, its value, and a few words on it."""

    name: str
    value: str
    note: str = ""
    tone: Tone = "plain"


def verdict(record: RunRecord) -> Verdict:
    """Whether the held-out answers got better, by the reward that was trained on and by a judge that was not."""
    when = latest(record.evaluations)
    before = record.evaluations.get("before")
    if before is None or when is None:
        return _without_heldout(record, before is not None)
    after = record.evaluations[when]
    reward, judge = change_of("reward", before, after), change_of("judge", before, after)
    if reward is None:
        return Verdict(f"The evaluations of this run tell no reward.{_kl(after)}", "plain")
    where = f"On {_heldout(record)} {_moment(record, when)}"
    turn = _turn(record.evaluations, when) if reward.shown == "better" else None
    return _judged(where, reward, judge, _aside(before, after), turn)


def figures(record: RunRecord) -> list[Figure]:
    """The figures that one looks at first."""
    when = latest(record.evaluations)
    before, after = record.evaluations.get("before", {}), record.evaluations.get(when, {}) if when is not None else {}
    found = [
        _of_change("Held-out reward", change_of("reward", before, after)),
        _of_change("Held-out judge", change_of("judge", before, after)),
    ]
    if not after:
        found.append(_of_training(record))
    kl = [after["kl"]] if "kl" in after else record.series("kl")
    if kl:
        found.append(Figure("KL to the start", f"{kl[-1]:.3g}", "nats per token"))
    if "length" in before and "length" in after:
        note = f"{before['length']:.1f} → {after['length']:.1f} tokens"
        ratio = after["length"] / before["length"] if before["length"] else None
        found.append(Figure("Answer length", f"{ratio:.2f} times" if ratio is not None else "-", note))
    if "truncated" in after:
        found.append(Figure("Cut off", f"{after['truncated']:.0%}", "at the length limit"))
    if "distinct" in after:
        found.append(Figure("Different answers", f"{after['distinct']:.2f}", "per held-out prompt"))
    return [figure for figure in [*found, *_effort(record)] if figure is not None]


def status(record: RunRecord) -> str:
    """How far the run has come."""
    done, steps = len(record.metrics), record.facts.get("num_steps")
    if not record.metrics:
        return "No step is done yet."
    last = int(record.metrics[-1].get("step", done))
    if steps is None:
        return f"{last} steps done; the run, from an older version, doesn't say how many were planned."
    if record.finished:
        return f"Finished: {last:,} of {steps:,} steps."
    return f"Not finished: {last:,} of {steps:,} steps; it is still running, was stopped or failed."


# --- the sentence -----------------------------------------------------------------------------------------------------


def _turn(evaluations: Mapping[str, Mapping[str, float]], when: str) -> tuple[str, Change] | None:
    """The evaluation from which on the reward rose and the judge's score fell, and that fall; None if there is none."""
    last = evaluations[when]
    judged = {name: own for name, own in evaluations.items() if name not in ("before", when) and "judge" in own}
    best = max(judged, key=lambda name: judged[name]["judge"], default=None)
    if best is None:
        return None
    reward, judge = change_of("reward", judged[best], last), change_of("judge", judged[best], last)
    if reward is None or judge is None or reward.gain <= 0 or judge.shown != "worse":
        return None
    return best, judge


def _judged(
    where: str, reward: Change, judge: Change | None, aside: str, turn: tuple[str, Change] | None = None
) -> Verdict:
    told = f"{where}, the reward {_went(reward)}"
    if judge is None:
        return _by_reward(told, reward, aside)
    said = f"the score of the judge, which takes no part in training, {_went(judge)}"
    if turn is not None and judge.shown != "worse":
        since, fall = turn
        return Verdict(
            f"The training reward was gamed since {since}: {_lower(told)}, but the score of the judge, which takes no part in "
            f"training, has fallen since then from {fall.before:.3f} to {fall.after:.3f} ({fall.gain:+.3f} ± "
            f"{2 * fall.error:.3f}){aside}.",
            "bad",
        )
    match reward.shown, judge.shown:
        case "better", "worse":
            return Verdict(f"The training reward was gamed: {_lower(told)}, but {said}{aside}.", "bad")
        case "better", "better":
            return Verdict(f"Training worked: {_lower(told)}, and {said}{aside}.", "good")
        case "better", _:
            return Verdict(f"Not shown to be real: {_lower(told)}, but {said}{aside}.", "warn")
        case "worse", "better":
            return Verdict(f"At odds: {_lower(told)}, but {said}{aside}.", "warn")
        case _, "worse":
            return Verdict(f"Training did harm: {_lower(told)}, and {said}{aside}.", "bad")
        case "worse", _:
            return Verdict(f"Training did harm: {_lower(told)}; {said}{aside}.", "bad")
        case _, "better":
            return Verdict(f"Better by the judge: {_lower(told)}, but {said}{aside}.", "good")
        case _:
            return Verdict(f"No difference is shown: {_lower(told)}, and {said}{aside}.", "warn")


def _by_reward(told: str, reward: Change, aside: str) -> Verdict:
    if reward.shown == "better":
        return Verdict(f"Better by the reward alone: {_lower(told)}, with no judge to confirm it{aside}.", "good")
    if reward.shown == "worse":
        return Verdict(f"Training did harm: {_lower(told)}{aside}.", "bad")
    return Verdict(f"No difference is shown: {_lower(told)}{aside}.", "warn")


def _went(change: Change) -> str:
    course = f"from {change.before:.3f} to {change.after:.3f} ({change.gain:+.3f} ± {2 * change.error:.3f})"
    if change.shown == "no difference shown":
        return f"went {course}, which may be chance"
    return f"{'rose' if change.shown == 'better' else 'fell'} {course}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _moment(record: RunRecord, when: str) -> str:
    return "after training" if when == "after" else f"after {when} of {record.facts.get('num_steps', '?')}"


def _heldout(record: RunRecord) -> str:
    counts = [n for n in (record.facts.get("heldout_prompts"), record.settings.get("eval_prompts")) if n]
    return f"{min(counts)} held-out prompts" if counts else "held-out prompts"


def _aside(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    length = ""
    if before.get("length") and "length" in after:
        length = f" and answers {after['length'] / before['length']:.2f} times as long"
    return f"; with a KL of {after['kl']:.3f} nats per token to the start{length}" if "kl" in after else ""


def _kl(after: Mapping[str, float]) -> str:
    return f" The KL to the start is {after['kl']:.3f} nats per token." if "kl" in after else ""


def _without_heldout(record: RunRecord, asked: bool) -> Verdict:
    reason = (
        "the held-out prompts were answered before training, but not yet again"
        if asked
        else "no held-out prompts were answered"
    )
    ends = _ends(record.series("reward"))
    if ends is None:
        return Verdict(f"Not known: {reason}, and the log holds no reward.", "plain")
    return Verdict(
        f"Not known: {reason}; in training the reward went from {ends[0]:.3f} to {ends[1]:.3f}.",
        "warn",
    )


def _ends(values: Sequence[float]) -> tuple[float, float] | None:
    """The means of the first and the last tenth."""
    share = max(1, len(values) // SHARE)
    return (fmean(values[:share]), fmean(values[-share:])) if values else None


# --- the figures ------------------------------------------------------------------------------------------------------


def _of_change(name: str, change: Change | None) -> Figure | None:
    if change is None:
        return None
    tone: Tone = {"better": "good", "worse": "bad", "no difference shown": "warn"}[change.shown]  # type: ignore[assignment]
    told = f"{change.gain:+.3f} ± {2 * change.error:.3f}: {change.shown}"
    return Figure(name, f"{change.before:.2f} → {change.after:.2f}", told, tone)


def _of_training(record: RunRecord) -> Figure | None:
    ends = _ends(record.series("reward"))
    if ends is None:
        return None
    return Figure(
        "Training reward", f"{ends[0]:.2f} → {ends[1]:.2f}", "mean of the first and the last tenth of the steps"
    )


def _effort(record: RunRecord) -> list[Figure]:
    done = int(record.metrics[-1].get("step", len(record.metrics))) if record.metrics else 0
    steps = record.facts.get("num_steps")
    found = [Figure("Steps", f"{done:,}", f"of {steps:,}" if steps is not None else "")]
    seconds, tokens = sum(record.series("step_time")), (record.series("num_tokens") or [0])[-1]
    if seconds:
        found.append(
            Figure("Time in steps", duration(seconds), f"{seconds / len(record.series('step_time')):.2f} s a step")
        )
    if tokens:
        found.append(Figure("Tokens", f"{tokens:,.0f}", "prompts and answers"))
    return found


def duration(seconds: float) -> str:
    """``45 s``, ``6 min``, ``2 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
