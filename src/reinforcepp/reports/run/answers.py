"""The answers of a run as HTML: held-out prompts twice, side by side, and completions of its training."""

from __future__ import annotations

from collections.abc import Sequence

from reinforcepp.data import count
from reinforcepp.reports.charts.words import number
from reinforcepp.reports.run.curves import held_out_charts, length_charts
from reinforcepp.reports.run.html import missing, said, text, within
from reinforcepp.reports.run.samples import Pair, Pairs, Sample, Samples

PAIR_BYTES, SAMPLE_BYTES = 1_200_000, 800_000  # of the page, for all runs together

ORDERS = {
    "gain": "most improved first",
    "loss": "most worsened first",
    "judge": "worst by the judge first",
}


def pairs_html(pairs: Pairs, share: float) -> str:
    """Before and after for each held-out prompt, to search and to sort; ``share`` is this run's part of the room."""
    if pairs.missing:
        return missing(pairs.missing)
    judged = any(None not in pair.judge for pair in pairs.pairs)
    by_weight = sorted(enumerate(pairs.pairs), key=lambda item: -abs(item[1].change))
    budget = int(PAIR_BYTES * share)
    fitting = {
        place
        for (place, _), _ in zip(by_weight, within((_pair(p, pairs.when) for _, p in by_weight), budget), strict=False)
    }
    shown = [_pair(pair, pairs.when) for place, pair in enumerate(pairs.pairs) if place in fitting]
    left_out = len(pairs.pairs) - len(shown)
    note = (
        f" The page has room for {len(shown)} of {len(pairs.pairs)}, those whose reward changed most; evaluations/ in the "
        "run's folder holds all."
        if left_out
        else ""
    )
    orders = {name: label for name, label in ORDERS.items() if judged or name != "judge"}
    options = "".join(f'<option value="{name}">{label}</option>' for name, label in orders.items())
    return (
        f'<p class="quiet">{count(len(pairs.pairs), "held-out prompt")}, answered before training and '
        f"{'after it' if pairs.when == 'after' else f'at {text(pairs.when)}'} with the same random numbers.{note}</p>"
        f'<div class="charts">{held_out_charts(pairs)}</div>'
        '<div class="pairs-block"><div class="tools" hidden><label>Search <input type="search"></label>'
        f'<label>Order <select>{options}</select></label><span class="told quiet" role="status"></span></div>'
        f'<ol class="pairs">{"".join(shown)}</ol><button type="button" class="show-more" hidden>Show more</button></div>'
    )


def samples_html(samples: Samples, share: float) -> str:
    """Completions of the beginning, the middle, the end, and the best paid ones; reward against length."""
    if samples.missing:
        return missing(samples.missing)
    told = missing(_damaged(samples.damaged)) if samples.damaged else ""
    budget = int(SAMPLE_BYTES * share) // len(samples.groups)
    *steps, highest = (
        f'<div class="group"><h3>{text(group.title)}</h3>{"".join(within(map(_sample, group.samples), budget))}</div>'
        for group in samples.groups
    )
    return (
        '<p class="quiet">Of each step, from its highest reward to its lowest. Look at the best paid completions with care: '
        "where a reward is gamed, it shows there first.</p>"
        f'{told}<div class="groups">{"".join(steps)}</div><div class="highest">{highest}</div>'
        f'<div class="charts">{length_charts(samples)}</div>'
    )


def _pair(pair: Pair, when: str) -> str:
    change = f'<span class="{_tone(pair.change)}">{pair.change:+.2f}</span>' if None not in pair.rewards else ""
    same = pair.answers[0] == pair.answers[1]
    columns = "".join(
        f'<div class="answer"><p class="moment"><b>{text(title)}</b> {_score(reward, judge)}</p>{said(answer)}</div>'
        for title, reward, judge, answer in zip(
            ("Before", when.capitalize()), pair.rewards, pair.judge, pair.answers, strict=True
        )
    )
    by_judge = pair.judge[1] if pair.judge[1] is not None else 0.0
    return (
        f'<li class="pair" data-gain="{pair.change:.6g}" data-judge="{by_judge:.6g}"><div class="asked">'
        f'{said(pair.prompt)}<span class="change">{"same answer" if same else change}</span></div>'
        f'<div class="two">{columns}</div></li>'
    )


def _score(reward: float | None, judge: float | None) -> str:
    parts = [f"reward {reward:+.2f}"] if reward is not None else []
    parts += [f"judge {number(judge)}"] if judge is not None else []
    return f'<span class="score">{", ".join(parts)}</span>'


def _tone(change: float) -> str:
    return "gain" if change > 0 else "loss" if change < 0 else ""


def _sample(sample: Sample) -> str:
    parts = [f"<b>reward {sample.reward:+.2f}</b>"]
    parts += [f"{text(name)} {value:+.2f}" for name, value in sample.rewards.items()]
    parts += [f"step {sample.step}"]
    parts += [count(sample.length, "token")] if sample.length is not None else []
    parts += [f"KL {sample.kl:.3f}"] if sample.kl is not None else []
    parts += ["cut off"] if sample.finish_reason == "length" else []
    parts += [f"said {sample.seen} times"] if sample.seen > 1 else []
    return (
        f'<article class="sample"><p class="score">{" · ".join(parts)}</p>'
        f'<div class="asked">{said(sample.prompt)}</div>{said(sample.completion)}</article>'
    )


def _damaged(names: Sequence[str]) -> str:
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"Left out, because they can't be read: {listed}."
