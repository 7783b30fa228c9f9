"""Comparison of estimators: hand-computed statistics, and a short run of the whole command on the built-in model."""

import json
import re
import sys
from pathlib import Path

import pytest
from warm import warm_python

from reinforcepp.commands.compare_estimators import command
from reinforcepp.commands.compare_estimators import run as comparison
from reinforcepp.config import CompareAlgorithmsConfig
from reinforcepp.errors import ConfigError
from reinforcepp.files import write_json
from reinforcepp.reports.estimators import verdict, write_page


def run_of(name, seed, scores, kl=0.1, diverged=None):
    evaluations = [
        {
            "step": 10 * i,
            "seconds": 20.0 * i,
            "tokens": 1000.0 * i,
            "reward": s,
            "judge": s,
            "kl": kl * i,
            "length": 9.0,
        }
        for i, s in enumerate(scores)
    ]
    return {
        "estimator": name,
        "seed": seed,
        "learning_rate": 1e-4,
        "completions": 32,
        "evaluations": evaluations,
        "diverged": diverged,
        "step_seconds": 2.0,
        "phase_seconds": {"rollout": 1.5, "update": 0.5},
        "peak_rss_mib": 500.0,
    }


@pytest.fixture
def made():
    config = CompareAlgorithmsConfig(estimators="reinforce_plus_plus,ppo", seeds=2, learning_rate=1e-5)
    runs = [
        run_of("reinforce_plus_plus", 0, [0.4, 0.7, 0.9]),
        run_of("ppo", 0, [0.4, 0.5, 0.6]),
        run_of("reinforce_plus_plus", 1, [0.4, 0.8, 0.9]),
        run_of("ppo", 1, [0.4, 0.5, 0.8], diverged="the gradient is <script>alert(1)</script>"),
    ]
    return {
        "settings": comparison.asdict(config),
        "estimators": comparison.summary(config, runs),
        "sensitivity": comparison.sensitivity(runs),
        "runs": runs,
    }


def test_mean_and_interval_are_students():
    both = comparison.mean_and_interval([1.0, 2.0, 3.0])
    assert both["mean"] == 2 and both["interval"] == pytest.approx(4.303 / 3**0.5)
    assert comparison.mean_and_interval([5.0]) == {"mean": 5.0, "interval": 0.0}


def test_the_summary_by_hand(made):
    own, ppo = made["estimators"]["reinforce_plus_plus"], made["estimators"]["ppo"]
    assert own["final"]["judge"]["mean"] == pytest.approx(0.9) and own["worst_seed"] == 0.9
    assert own["target"] == pytest.approx(0.4 + 0.9 * 0.5)
    # 0.85 lies 3/4 of the way from 0.7 to 0.9 and half the way from 0.8 to 0.9, each step of 20 s
    assert own["to_target"]["seconds"]["mean"] == pytest.approx((35 + 30) / 2)
    assert own["to_target"]["tokens"]["mean"] == pytest.approx((1750 + 1500) / 2)
    assert own["reached_target"] == 2 and ppo["reached_target"] == 0 and ppo["to_target"]["seconds"] is None
    assert ppo["diverged"] == 1 and own["diverged"] == 0


def test_the_grid_has_the_worst_outcome_and_the_spread(made):
    grid = made["sensitivity"]["ppo"]
    assert grid["worst"] == 0.6 and grid["best"] == 0.8
    assert grid["spread"] == pytest.approx(0.2 / 2**0.5)


def test_the_verdict_names_estimators_without_a_significant_difference(made):
    assert "not significantly better than ppo" in verdict(made)  # two seeds of ppo scatter too much
    made["estimators"]["ppo"]["final"]["judge"]["interval"] = 0.01
    assert verdict(made).startswith("reinforce_plus_plus ") and "better than all others" in verdict(made)


def test_the_page_is_whole_and_shows_text_as_text(made, tmp_path):
    made["settings"]["model"] = "<script>alert(1)</script>"
    write_page(made, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    titles = re.findall(r'<span class="chart-title">(.*?)</span>', page)
    assert titles == ["Held-out score", "Held-out score against KL", "Time by phase"]
    assert not re.search(r"<[^>]*(src|href)=", re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL))
    assert "0.900 ± 0.000" in page


