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

from reinforcepp import ConfigError, ReinforceTrainer, load_policy
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


# --- runs in one folder -----------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_script_that_runs_again_keeps_the_earlier_run(base, tmp_path, capsys):
    folder = tmp_path / "run"
    trainer(base, folder, keep_last=1).train()
    (folder / "notes.txt").write_text("mine")
    runs = [contents(folder)]
    for number in (1, 2):
        trainer(base, folder, keep_last=1, seed=number).train()
        assert (
            f"Moved the earlier run in {folder} to {folder}/earlier_runs/{number}."
            in capsys.readouterr().err.replace("\n", "")
        )
        moved = contents(folder / "earlier_runs" / str(number))
        assert moved == {name: text for name, text in runs[-1].items() if name != "notes.txt"}
        assert (folder / "notes.txt").read_text() == "mine"
        runs.append({n: text for n, text in contents(folder).items() if not n.startswith("earlier_runs")})
    resumed = trainer(base, folder, keep_last=1, seed=2, resume=True)
    assert resumed.train().global_step == 2
    (folder / "notes.txt").unlink()
    trainer(base, folder, overwrite=True).train()
    assert sorted(path.name for path in (folder / "earlier_runs").iterdir()) == ["1", "2"]


def test_other_files_in_the_folder_stay(base, tmp_path):
    (tmp_path / "data.csv").write_text("mine")
    trainer(base, tmp_path).train()
    assert (tmp_path / "data.csv").read_text() == "mine" and (tmp_path / "model.safetensors").is_file()
    tiny.save(tmp_path / "model")
    before = contents(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds files that reinforcepp didn't write"):
        trainer(base, tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_a_new_trainer_resumes_with_more_steps(base, tmp_path, capsys):
    settings = {"save_every": 1, "keep_last": 2}
    whole = trainer(base, tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    trainer(base, tmp_path / "run", **settings).train()
    more = trainer(base, tmp_path / "run", max_steps=4, **settings)
    assert more.train(resume_from_checkpoint=True).global_step == 4
    assert "max_steps was 2 and is 4" in " ".join(capsys.readouterr().err.split())
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    other = trainer(base, tmp_path / "other", max_steps=4, **settings)
    assert other.train(resume_from_checkpoint=checkpoint).global_step == 4
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    again = trainer(base, tmp_path / "whole", max_steps=4, seed=9, **settings)
    before = contents(tmp_path / "whole")
    with pytest.raises(ConfigError, match="seed was 42 and is 9"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        trainer(base, tmp_path / "new").train(resume_from_checkpoint=True)
    assert contents(tmp_path / "whole") == before


def test_a_finished_run_without_checkpoints_is_returned(base, tmp_path):
    whole = trainer(base, tmp_path / "run")
    whole.train()
    again = trainer(base, tmp_path / "run")
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert torch.equal(again.model.lm_head.weight, whole.model.lm_head.weight)
    assert again.state.log_history[0] == whole.state.log_history[0]
    with pytest.raises(ConfigError, match="finished after 2 steps and it has no checkpoint, so it can't continue"):
        trainer(base, tmp_path / "run", max_steps=4).train(resume_from_checkpoint=True)
