"""The run report: verdict, selected responses, settings that differ from the defaults, and missing parts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from html import unescape
from pathlib import Path

import pytest
import yaml
from made_runs import HOSTILE, evaluation_metrics, make_run

from reinforcepp.commands import cli
from reinforcepp.commands import report as command
from reinforcepp.config import ReportConfig, SftConfig, TrainConfig, as_dict, read_yaml
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.completion_log import evaluation_file
from reinforcepp.monitoring.metric_delta import Change, change_of
from reinforcepp.monitoring.run_record import RunRecord, read_run
from reinforcepp.reports.html import macro
from reinforcepp.reports.run import curves, samples, settings, summary
from reinforcepp.reports.run.page import report_page
from scripts import SOURCE

MEGABYTES = 1e6


def record(**parts) -> RunRecord:
    return RunRecord(Path("runs/one"), **parts)


def page_of(folder: Path, number: int = 6, **more) -> str:
    return report_page({folder.name: read_run(folder)}, number, **more)


def text_of(page: str) -> str:
    """Return the visible text on one line."""
    body = re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


# --- improved, regressed, inconclusive -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gain", "outcome"),
    [
        (0.29, "improved"),
        (0.28, "inconclusive"),
        (-0.28, "inconclusive"),
        (-0.29, "regressed"),
        (0, "inconclusive"),
    ],
)
def test_a_gain_counts_from_two_standard_errors(gain, outcome):
    change = change_of(
        "reward", evaluation_metrics(1.0), evaluation_metrics(1.0 + gain)
    )  # an error of 0.1 each: twice sqrt(0.02) is 0.283
    assert change.outcome == outcome and str(change).endswith(f"± 0.283: {outcome})")
    assert change.gain == pytest.approx(gain)


def test_a_change_needs_both_sides():
    assert change_of("judge", evaluation_metrics(1.0), evaluation_metrics(1.0, 0.5)) is None
    assert change_of("x", {"x": 1.0}, {"x": 2.0}) == Change("x", 1.0, 2.0, 0.0)


@pytest.mark.parametrize(
    ("reward", "judge", "begins", "tone"),
    [
        (2.0, 0.8, "Improved:", "good"),
        (2.0, 0.2, "Reward hacking:", "bad"),
        (2.0, 0.5, "Inconclusive:", "warn"),
        (2.0, None, "Improved:", "good"),
        (0.0, None, "Inconclusive:", "warn"),
        (0.0, 0.5, "Inconclusive:", "warn"),
        (0.0, 0.8, "Improved:", "good"),
        (0.0, 0.2, "Regressed:", "bad"),
        (-2.0, None, "Regressed:", "bad"),
        (-2.0, 0.2, "Regressed:", "bad"),
        (-2.0, 0.5, "Regressed:", "bad"),
        (-2.0, 0.8, "Inconclusive:", "warn"),
    ],
)
def test_the_verdict(reward, judge, begins, tone):
    before, after = evaluation_metrics(0.0, judge and 0.5), evaluation_metrics(reward, judge, length=30.0)
    run = record(
        evaluations={"before": before, "after": after}, facts={"heldout_prompts": 40}, settings={"eval_prompts": 8}
    )
    found = summary.verdict(run)
    assert found.text.startswith(begins) and found.tone == tone
    assert "on 8 held-out prompts after training" in found.text
    assert "KL to the reference policy is 0.050 nats per token" in found.text and "1.50 times as long" in found.text
    assert ("judge's score" in found.text) == (judge is not None)
    assert ("no judge" in found.text) == (judge is None and begins == "Improved:")


def test_the_verdict_states_rises_and_falls():
    run = record(evaluations={"before": evaluation_metrics(0.0, 0.5), "after": evaluation_metrics(2.0, 0.2)})
    assert "the reward rose from 0.000 to 2.000 (+2.000 ± 0.283)" in summary.verdict(run).text
    assert "training doesn't use, fell from 0.500 to 0.200 (-0.300 ± 0.057)" in summary.verdict(run).text


def test_a_judge_score_that_falls_during_training_is_reward_hacking_since_that_step():
    course = {
        "before": evaluation_metrics(0.0, 0.5),
        "step 5": evaluation_metrics(1.0, 0.9),
        "step 9": evaluation_metrics(1.5, 0.8),
        "after": evaluation_metrics(2.0, 0.7),
    }
    found = summary.verdict(record(evaluations=course))
    assert found.text.startswith("Reward hacking since step 5: ") and found.tone == "bad"
    assert "has fallen from 0.900 to 0.700 (-0.200 ± 0.057)" in found.text
    within_error = course | {"step 5": evaluation_metrics(1.0, 0.75), "step 9": evaluation_metrics(1.5, 0.7)}
    assert summary.verdict(record(evaluations=within_error)).text.startswith("Improved:")
    reward_fell_too = course | {"step 5": evaluation_metrics(3.0, 0.9), "step 9": evaluation_metrics(3.0, 0.8)}
    assert summary.verdict(record(evaluations=reward_fell_too)).text.startswith("Improved:")


def test_the_latest_evaluation_of_an_unfinished_run():
    run = record(
        evaluations={
            "before": evaluation_metrics(0.0),
            "step 9": evaluation_metrics(1.0),
            "step 10": evaluation_metrics(3.0),
        },
        facts={"num_steps": 50},
    )
    assert "after step 10 of 50, the reward rose from 0.000 to 3.000" in summary.verdict(run).text
    assert samples.latest({"before": {}}) is None
    assert samples.latest({"step 90": {}, "step 100": {}, "after": {}}) == "after"


def test_without_held_out_prompts_the_verdict_is_inconclusive():
    log = [{"step": i, "reward": float(i)} for i in range(1, 21)] + [{"step": 21}]
    found = summary.verdict(record(metrics=log))
    assert (
        found.text == "Inconclusive: no held-out prompts were evaluated. The training reward went from 1.500 to 19.500."
    )
    before = record(metrics=log, evaluations={"before": evaluation_metrics(0.0)})
    assert "before training, but not yet again" in summary.verdict(before).text
    assert [f.name for f in summary.key_metrics(before)] == ["Training reward", "Steps"]
    assert "the log has no reward" in summary.verdict(record()).text


def test_key_metrics():
    log = [{"step": i, "reward": 1.0, "num_tokens": 100.0 * i, "step_time": 30.0} for i in (1, 2, 3, 4)]
    run = record(
        metrics=log,
        evaluations={
            "before": evaluation_metrics(0.0, 0.5),
            "after": evaluation_metrics(2.0, 0.2, length=30.0, truncated=0.25),
        },
        facts={"num_steps": 9},
    )
    metrics = {metric.name: metric for metric in summary.key_metrics(run)}
    assert (metrics["Held-out reward"].value, metrics["Held-out reward"].tone) == ("0.00 → 2.00", "good")
    assert (metrics["Held-out judge score"].note, metrics["Held-out judge score"].tone) == (
        "-0.300 ± 0.057: regressed",
        "bad",
    )
    assert (metrics["Response length"].value, metrics["Response length"].note) == ("1.50x", "20.0 → 30.0 tokens")
    assert (metrics["Truncated"].value, metrics["Steps"].value, metrics["Steps"].note) == ("25%", "4", "of 9")
    assert (metrics["Training time"].value, metrics["Tokens"].value) == ("2 min", "400")
    assert summary.status(run) == "Not finished: 4 of 9 steps. It is still running, was stopped, or failed."
    assert [summary.duration(s) for s in (5, 600, 7500)] == ["5 s", "10 min", "2 h 05 min"]


# --- which samples ------------------------------------------------------------------------------------------------------


def test_samples_are_early_middle_late_and_of_highest_reward(tmp_path):
    chosen = samples.choose_samples(read_run(make_run(tmp_path / "run", steps=9, logged=9)), 3)
    assert [group.title for group in chosen.groups] == [
        "Early: step 1",
        "Middle: step 5",
        "Late: step 9",
        "Highest rewards of the run",
    ]
    early = chosen.groups[0].samples
    assert [sample.completion.split(".")[0] for sample in early] == [
        "Answer 15 of step 1",
        "Answer 7 of step 1",
        "Answer 0 of step 1",
    ]  # from the highest reward to the lowest
    best = chosen.groups[3].samples
    assert [sample.step for sample in best] == [9, 9, 9]
    assert [sample.completion.split(".")[0] for sample in best] == [f"Answer {i} of step 9" for i in (15, 14, 13)]
    assert best[0].finish_reason == "length" and best[0].length == 19 and best[0].rewards["<b>length</b>"] == 0


def test_highest_rewards_are_found_in_all_steps_and_each_text_once(tmp_path):
    import random

    from made_runs import completions

    from reinforcepp.monitoring.completion_log import save_completions, step_file

    folder = make_run(tmp_path / "run", steps=9, logged=9)
    for step, places in ((5, (2, 5, 9)), (7, (1,))):
        table = completions(step, "", random.Random(0))
        for i in places:
            table["reward"][i], table["completion"][i] = 99.0, "Buy now!"
        table["reward"][7] = float("nan")
        save_completions(folder / "completions" / step_file(step), table)
    chosen = samples.choose_samples(read_run(folder), 20)
    best = chosen.groups[-1].samples
    assert (best[0].completion, best[0].seen, best[0].step) == ("Buy now!", 4, 5)
    assert best[1].completion.startswith("Answer 15 of step 9") and best[1].seen == 1
    assert [len(group.samples) for group in chosen.groups] == [16, 15, 16, 20], (
        "completions without a reward are skipped"
    )


def test_points_of_reward_against_length_are_of_the_first_and_the_last_third(tmp_path):
    chosen = samples.choose_samples(read_run(make_run(tmp_path / "run", steps=9, logged=9)), 2)
    assert {step for *_, step in chosen.early} == {1, 2, 3} and {step for *_, step in chosen.late} == {7, 8, 9}
    assert len(chosen.early) == 3 * 16
    chart = curves.length_charts(chosen)
    assert "correlation: early third +" in chart[0] and "late third +" in chart[0]


def test_many_points_are_thinned(tmp_path):
    folder = make_run(tmp_path / "run", steps=300, logged=300)
    chosen = samples.choose_samples(read_run(folder), 1)
    assert samples.MAX_POINTS * 0.9 < len(chosen.early) <= samples.MAX_POINTS
    assert {step for *_, step in chosen.early} == set(range(1, 101))


def test_pairs_belong_to_one_prompt_and_the_largest_gain_comes_first(tmp_path):
    folder = make_run(tmp_path / "run", heldout=6)
    pairs = samples.choose_pairs(read_run(folder))
    assert [pair.prompt.split("?")[0] for pair in pairs.pairs] == [f"Held-out {i}" for i in range(6)]
    assert all(f"says {i}." in answer for i, pair in enumerate(pairs.pairs) for answer in pair.responses)
    assert [pair.change for pair in pairs.pairs] == [5, 4, 3, 2, 1, 0]
    assert pairs.pairs[2].judge == (2 / 6, 2 / 6) and pairs.pairs[2].lengths == (12, 12)


def test_pairs_are_matched_by_their_prompt(tmp_path):
    from reinforcepp.monitoring.completion_log import read_completions, save_completions

    folder = make_run(tmp_path / "run", heldout=6)
    path = evaluation_file(folder, "after")
    rows = read_completions(path)[::-1][:5]
    save_completions(path, {name: [row[name] for row in rows] for name in rows[0]})
    pairs = samples.choose_pairs(read_run(folder)).pairs
    assert len(pairs) == 5
    assert all(pair.prompt.split()[1].rstrip("?") == pair.responses[1].split()[2].rstrip(".") for pair in pairs)


# --- settings -----------------------------------------------------------------------------------------------------------


def test_settings_that_differ_from_the_defaults(tmp_path):
    run = read_run(make_run(tmp_path / "run", settings={"kl_limit": None, "gone": 3}))
    rows = {row.name: row for row in settings.settings_of(run)}
    assert {name for name, row in rows.items() if row.differs} == {"reward_model", "batch_size", "kl_limit"}
    assert (rows["batch_size"].value, rows["batch_size"].default) == ("16", "8")
    assert (rows["kl_limit"].value, rows["kl_limit"].default) == ("None", "5")
    assert rows["gone"].default is None and not rows["gone"].differs
    unknown = record(settings=run.settings, facts={"kind": "Unheard"})
    assert not any(row.differs for row in settings.settings_of(unknown))


def test_the_defaults_are_those_of_the_class_that_the_run_names():
    train, sft = as_dict(TrainConfig()), as_dict(SftConfig())
    for kind, defaults in (("TrainConfig", train), ("SftConfig", sft)):
        rows = settings.settings_of(record(settings=train, facts={"kind": kind}))
        expected = {n for n, v in train.items() if n in defaults and v != defaults[n] and n not in settings.PER_RUN}
        assert {row.name for row in rows if row.differs} == expected and bool(expected) == (kind == "SftConfig")


def test_the_reproduce_command_gives_the_same_configuration(tmp_path):
    config = TrainConfig(output_dir="out", learning_rate=3e-6, kl_limit=None, data="a: b.csv", micro_batch_size=4)
    again = settings.reproduce(record(settings=as_dict(config), facts={"kind": "TrainConfig"}))
    (tmp_path / "run.yaml").write_text(again.yaml, encoding="utf-8")
    assert read_yaml(str(tmp_path / "run.yaml"), TrainConfig)["learning_rate"] == 3e-6
    words = again.command.replace("run.yaml", str(tmp_path / "run.yaml")).split()
    assert cli.parse("train", words[2:]) == TrainConfig(**as_dict(config) | {"output_dir": "runs/again"})
    assert "output_dir" not in yaml.safe_load(again.yaml)
    assert settings.reproduce(record(settings=as_dict(config), facts={"kind": "ReinforceConfig"})) is None


def test_differing_settings_of_several_runs():
    one, two = as_dict(TrainConfig()), as_dict(TrainConfig(kl_coef=0.2, output_dir="elsewhere")) | {"new": True}
    rows = settings.differing({"a": record(settings=one), "b": record(settings=two)})
    assert rows == [("kl_coef", ["0.05", "0.2"]), ("new", ["-", "True"])]


# --- curves -------------------------------------------------------------------------------------------------------------


def test_throughput_is_per_step_and_missing_without_new_tokens():
    log = [
        {"step": 1, "num_tokens": 100.0, "step_time": 2.0},
        {"step": 2, "num_tokens": 100.0, "step_time": 2.0},
        {"step": 3, "num_tokens": 400.0, "step_time": 3.0},
        {"step": 4},
    ]
    assert curves.throughput(record(metrics=log)) == [50.0, None, 100.0, None]


def specs(html_text: str) -> dict[str, dict]:
    """The data of every chart by its title."""
    found = re.findall(
        r'<span class="chart-title">(.*?)</span>.*?<script type="application/json">(.*?)</script>', html_text, re.DOTALL
    )
    return {unescape(title): json.loads(data) for title, data in found}


def test_charts_of_datasets():
    log = [{"step": 1, "sources/a/reward": 0.5, "sources/a/success_rate": 1.0}, {"step": 2, "sources/b/reward": 2.0}]
    drawn = specs("".join(curves.outcome_charts({"run": record(metrics=log)})))
    reward, successes = drawn["Reward by dataset"]["series"], drawn["Successes by dataset"]["series"]
    assert [(line["name"], line["y"]) for line in reward] == [("a", [0.5, None]), ("b", [None, 2.0])]
    assert successes[0]["y"] == [1.0, None]


def test_the_charts_of_a_run(tmp_path):
    run = read_run(make_run(tmp_path / "run", skipped=(5,)))
    drawn = specs("".join(curves.outcome_charts({"run": run})))
    assert list(drawn) == [
        "Reward",
        "Reward by function",
        "KL to the reference policy",
        "Entropy",
        "Completion length",
    ]
    (reward,) = drawn["Reward"]["series"]
    assert reward["x"] == list(range(1, 13)) and reward["y"][4] is None and reward["low"][4] is None
    assert reward["high"][0] - reward["y"][0] == pytest.approx(0.7, abs=1e-4)
    assert [s["name"] for s in drawn["Reward by function"]["series"]] == ["style", "<b>length</b>"]
    assert drawn["Completion length"]["series"][0]["low"][0] == 4
    charts, constant = curves.diagnostic_charts({"run": run})
    assert {"Truncated", "Clip fraction", "Gradient norm", "Loss", "Skipped updates"} == set(specs("".join(charts)))
    assert constant == ["learning rate 1.00e-05"]
    speed = specs("".join(curves.speed_charts({"run": run})))
    assert list(speed) == ["Throughput", "Step time", "Time by phase"] or list(speed) == [
        "Throughput",
        "Time by phase",
    ]


def test_the_kl_limit_is_drawn_when_it_is_in_reach(tmp_path):
    near = read_run(make_run(tmp_path / "near", settings={"kl_limit": 0.04}))
    far = read_run(make_run(tmp_path / "far"))
    assert specs("".join(curves.outcome_charts({"a": near})))["KL to the reference policy"]["limits"] == [
        {"name": "kl_limit", "y": 0.04}
    ]
    assert specs("".join(curves.outcome_charts({"a": far})))["KL to the reference policy"]["limits"] == []


def test_evaluations_on_the_way_are_a_curve(tmp_path):
    folder = make_run(
        tmp_path / "run",
        evaluations={
            "before": evaluation_metrics(0.0),
            "after": evaluation_metrics(3.0),
            "step 10": evaluation_metrics(2.0),
            "step 5": evaluation_metrics(1.0),
        },
    )
    drawn = specs("".join(curves.outcome_charts({"run": read_run(folder)})))
    (line,) = drawn["Held-out reward"]["series"]
    assert (line["x"], line["y"]) == ([0, 5, 10, 12], [0, 1, 2, 3])
    assert line["high"][1] == pytest.approx(1.2) and "Held-out judge score" not in drawn


def test_the_sampling_gap_is_shown_where_there_is_one():
    for gap, expected in ((5e-7, False), (5e-3, True)):
        log = [{"step": i, "sampling/logprob_gap_mean": gap * i, "sampling/logprob_gap_max": gap * i} for i in (1, 2)]
        charts, _ = curves.diagnostic_charts({"run": record(metrics=log)})
        assert bool(charts) == expected


def test_curves_of_several_runs_are_overlaid(tmp_path):
    runs = {name: read_run(make_run(tmp_path / name, steps)) for name, steps in (("a", 12), ("b", 7))}
    drawn = specs("".join(curves.outcome_charts(runs)))
    for title in ("Reward", "Reward of style", "KL to the reference policy", "Entropy", "Completion length"):
        assert [(s["name"], s["color"], len(s["x"])) for s in drawn[title]["series"]] == [("a", 0, 12), ("b", 1, 7)]
    phases = specs("".join(curves.speed_charts(runs)))["Time by phase"]
    assert phases["names"] == ["rollout", "update"] and [s["y"][1] for s in phases["series"]] == [1.0, 1.0]


# --- the page: what is missing, what is found ---------------------------------------------------------------------------------


def test_the_page_of_a_whole_run(tmp_path):
    page = page_of(make_run(tmp_path / "run"))
    text = text_of(page)
    for expected in (
        "Improved: on 8 held-out prompts",
        "Finished: 12 of 12 steps.",
        f"2 of {len(fields(TrainConfig))} settings differ from the defaults",
        "model builtin:tiny, fingerprint 0123456789abcdef",
        "accuracy 0.91",
        "reinforcepp train --config run.yaml",
        "torch 2.13.0",
        "judge builtin:judge",
        "Answer 15 of step 12.",
        "before says 3.",
    ):
        assert expected in text
    assert 'class="missing"' not in page and 'id="events"' not in page and 'id="findings"' not in page
    ids = re.findall(r'<section id="(\w+)"', page)
    assert ids == ["curves", "responses", "samples", "diagnostics", "speed", "settings", "environment", "again"]
    assert re.findall(r'<a href="#(\w+)"', page) == ids
    assert not re.search(r'(src|href)="(?!#|data:)', page)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"evaluations": {}}, "No held-out prompts were evaluated. See eval_prompts and heldout_fraction."),
        (
            {"evaluations": {"before": evaluation_metrics(0.0)}},
            "Held-out prompts were evaluated before training, but not yet again.",
        ),
        ({"logged": 0, "settings": {"log_completions": False}}, "because log_completions was off"),
        ({"logged": 0}, "The run has no completions because an older version wrote it or they were removed."),
        ({"facts": {"num_steps": 40}}, "Not finished: 12 of 40 steps"),
        ({"skipped": (2, 3)}, "Gaps are steps without an update (2 in total)."),
        ({"facts": {"kind": "Unheard"}}, "has no defaults for settings of this kind"),
        ({"facts": {"kind": "ReinforceConfig"}}, "The run was started from Python"),
    ],
)
def test_missing_parts_are_explained(tmp_path, parts, expected):
    assert expected in text_of(page_of(make_run(tmp_path / "run", **parts)))


def test_an_old_run_with_few_files(tmp_path):
    folder = make_run(tmp_path / "run", logged=0)
    for name in ("timings.jsonl", "evaluation.json", "evaluations/before.parquet", "evaluations/after.parquet"):
        (folder / name).unlink()
    (folder / "run.json").write_text('{"settings": {}}', encoding="utf-8")
    (folder / "metrics.jsonl").write_text('{"reward": 1.0}\n{"reward": 2.0}\n', encoding="utf-8")
    text = text_of(page_of(folder))
    assert "The training reward went from 1.000 to 2.000" in text
    for expected in (
        "recorded no settings",
        "recorded no environment",
        "recorded no fingerprints",
        "recorded neither a command",
    ):
        assert expected in text
    (folder / "metrics.jsonl").write_text("", encoding="utf-8")
    assert "The log has no steps yet" in text_of(page_of(folder)) and "No step is finished yet." in text_of(
        page_of(folder)
    )


def test_damaged_files_of_responses_are_named_and_skipped(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "completions" / "step-000012.parquet").write_bytes(b"no table")
    text = text_of(page_of(folder))
    assert "can't be read: step-000012.parquet." in text and "Late: step 11" in text
    evaluation_file(folder, "after").write_bytes(b"no table")
    assert "The held-out responses can't be read" in text_of(page_of(folder))
    for path in (folder / "completions").iterdir():
        path.write_bytes(b"no table")
    assert "No file in completions can be read." in text_of(page_of(folder))


@dataclass
class Found:
    severity: str = "warning"
    title: str = "KL is high"
    evidence: str = "kl 3.1 <b>"
    cause: str = ""
    fix: str = "raise kl_coef"


def test_findings_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    page = page_of(folder, findings={"run": [Found(), Found(severity="error")]})
    assert "warning KL is high Evidence kl 3.1 <b> Fix raise kl_coef" in text_of(page)
    assert page.index('id="findings"') < page.index('id="curves"') and page.count('class="finding ') == 2
    assert "The doctor found no problems." in text_of(page_of(folder, findings={"run": []}))
    both = report_page({"a": read_run(folder), "b": read_run(folder)}, 1, {"b": [Found()]})
    assert both.count('class="finding ') == 1


def test_events_are_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    lines = [{"time": "2026-11-22T10:00:00+0000", "event": f"Skipped update {i} <i>"} for i in range(300)]
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    text = text_of(page_of(folder))
    assert "2026-11-22 10:00:00 Skipped update 299 <i>" in text and "update 99 " not in text
    assert "100 earlier events are in events.jsonl" in text


def test_long_texts_fold_and_very_long_ones_are_truncated():
    show = macro("macros.html", "model_text")
    assert "more" not in show("short") and "(empty)" in show(" ")
    assert 'class="more"' in show("x" * 400) and 'class="more"' in show("a\n" * 8)
    truncated = show("x" * 10_000)
    assert "(7,000 more characters)" in truncated and truncated.count("x") < 3100


@pytest.mark.parametrize("role", ["", HOSTILE], ids=["text", "conversation"])
def test_hostile_text_is_escaped_everywhere(tmp_path, role):
    folder = make_run(
        tmp_path / "run",
        text=HOSTILE,
        role=role,
        settings={"data": HOSTILE},
        facts={"command": HOSTILE, "judge": HOSTILE},
    )
    (folder / "events.jsonl").write_text(json.dumps({"time": HOSTILE, "event": HOSTILE}) + "\n", encoding="utf-8")
    page = page_of(folder)
    assert "<img" not in page and '<a href="javascript' not in page and "<b>length</b>" not in page
    assert (
        page.count("<script")
        == page.count("</script>")
        == len(re.findall(r'<script( type="application/json")?>', page))
    )
    assert not set(page) & set("\x1b\u202e")


# --- size ---------------------------------------------------------------------------------------------------------------


def test_the_page_of_a_long_run_with_long_texts_stays_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=6000, logged=10, heldout=500, text="<&" * 3000)
    page = page_of(folder, 50)
    assert len(page.encode()) < 5 * MEGABYTES
    assert re.search(r"The page shows \d+ of 500 prompts, those with the largest reward change", text_of(page))
    (line,) = specs(page)["Reward"]["series"]
    assert len(line["x"]) <= 1510 and line["x"][-1] == 6000


def test_the_page_of_many_runs_stays_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=3000, logged=4, heldout=100, text="<&" * 1000)
    one = read_run(folder)
    page = report_page({f"run {i}": one for i in range(20)}, 50)
    assert len(page.encode()) < 5 * MEGABYTES


# --- the command ----------------------------------------------------------------------------------------------------------


def test_the_page_is_in_the_runs_folder(tmp_path, capsys, monkeypatch):
    make_run(tmp_path / "runs" / "train")
    assert cli.main(["report", str(tmp_path / "runs" / "train")]) == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "Improved: on" in output and "report.html" in output
    assert "Run report: train" in (tmp_path / "runs" / "train" / "report.html").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report"]) == 0  # the default is where train writes
    assert cli.main(["report", "--runs", "runs/train", "--output", "other.html"]) == 0
    assert (tmp_path / "other.html").is_file()


def test_a_demo_is_found_by_its_folder_and_several_runs_make_a_page_here(tmp_path, capsys, monkeypatch):
    for name in ("one", "two"):
        make_run(tmp_path / name / "policy")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "one"]) == 0 and (tmp_path / "one" / "report.html").is_file()
    assert cli.main(["report", "one", "two"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "2 runs compared" in page and "one/policy" in page and "two/policy" in page
    assert "two/policy: Improved: on" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing"], "nothing: folder not found"),
        (["empty"], "isn't a training run"),
        (["run", "run"], "run: the run is listed twice"),
        (["run", "./run/"], "is listed twice"),
        (["run", "--output", "mine.html"], "mine.html: the file exists and isn't a report"),
        (["run", "--output", "none/x.html"], "folder none doesn't exist"),
        (["run", "--output", "empty"], "output must be the name of a file"),
        (["run", "--samples", "-1"], "samples must be at least 0"),
        (["run", "--samples", "51"], "at most 50, not 51"),
        (["run", "--smaples", "5"], "Did you mean '--samples'"),
        ([" "], "runs is empty or names an empty folder"),
        (["run"] * 21, "runs: 21"),
        (["damaged"], "damaged"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (make_run(tmp_path / "damaged") / "metrics.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine.html").write_text("<p>my own</p>", encoding="utf-8")
    assert cli.main(["report", *words]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ") and expected in output and output.count("\n") == 1
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == "<p>my own</p>"


def test_names_are_as_short_as_they_can_be():
    def names(*folders: str) -> list[str]:
        return command.names_of([Path(folder) for folder in folders])

    assert names("/a/b", "/a/c") == ["b", "c"]
    assert names("/a/x/run", "/b/x/run", "/c/y/other") == ["a/x/run", "b/x/run", "other"]
    assert names("/demo/policy") == ["demo/policy"]


def test_settings_from_a_file(tmp_path):
    (tmp_path / "report.yaml").write_text("runs: [a, b]\nsamples: 2\n", encoding="utf-8")
    assert cli.parse("report", ["--config", str(tmp_path / "report.yaml")]) == ReportConfig(("a", "b"), None, 2)
    assert cli.parse("report", ["x", "y", "--samples", "3"]) == ReportConfig(("x", "y"), None, 3)
    with pytest.raises(ConfigError, match="runs is empty"):
        ReportConfig(())


def test_a_report_loads_no_torch(tmp_path):
    make_run(tmp_path / "run")
    code = "import sys; from reinforcepp.commands.cli import main; main(['report', sys.argv[1]]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
    )
    assert done.stdout == "False\n", done.stderr
