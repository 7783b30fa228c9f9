"""What a training shows and reports while it runs: terminal, plain lines, TensorBoard, the doctor's findings."""

from __future__ import annotations

import io
import json
import re

import pytest
import tiny
from rich.console import Console

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands.cli import main
from reinforcepp.distributed.ranks import check_trackers
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring import progress, read_metrics
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.reports.run.curves import throughput
from reinforcepp.runtime import terminal as output
from reinforcepp.training import monitor

PROMPTS = [{"prompt": f"Why does host {i} answer slowly?"} for i in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base") / "model"))


def length(prompts, completions, completion_ids, **_):
    return [float(sum(ids) % 7) for ids in completion_ids]


def train(base, folder, reward=length, **settings):
    defaults = {
        "max_new_tokens": 6,
        "max_prompt_length": 40,
        "batch_size": 4,
        "max_steps": 10,
        "rollout": "transformers",
        "keep_last": 2,
    }
    trainer = ReinforceTrainer(base, reward, ReinforceConfig(output_dir=str(folder), **(defaults | settings)), PROMPTS)
    trainer.train()
    return trainer


@pytest.fixture
def terminal(monkeypatch):
    """A terminal, and what is printed on it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    monkeypatch.setattr(monitor, "console", console)
    monkeypatch.setattr(progress, "console", console)
    monkeypatch.setattr(output, "console", console)
    return console.file


def test_on_a_terminal_there_is_a_live_view(base, tmp_path, terminal):
    train(base, tmp_path / "run")
    last = terminal.getvalue().split("╭─")[-1]
    assert "step 10 of 10" in last and "tokens/s" in last and "sample" in last
    assert "Why does host" in last and "truncated" in last
    shown = int(re.search(r"([\d,]+) tokens/s", last)[1].replace(",", ""))
    assert shown == pytest.approx(throughput(read_run(tmp_path / "run"))[-1], abs=0.51)  # as in the report


def test_without_a_terminal_there_are_plain_lines(base, tmp_path, capsys):
    train(base, tmp_path / "run")
    printed = capsys.readouterr().err
    assert "training 10/10, reward" in printed and "╭" not in printed and "\x1b" not in printed


def test_a_problem_is_reported_once_during_training(base, tmp_path, capsys):
    train(base, tmp_path / "run", reward=lambda prompts, completions, **_: [1.0] * len(prompts), max_steps=20)
    printed = capsys.readouterr().err
    assert printed.count("Rewards don't distinguish responses.") == 1 and "Step 10: " in printed


def test_a_resumed_run_includes_earlier_steps_in_the_diagnosis(base, tmp_path, capsys):
    train(base, tmp_path / "run", max_steps=6, save_every=3)
    capsys.readouterr()
    train(base, tmp_path / "run", max_steps=10, save_every=3, resume=True, allow_changes="max_steps")
    assert "Many completions are truncated." in capsys.readouterr().err  # after step 10, of which this run made four


# --- trackers ---------------------------------------------------------------------------------------------------------


def events(folder):
    """What TensorBoard shows: values by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "trackers" / "reinforcepp"))
    accumulator.Reload()
    found = {name: accumulator.Scalars(name) for name in accumulator.Tags()["scalars"]}
    assert all(len({e.step for e in values}) == len(values) for values in found.values()), "no step is there twice"
    return {name: {e.step: e.value for e in values} for name, values in found.items()}


def test_tensorboard_gets_every_metric_of_every_step(base, tmp_path):
    train(base, tmp_path / "run", report_to=("tensorboard",), max_steps=4)
    shown, logged = events(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert set(shown) >= {"reward", "kl", "entropy", "loss", "step_time", "time/rollout", "completions/mean_length"}
    for name in ("reward", "kl", "time/rollout"):
        assert shown[name] == {m["step"]: pytest.approx(m[name], rel=1e-5, abs=1e-7) for m in logged}


def test_after_a_resume_each_step_is_there_once(base, tmp_path):
    run = {"report_to": ("tensorboard",), "save_every": 2}
    train(base, tmp_path / "run", max_steps=3, **run)
    train(base, tmp_path / "run", max_steps=5, resume=True, allow_changes="max_steps", **run)
    shown, logged = events(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert shown["reward"] == {m["step"]: pytest.approx(m["reward"], rel=1e-5) for m in logged}
    assert list(shown["reward"]) == [1, 2, 3, 4, 5]


def test_no_tracker_by_default(base, tmp_path):
    train(base, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run" / "trackers").exists()


def test_a_missing_tracker_raises_before_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr("reinforcepp.distributed.ranks.get_available_trackers", list)
    with pytest.raises(ConfigError, match="report_to: mlflow"):
        train(base, tmp_path / "run", report_to=("mlflow",))
    assert not (tmp_path / "run").exists()
    check_trackers(())


def test_trackers_are_named_with_spaces_between(base, tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "run"), "--model", base, "--reward_model", "none-there"]
    assert main(["train", *flags, "--report_to", "tensorboard", "wandbb"]) == 2
    assert "report_to: tracker 'wandbb' not found" in capsys.readouterr().err
    config = tmp_path / "run.yaml"
    config.write_text("report_to: [tensorboard, wandbb]\n")
    assert main(["train", *flags, "--config", str(config)]) == 2
    assert "report_to: tracker 'wandbb' not found" in capsys.readouterr().err
    config.write_text("report_to: tensorboard\n")
    assert main(["train", *flags, "--config", str(config)]) == 2
    assert "report_to" not in capsys.readouterr().err  # a single name is a list of one


def test_run_json_holds_the_facts_of_the_run(base, tmp_path):
    train(base, tmp_path / "run", max_steps=1)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (
        facts["kind"] == "ReinforceConfig"
        and facts["prompts"] == 8
        and facts["rewards"] == [{"name": "length", "public_name": "length", "weight": 1.0, "card": None}]
    )
    assert (
        {"torch", "python", "processor", "device"} <= set(facts["environment"])
        and facts["started"]
        and facts["command"]
    )