def test_the_command_prints_the_verdict_and_writes_the_page(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "compare_algorithms", lambda config: made)
    command.run_compare_estimators(CompareAlgorithmsConfig(output_dir=str(tmp_path)))
    assert (tmp_path / "comparison.html").is_file()
    assert " ".join(verdict(made).split()) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimators": "ppo,reinforce"}, r"estimators: 'reinforce'"),
        ({"estimators": "ppo,ppo"}, "twice"),
        ({"seeds": 1}, "at least 2"),
        ({"num_generations": 1}, "num_generations"),
        ({"judge": "builtin:judge", "data": "my.csv"}, "judge.*none"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompareAlgorithmsConfig(**settings)


def test_the_grid_has_every_cell_once():
    config = CompareAlgorithmsConfig(estimators="reinforce_plus_plus,grpo", learning_rate=3e-4)
    cells = [
        (r.estimator, round(r.learning_rate, 6), r.completions_per_step)
        for r in comparison.planned_grid(config, Path("x"))
    ]
    assert len(set(cells)) == len(cells) == 2 * 9
    assert {size for _, _, size in cells} == {4, 8, 32} and {rate for _, rate, _ in cells} == {1e-4, 3e-4, 9e-4}


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    from reinforcepp.config import RewardModelConfig
    from reinforcepp.training.reward_trainer import train_reward_model

    folder = tmp_path_factory.mktemp("reward") / "model"
    train_reward_model(
        RewardModelConfig(output_dir=str(folder), data="example_feedback_diverse.csv", num_train_epochs=1)
    )
    return folder


def test_the_whole_command_and_its_resume(reward_folder, tmp_path, monkeypatch):
    settings = {
        "output_dir": str(tmp_path / "out"),
        "reward_model": str(reward_folder),
        "estimators": "reinforce_plus_plus,ppo",
        "seeds": 2,
        "processes": 2,
        "max_steps": 2,
        "batch_size": 2,
        "num_generations": 2,
        "max_new_tokens": 8,
        "eval_prompts": 4,
        "eval_every": 1,
        "rollout": "transformers",
    }
    monkeypatch.setattr(sys, "executable", warm_python())
    result = comparison.compare_algorithms(CompareAlgorithmsConfig(**settings))
    assert len(result["runs"]) == 4
    for run in result["runs"]:
        assert [e["step"] for e in run["evaluations"]] == [0, 1, 2] and all(
            0 <= e["judge"] <= 1 for e in run["evaluations"]
        )
        assert run["peak_rss_mib"] > 100 and run["step_seconds"] > 0
    starts = {(e["reward"], e["judge"]) for e in (run["evaluations"][0] for run in result["runs"])}
    assert len(starts) == 1  # all are judged on the same prompts from the same start
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    monkeypatch.setattr(comparison, "_run", None)  # nothing is left to run
    again = comparison.compare_algorithms(CompareAlgorithmsConfig(**settings, resume=True))
    assert again["runs"] == result["runs"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["runs"] == result["runs"]
    with pytest.raises(ConfigError, match="already holds a run"):
        comparison.compare_algorithms(CompareAlgorithmsConfig(**settings))


def test_the_page_is_drawn_without_complaints(window, made, tmp_path):
    made["settings"]["model"] = "<script>document.title='owned'</script>"
    write_page(made, tmp_path / "page.html")
    for width, scheme in ((1100, "light"), (360, "dark")):
        opened = window(width=width, scheme=scheme)
        shown = opened.open(tmp_path / "page.html")
        shown.wait_for_selector(".chart canvas")
        assert shown.locator(".chart canvas").count() == 3 and shown.title() == "Estimators compared"
        assert opened.complaints == [] and opened.overflow() <= 0 and opened.low_contrasts() == []


def test_a_run_that_was_stored_under_old_names_is_finished(tmp_path):
    config = CompareAlgorithmsConfig(output_dir=str(tmp_path), learning_rate=1e-5, micro_batch_size=4, resume=True)
    job = comparison._job(config, next(comparison.planned(config, tmp_path)))
    old = {"settings": dict(job["settings"]), "split_seed": job["split_seed"]}
    old["settings"]["mini_batch_size"] = old["settings"].pop("micro_batch_size")
    write_json(tmp_path / "job.json", old)
    assert not comparison._is_done(tmp_path, job)
    write_json(tmp_path / "result.json", {})
    assert comparison._is_done(tmp_path, job)
    assert not comparison._is_done(tmp_path, job | {"split_seed": 1})
