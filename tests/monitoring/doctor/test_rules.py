"""Each rule on made-up runs: silent below its bound, speaking above, and quiet about what another fault explains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from reinforcepp.monitoring.doctor import SEVERITIES, diagnose
from reinforcepp.monitoring.doctor.rules import RULES
from reinforcepp.monitoring.doctor.trends import FEWEST, course, since_start, surely_rises
from reinforcepp.monitoring.run_record import RunRecord
from scripts import ROOT

STEPS = 40
CARD = {"figures": {"pairs": 80, "accuracy": 0.9, "longer_wins": 0.55, "length_correlation": 0.2}}


def rising(first: float, last: float, steps: int = STEPS) -> list[float]:
    """From the first fifth's value to the last fifth's, in a straight line between."""
    fifth = steps // 5
    middle = steps - 2 * fifth
    between = [first + (last - first) * (i + 1) / (middle + 1) for i in range(middle)]
    return [first] * fifth + between + [last] * fifth


def run(steps: int = STEPS, *, settings=None, facts=None, evaluations=None, **series) -> RunRecord:
    """A sound run, with some of its series replaced; None leaves one out."""
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
    """Held-out figures that change by so much."""
    before = {"reward": 0.0, "reward_error": error} | (
        {"judge": 0.5, "judge_error": error} if judge is not None else {}
    )
    after = before | {"reward": reward} | ({"judge": 0.5 + judge} if judge is not None else {})
    return {"before": before, "after": after}


def card(**figures):
    return {"rewards": [{"name": "reward_model", "card": {"figures": CARD["figures"] | figures}}]}


def test_a_sound_run_has_no_finding():
    assert names(run()) == []
    assert diagnose(run()).sentence == "Nothing wrong was found in 40 of 40 steps."


def test_a_run_that_has_just_begun_has_none_either():
    alarming = run(kl=[9.0] * STEPS, entropy=rising(1, 0), settings={"kl_limit": None})
    for steps in range(FEWEST):
        assert names(replace(alarming, metrics=alarming.metrics[:steps])) == []


CUT = {"reward_clipped_ratio": rising(0, 0.3)}

# (what is changed, the finding) and, with the same shape, a change that stays below the bound
CASES = [
    ("kl_explosion", {"kl": rising(0.01, 1.2)}, {"kl": rising(0.01, 0.9)}),
    ("kl_inert", {"kl": [1e-8] * STEPS, "reward": [0.0] * STEPS}, {"kl": rising(1e-8, 1e-3)}),
    ("entropy_collapse", {"entropy": rising(1.0, 0.1)}, {"entropy": rising(1.0, 0.2)}),
    ("length_drift", {"completions/mean_length": rising(30, 60)}, {"completions/mean_length": rising(30, 50)}),
    ("length_collapse", {"completions/mean_length": rising(30, 12)}, {"completions/mean_length": rising(30, 17)}),
    ("truncation", {"completions/clipped_ratio": rising(0, 0.35)}, {"completions/clipped_ratio": rising(0, 0.25)}),
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
def test_a_rule_speaks_above_its_bound_alone(rule, fault, sound):
    assert names(run(**fault)) == [rule]
    assert names(run(**sound)) == []


def test_every_rule_is_tried():
    assert len(RULES) == 13
    tried = {case[0] for case in CASES}
    assert tried == {
        *(rule.__name__ for rule in RULES if rule.__name__ not in ("length_change", "reward_model")),
        *("length_drift", "length_collapse", "reward_model_chance", "reward_model_length"),
    }


def test_hacking_needs_a_reward_that_rises():
    flat = [0.0] * STEPS
    assert names(run(reward=flat, evaluations=judged(0.0, -0.3))) == []
    assert names(run(reward=flat, **{"completions/repeated_ratio": rising(0.01, 0.3)})) == []
    assert names(run(reward=flat, evaluations=judged(0.5, -0.3))) == ["reward_hacking"]


def test_a_judge_that_is_content_outweighs_proxies():
    repeating = {"completions/repeated_ratio": rising(0.01, 0.3)}
    assert names(run(evaluations=judged(1.0, 0.2), **repeating)) == []


def test_a_judge_is_only_believed_beyond_its_error():
    assert names(run(evaluations=judged(1.0, -0.3, error=0.2))) == []


def test_what_another_fault_explains_is_not_told_twice():
    nothing = {
        "kl": [0.0] * STEPS,
        "reward": [0.5] * STEPS,
        "reward_std": [0.0] * STEPS,
        "reward_top_ratio": [1.0] * STEPS,
    }
    assert names(run(**nothing)) == ["no_signal"]
    frozen = run(kl=[0.0] * STEPS, reward=[0.0] * STEPS, learning_rate=[1e-9] * STEPS)
    assert names(frozen) == ["learning_rate_low"]


def test_a_kl_over_its_limit_is_told_from_the_first_step():
    record = run(kl=[0.01, 7.0, *[0.01] * 38])
    (finding,) = diagnose(replace(record, metrics=record.metrics[:2])).findings
    assert finding.rule == "kl_explosion" and "step 2" in finding.evidence.lower() and "kl_limit 5" in finding.evidence


def test_the_gravest_comes_first_and_is_the_verdict():
    diagnosis = diagnose(run(facts={"prompts": 8}, kl=rising(0, 3), **{"completions/clipped_ratio": [0.5] * STEPS}))
    severities = [finding.severity for finding in diagnosis.findings]
    assert severities == sorted(severities, key=SEVERITIES.index) == ["serious", "warning", "note"]
    assert (
        diagnosis.sentence
        == "1 serious fault, 1 warning, 1 note in 40 of 40 steps: the policy has run far from its start."
    )


def test_every_finding_is_whole_sentences_with_figures():
    for _, fault, _ in CASES:
        for finding in diagnose(run(**fault)).findings:
            assert all(
                not text[0].islower() and text.endswith(".") for text in (finding.evidence, finding.cause, finding.cure)
            )
            assert any(character.isdigit() for character in finding.evidence) or "same reward" in finding.evidence


def test_steps_without_figures_are_passed_over():
    record = run()
    broken = [{"step": m["step"], "skipped_updates": 1.0} if m["step"] % 4 == 0 else m for m in record.metrics]
    assert names(replace(record, metrics=broken)) == ["gradient_spikes"]


# --- signs ------------------------------------------------------------------------------------------------------------


def test_a_course_compares_the_first_fifth_with_the_last():
    values = [{"x": float(i)} for i in range(40)]
    told = course(values, "x")
    assert (told.early, told.late) == (3.5, 35.5) and told.change == 32 and told.factor == pytest.approx(35.5 / 3.5)
    long = course([{"x": float(i)} for i in range(1000)], "x")
    assert (long.early, long.late) == (9.5, 974.5)  # 20 steps, 50 steps
    assert course(values[:7], "x") is None and course(values, "y") is None


def test_a_rise_counts_beyond_twice_its_standard_error():
    # 8 steps of 16 completions at each end, deviation 1: the rise has a standard error of sqrt(2 / 128) = 0.125
    assert surely_rises(run(reward=rising(0, 0.26)).metrics, 16)
    assert not surely_rises(run(reward=rising(0, 0.24)).metrics, 16)
    assert not surely_rises(run(reward=rising(0, -1)).metrics, 16)


def test_a_change_is_since_before_with_its_error():
    change = since_start(judged(0.4, None, error=0.03), "reward")
    assert change.gain == pytest.approx(0.4) and change.error == pytest.approx(0.03 * 2**0.5)
    running = {"before": {"reward": 0.0}, "step 10": {"reward": 0.1}, "step 20": {"reward": 0.3}}
    assert since_start(running, "reward").gain == pytest.approx(0.3)
    assert since_start({"before": {"reward": 0.0}}, "reward") is None and since_start(running, "judge") is None


def test_the_docs_tell_of_every_finding():
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    told = {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert told == {case[0] for case in CASES}
