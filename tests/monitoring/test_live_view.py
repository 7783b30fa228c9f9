"""The live view: its content at every width, with any model output."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from reinforcepp.monitoring.live_view import (
    BLOCKS,
    Sample,
    Snapshot,
    duration,
    judge_counts,
    sparkline,
    trend_arrow,
    view,
)


def history(steps=30, **changes):
    return [
        {
            "step": i + 1,
            "reward": i / 10,
            "reward_std": 1.0,
            "kl": 0.001 * i,
            "entropy": 0.5,
            "completions/mean_length": 30.0,
            "completions/clipped_ratio": 0.25,
            "step_time": 2.0,
            "time/rollout": 1.0,
            "time/score": 0.5,
            "time/update": 0.5,
            "time/sync": 0.0,
            "step_tokens": 800.0,
        }
        | changes
        for i in range(steps)
    ]


def moment(**changes):
    sample = Sample("How do I see routes?", "Run ip route.", 1.25)
    facts = {"title": "tiny", "step": 30, "num_steps": 100, "left": "2:20 min", "history": history(), "kl_limit": 5.0}
    return Snapshot(**(facts | {"health": ("No problems found.", None), "sample": sample} | changes))


def shown(now, width=100):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(view(now, width))
    return console.file.getvalue()


def test_turns_of_episodes_are_shown():
    episodes = {"episodes/mean_turns": 2.5, "episodes/failed": 3.0}
    assert "2.50" in (text := shown(moment(history=history(**episodes)))) and "per episode, 3 failed" in text
    assert "turns" not in shown(moment())


def test_everything_is_shown():
    text = shown(moment())
    for expected in (
        "tiny  ·  step 30 of 100  ·  2:20 min left",
        "▲ +2.900",
        "0.0290",
        "limit 5",
        "30.0",
        "25% truncated",
        "0.5000",
        "400 tokens/s",
        "rollout 50%  scoring 25%  update 25%  sync 0%",
        "No problems found.",
        "How do I see routes?",
        "Run ip route.  (+1.25)",
    ):
        assert expected in text


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_it_fits_every_width(width):
    lines = shown(moment(), width).splitlines()
    assert max(map(len, lines)) <= width
    assert "+2.900" in shown(moment(), width)


def test_before_the_first_step_and_after_one_without_rewards():
    assert "step 0 of 100" in shown(moment(step=0, history=[], sample=None))
    assert "+0.000" not in shown(moment(history=[{"step": 1, "skipped_updates": 1.0}]))


def test_the_counts_of_judges_are_summed():
    counts = {"judges/a/requests": 9.0, "judges/a/cache_hits": 3.0, "judges/a/unscored": 0.0, "judges/a/dollars": 0.01}
    counts |= {"judges/b/requests": 1.0, "judges/b/cache_hits": 2.0, "judges/b/unscored": 1.0}
    assert "10 requests, 5 from the cache, 1 without a verdict, $0.0100" in shown(moment(history=history(**counts)))
    assert "from the cache" not in shown(moment()) and "$" not in judge_counts({"judges/b/requests": 1.0})


def test_a_conversation_is_shown_turn_by_turn():
    earlier = [{"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")]
    prompt = [{"role": "system", "content": "Be\x1b brief. " * 30}, *earlier, {"role": "user", "content": "Last?"}]
    text = shown(moment(sample=Sample(prompt, "Yes.", 1.0)))
    lines = [line.strip("│ ").removeprefix("sample").strip() for line in text.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("System: Be\ufffd brief."))
    assert lines[first + 1] == "… 6 earlier turns …"
    assert lines[first + 2 : first + 6] == [
        "User: user 3",
        "Assistant: assistant 3",
        "User: Last?",
        "Assistant: Yes.  (+1.00)",
    ]


def test_model_output_cannot_control_the_terminal():
    hostile = Sample("\x1b[2Jp", "[bold red]x[/] \x1b]0;title\x07 \r evil\n\n\n\n" + "long " * 500, 0.0)
    text = shown(moment(sample=hostile))
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text and "[bold red]x[/]" in text
    assert len(text.splitlines()) < 20 and "…" in text


def test_a_sparkline_goes_from_lowest_to_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([7, 0]) == BLOCKS[-1] + BLOCKS[0]
    assert sparkline([3.0] * 5) == BLOCKS[0] * 5 and sparkline([]) == ""
    assert sparkline([0.0] * 50 + [1.0] * 50, 4) == BLOCKS[0] * 2 + BLOCKS[-1] * 2
    assert len(sparkline(list(range(1000)), 24)) == 24


def test_a_trend_needs_more_than_a_twentieth_of_the_spread():
    assert trend_arrow([0.0] * 8 + [0.2] * 2, 1.0) == "▲" and trend_arrow([0.2] * 8 + [0.0] * 2, 1.0) == "▼"
    assert trend_arrow([0.0] * 8 + [0.04] * 2, 1.0) == "▶" and trend_arrow([1.0], 1.0) == " "


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599, "59:59 min"), (7500, "2:05 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
