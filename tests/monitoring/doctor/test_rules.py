"""Each rule on synthetic runs: a finding above its threshold, none below, and none for what another problem explains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from reinforcepp.monitoring.doctor import SEVERITIES, diagnose
from reinforcepp.monitoring.doctor.rules import RULES
from reinforcepp.monitoring.doctor.trends import MIN_STEPS, heldout_change, reward_rises, trend_of
from reinforcepp.monitoring.run_record import RunRecord
from scripts import ROOT

STEPS = 40
CARD = {"figures": {"pairs": 80, "accuracy": 0.9, "longer_wins": 0.55, "length_correlation": 0.2}}


def rising(first: float, last: float, steps: int = STEPS) -> list[float]:
    """Return values that rise linearly from the first to the last fifth of the steps."""
    fifth = steps // 5
    middle = steps - 2 * fifth
    between = [first + (last - first) * (i + 1) / (middle + 1) for i in range(middle)]
    return [first] * fifth + between + [last] * fifth


def run(steps: int = STEPS, *, settings=None, facts=None, evaluations=None, **series) -> RunRecord:
    """Return a sound run with some of its series replaced; None omits a series."""
    sound = {
        "reward": rising(0.0, 1.0, steps),
        "reward_std": [1.0] * steps,
        "reward_top_ratio": [1 / 16] * steps,
        "kl": rising(0.001, 0.05, steps),
        "entropy": rising(1.0, 0.6, steps),
        "learning_rate": [1e-4] * steps,
        "grad_norm": [0.5] * steps,
        "skipped_updates": [0.0] * steps,
        "completions/mean_length": rising(30, 34, steps),
        "completions/clipped_ratio": [0.02] * steps,
        "completions/distinct_ratio": [0.95] * steps,
        "completions/repeated_ratio": [0.01] * steps,
        "sampling/logprob_gap_mean": [1e-6] * steps,
        "epoch": [i / 10 for i in range(steps)],
    } | series
    metrics = [
        {"step": i + 1, **{name: values[i] for name, values in sound.items() if values is not None}}
        for i in range(steps)
    ]
    return RunRecord(
        Path("run"),
        {"batch_size": 16, "num_generations": 1, "kl_limit": 5.0, "max_grad_norm": 1.0, "max_new_tokens": 64}
        | (settings or {}),
        {"num_steps": steps, "prompts": 700, "rewards": [{"name": "reward_model", "card": CARD}]} | (facts or {}),
        metrics,
        evaluations or {},
    )


def names(record: RunRecord) -> list[str]:
    return [finding.rule for finding in diagnose(record).findings]


def judged(reward: float, judge: float | None, error: float = 0.05) -> dict[str, dict[str, float]]:
    """Return held-out metrics with these changes."""
    before = {"reward": 0.0, "reward_error": error} | (
        {"judge": 0.5, "judge_error": error} if judge is not None else {}
    )
    after = before | {"reward": reward} | ({"judge": 0.5 + judge} if judge is not None else {})
    return {"before": before, "after": after}


def card(**figures):
    return {"rewards": [{"name": "reward_model", "card": {"figures": CARD["figures"] | figures}}]}


def test_a_sound_run_has_no_finding():
    assert names(run()) == []
    assert diagnose(run()).sentence == "No problems found in 40 of 40 steps."


def test_a_run_of_a_few_steps_has_no_finding():
    alarming = run(kl=[9.0] * STEPS, entropy=rising(1, 0), settings={"kl_limit": None})
    for steps in range(MIN_STEPS):
        assert names(replace(alarming, metrics=alarming.metrics[:steps])) == []


# (finding, change above its threshold, change below it)
CASES = [
    ("kl_explosion", {"kl": rising(0.01, 1.2)}, {"kl": rising(0.01, 0.9)}),
    ("kl_inert", {"kl": [1e-8] * STEPS, "reward": [0.0] * STEPS}, {"kl": rising(1e-8, 1e-3)}),
    ("entropy_collapse", {"entropy": rising(1.0, 0.1)}, {"entropy": rising(1.0, 0.2)}),
    ("length_drift", {"completions/mean_length": rising(30, 60)}, {"completions/mean_length": rising(30, 50)}),
    ("length_collapse", {"completions/mean_length": rising(30, 12)}, {"completions/mean_length": rising(30, 17)}),
    ("truncation", {"completions/clipped_ratio": rising(0, 0.35)}, {"completions/clipped_ratio": rising(0, 0.25)}),
    (
        "out_of_turns",
        {"settings": {"max_turns": 4}, "episodes/mean_turns": rising(2, 4), "completions/clipped_ratio": rising(0, 1)},
        {"settings": {"max_turns": 4}, "episodes/mean_turns": rising(2, 4)},
    ),
    (
        "out_of_turns",
        {
            "settings": {"max_turns": 4},
            "episodes/mean_turns": rising(2, 3.9),
            "completions/clipped_ratio": rising(0, 0.96),
        },
        {
            "settings": {"max_turns": 5},
            "episodes/mean_turns": rising(2, 4.9),
            "completions/clipped_ratio": rising(0, 0.25),
        },
    ),
    ("failed_episodes", {"episodes/failed": rising(0, 1.7)}, {"episodes/failed": rising(9, 1.5)}),
    ("tools_unused", {"tools/call_frequency": rising(0.3, 0)}, {"tools/call_frequency": rising(0, 0.01)}),
    ("no_signal", {"frac_reward_zero_std": rising(0.1, 0.6)}, {"frac_reward_zero_std": rising(0.1, 0.4)}),
    ("no_signal", {"reward": [0.5] * STEPS, "reward_std": [0.0] * STEPS}, {"reward_std": [1e-3] * STEPS}),
    ("reward_saturated", {"reward_top_ratio": rising(0.5, 0.95)}, {"reward_top_ratio": rising(0.5, 0.8)}),
    (
        "reward_saturated",
        {"settings": {"reward_clip": 3.0}, "reward_clipped_ratio": rising(0, 0.3)},
        {"reward_clipped_ratio": rising(0, 0.1)},
    ),
    ("gradient_spikes", {"grad_norm": [0.5] * 38 + [6.0] * 2}, {"grad_norm": [0.5] * 38 + [4.0] * 2}),
    ("gradient_spikes", {"skipped_updates": [0.0] * 39 + [1.0]}, {"grad_norm": [0.5] * 39 + [60.0]}),
    (
        "learning_rate_low",
        {"kl": [5e-6] * STEPS, "reward": [0.0] * STEPS},
        {"kl": rising(0, 2e-4), "reward": [0.0] * STEPS},
    ),
    (
        "engine_out_of_step",
        {"sampling/logprob_gap_mean": rising(0, 0.2)},
        {"sampling/logprob_gap_mean": [0.03] * STEPS},
    ),
    (
        "trust_region",
        {"sampling/trust_region_dropped_ratio": rising(0, 0.6)},
        {"sampling/trust_region_dropped_ratio": rising(0, 0.4)},
    ),
    ("reward_model_chance", {"facts": card(accuracy=0.55)}, {"facts": card(accuracy=0.65)}),
    ("reward_model_chance", {"facts": card(accuracy=0.5)}, {"facts": card(accuracy=0.5, pairs=12)}),
    (
        "reward_model_length",
        {"facts": card(length_correlation=0.8, longer_wins=0.9)},
        {"facts": card(length_correlation=0.8, longer_wins=0.5)},
    ),
    ("few_prompts", {"facts": {"prompts": 24}}, {"facts": {"prompts": 100}}),
    ("few_prompts", {"epoch": rising(0, 50)}, {"epoch": rising(0, 20)}),
    ("reward_hacking", {"evaluations": judged(1.0, -0.3)}, {"evaluations": judged(1.0, -0.1)}),
    (
        "reward_hacking",
        {"completions/repeated_ratio": rising(0.01, 0.2)},
        {"completions/repeated_ratio": rising(0.01, 0.1)},
    ),
    (
        "reward_hacking",
        {"completions/distinct_ratio": rising(0.9, 0.3)},
        {"completions/distinct_ratio": rising(0.9, 0.6)},
    ),
]


@pytest.mark.parametrize(("rule", "fault", "sound"), CASES, ids=[f"{i}-{case[0]}" for i, case in enumerate(CASES)])
def test_a_rule_fires_above_its_threshold_only(rule, fault, sound):
    assert names(run(**fault)) == [rule]
    assert names(run(**sound)) == []


def test_every_rule_is_tested():
    assert len(RULES) == 17
    tested = {case[0] for case in CASES}
    assert tested == {
        *(rule.__name__ for rule in RULES if rule.__name__ not in ("length_change", "reward_model")),
        *("length_drift", "length_collapse", "reward_model_chance", "reward_model_length"),
    }


def test_groups_of_equal_rewards_have_a_signal_if_the_whole_batch_is_compared():
    equal = {"frac_reward_zero_std": [1.0] * STEPS}
    for estimator, found in (("grpo", ["no_signal"]), ("reinforce_plus_plus", []), ("flash_reinforce", [])):
        assert names(run(settings={"estimator": estimator}, **equal)) == found


def test_reward_hacking_needs_a_rising_reward():
    flat = [0.0] * STEPS
    assert names(run(reward=flat, evaluations=judged(0.0, -0.3))) == []
    assert names(run(reward=flat, **{"completions/repeated_ratio": rising(0.01, 0.3)})) == []
    assert names(run(reward=flat, evaluations=judged(0.5, -0.3))) == ["reward_hacking"]


def test_a_rising_judge_score_outweighs_proxies():
    repeating = {"completions/repeated_ratio": rising(0.01, 0.3)}
    assert names(run(evaluations=judged(1.0, 0.2), **repeating)) == []


def test_a_judge_counts_beyond_its_error_only():
    assert names(run(evaluations=judged(1.0, -0.3, error=0.2))) == []


def test_a_problem_that_another_one_explains_is_not_reported():
    nothing = {
        "kl": [0.0] * STEPS,
        "reward": [0.5] * STEPS,
        "reward_std": [0.0] * STEPS,
        "reward_top_ratio": [1.0] * STEPS,
    }
    assert names(run(**nothing)) == ["no_signal"]
    frozen = run(kl=[0.0] * STEPS, reward=[0.0] * STEPS, learning_rate=[1e-9] * STEPS)
    assert names(frozen) == ["learning_rate_low"]
    stale = {"sampling/logprob_gap_mean": [0.5] * STEPS, "sampling/trust_region_dropped_ratio": [1.0] * STEPS}
    assert names(run(**stale)) == ["engine_out_of_step"]


def test_a_kl_over_its_limit_is_reported_before_a_trend_exists():
    record = run(kl=[0.01, 7.0, *[0.01] * 38])
    (finding,) = diagnose(replace(record, metrics=record.metrics[:2])).findings
    assert finding.rule == "kl_explosion" and "step 2" in finding.evidence.lower() and "kl_limit 5" in finding.evidence


def test_the_most_severe_finding_comes_first_and_is_the_verdict():
    diagnosis = diagnose(run(facts={"prompts": 8}, kl=rising(0, 3), **{"completions/clipped_ratio": [0.5] * STEPS}))
    severities = [finding.severity for finding in diagnosis.findings]
    assert severities == sorted(severities, key=SEVERITIES.index) == ["error", "warning", "info"]
    assert diagnosis.sentence.startswith("1 error, 1 warning, 1 info in 40 of 40 steps: KL to the reference policy")


def test_every_finding_has_whole_sentences_with_numbers():
    for _, fault, _ in CASES:
        for finding in diagnose(run(**fault)).findings:
            assert all(
                not text[0].islower() and text.endswith(".") for text in (finding.evidence, finding.cause, finding.fix)
            )
            assert any(character.isdigit() for character in finding.evidence) or "same reward" in finding.evidence


def test_steps_without_metrics_are_skipped():
    record = run()
    broken = [{"step": m["step"], "skipped_updates": 1.0} if m["step"] % 4 == 0 else m for m in record.metrics]
    assert names(replace(record, metrics=broken)) == ["gradient_spikes"]


# --- trends ------------------------------------------------------------------------------------------------------------


def test_a_trend_compares_the_first_fifth_with_the_last():
    values = [{"x": float(i)} for i in range(40)]
    trend = trend_of(values, "x")
    assert (trend.early, trend.late) == (3.5, 35.5) and trend.change == 32 and trend.factor == pytest.approx(35.5 / 3.5)
    long = trend_of([{"x": float(i)} for i in range(1000)], "x")
    assert (long.early, long.late) == (9.5, 974.5)  # 20 steps, 50 steps
    assert trend_of(values[:7], "x") is None and trend_of(values, "y") is None


def test_a_rise_counts_beyond_twice_its_standard_error():
    # 8 steps of 16 completions at each end, deviation 1: the rise has a standard error of sqrt(2 / 128) = 0.125
    assert reward_rises(run(reward=rising(0, 0.26)).metrics, 16)
    assert not reward_rises(run(reward=rising(0, 0.24)).metrics, 16)
    assert not reward_rises(run(reward=rising(0, -1)).metrics, 16)


def test_a_change_is_since_before_with_its_error():
    change = heldout_change(judged(0.4, None, error=0.03), "reward")
    assert change.gain == pytest.approx(0.4) and change.error == pytest.approx(0.03 * 2**0.5)
    running = {"before": {"reward": 0.0}, "step 10": {"reward": 0.1}, "step 20": {"reward": 0.3}}
    assert heldout_change(running, "reward").gain == pytest.approx(0.3)
    assert heldout_change({"before": {"reward": 0.0}}, "reward") is None and heldout_change(running, "judge") is None


def test_the_docs_list_every_finding():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    documented = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert documented == {case[0] for case in CASES}
