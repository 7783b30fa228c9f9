"""The trainer object as TRL's users know it: its arguments, its attributes, and what its methods return."""

import inspect
from statistics import fmean

import pytest
import tiny
import torch
from small_trainer import PROMPTS, spread, trainer
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput
from trl import RLOOTrainer

from reinforcepp import ReinforceTrainer, load_policy
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.monitoring import read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def test_the_arguments_have_the_order_of_trl():
    ours, theirs = (list(inspect.signature(kind).parameters) for kind in (ReinforceTrainer, RLOOTrainer))
    assert ours[: len(theirs)] == theirs


def test_train_and_evaluate_return_what_trl_returns(base, tmp_path):
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:3], eval_every=1)
    before = load_policy(base).state_dict()
    output = run.train()
    log = run.state.log_history
    assert isinstance(output, TrainOutput) and isinstance(run.state, TrainerState)
    assert [entry["step"] for entry in log] == [1, 1, 2, 2, 2]
    steps = [entry for entry in log if "loss" in entry]
    assert steps == read_metrics(tmp_path / "run") and [entry["epoch"] for entry in steps] == pytest.approx(
        [1 / 3, 2 / 3]
    )
    assert (output.global_step, run.state.global_step, run.state.max_steps) == (2, 2, 2)
    assert output.training_loss == pytest.approx(fmean(entry["loss"] for entry in steps), abs=1e-8)
    assert log[-1]["train_loss"] == pytest.approx(output.training_loss, abs=1e-8)
    assert {"train_runtime", "train_loss"} <= set(output.metrics)
    rewards = [run.evaluations[name].reward for name in ("step 1", "after")]
    assert [entry["eval_reward"] for entry in log if "eval_reward" in entry] == pytest.approx(rewards)
    again = run.evaluate()
    assert again["eval_reward"] == run.evaluations["after"].reward and again["eval_samples"] == 3
    assert run.evaluate(metric_key_prefix="test")["test_reward"] == again["eval_reward"]
    assert run.train() == output and run.state.global_step == 2
    changed = [name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed and run.ref_model is not run.model
    assert run.processing_class.pad_token is not None and run.args.max_steps == 2
    assert (run.train_dataset, run.eval_dataset) == (PROMPTS, PROMPTS[:3]) and run.accelerator.is_main_process
    run.save_model(tmp_path / "copy")
    assert torch.equal(load_policy(str(tmp_path / "copy")).lm_head.weight, run.model.lm_head.weight)


def test_a_resumed_run_has_the_whole_history(base, tmp_path):
    settings = {"max_steps": 3, "eval_every": 1, "save_every": 1, "keep_last": 2}
    whole = trainer(base, tmp_path / "whole", spread, PROMPTS, PROMPTS[:2], **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    for resume in (str(checkpoint), True):  # from the middle, and the finished run of another process
        resumed = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2], resume=resume, **settings)
        output = resumed.train()
        drop = ("time", "train_")
        histories = [
            [{key: value for key, value in entry.items() if not any(part in key for part in drop)} for entry in log]
            for log in (whole.state.log_history, resumed.state.log_history)
        ]
        assert histories[0] == histories[1]
        assert output.global_step == 3
        assert output.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"], abs=1e-8)


def test_reward_functions_get_the_state_of_the_trainer(base, tmp_path):
    steps = []

    def watching(completion_ids, trainer_state, **_):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completion_ids)

    run = trainer(base, tmp_path / "run", watching)
    run.train()
    assert steps == [(0, 2), (1, 2)] and run.rewards.trainer_state is run.state


def test_epochs_can_be_a_fraction_and_save_and_evaluate(base, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Ranks, "track", lambda ranks, values, step: logged.append(step))
    args = {
        "max_steps": -1,
        "num_train_epochs": 1.5,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_total_limit": 5,
        "logging_steps": 2,
        "logging_first_step": True,
        "reward_clip_range": [0.2, 0.5],
    }
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2], **args)
    run.train()
    assert run.num_steps == 5  # 1.5 x 3 steps, rounded up
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert list(run.evaluations) == ["before", "step 3", "after"]
    assert logged == [1, 2, 4]
    assert any("reward_clipped_ratio" in entry for entry in run.state.log_history)
