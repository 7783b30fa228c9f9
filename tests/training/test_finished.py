"""Checkpoints of finished trainings: deleted by default, kept on request, and the folder can't be resumed by accident."""

import pytest
import tiny
import torch
from training.termination import send_sigterm_after
from training.test_resume import PROMPTS, stopping

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.models.loading import load_policy
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.run_dir import read_finished
from reinforcepp.training import checkpoint, trainer_methods
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model

DELETED = r"finished after 2 steps and its checkpoints were deleted"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base"), "llama"))


def lengths(prompts, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def trainer(base, folder, reward=lengths, **settings):
    usual = {"max_new_tokens": 4, "max_prompt_length": 40, "batch_size": 4, "learning_rate": 1e-3, "max_steps": 2}
    usual |= {"save_every": 1, "rollout": "transformers", "output_dir": str(folder)}
    return ReinforceTrainer(base, reward, ReinforceConfig(**(usual | settings)), PROMPTS)


def train_supervised(kind, base, data, folder, **settings):
    """Train two steps, with one held-out row."""
    usual = {"batch_size": 4, "micro_batch_size": 1, "num_train_epochs": 1, "heldout_fraction": 0.25, "save_every": 1}
    config_class, train = {
        "reward": (RewardModelConfig, train_reward_model),
        "sft": (SftConfig, train_language_model),
    }[kind]
    return train(config_class(model=base, data=str(data), output_dir=str(folder), **(usual | settings)))


def names(folder):
    return [path.name for path in checkpoint.list_checkpoints(folder)]


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


# --- what stays -------------------------------------------------------------------------------------------------------


def test_a_running_training_keeps_its_latest_checkpoint_and_a_finished_one_none(base, tmp_path, capsys):
    seen = []

    def watching(completion_ids, **columns):
        seen.append(names(tmp_path / "run"))
        return lengths(completion_ids=completion_ids, **columns)

    trainer(base, tmp_path / "run", watching, max_steps=3).train()
    assert seen == [[], ["step-000001"], ["step-000002"]]
    assert not (tmp_path / "run" / "checkpoints").exists()
    load_policy(str(tmp_path / "run"))
    printed = " ".join(capsys.readouterr().err.split())
    assert "Disk: up to 2 checkpoints of " in printed and ", deleted when training ends, and the model of" in printed
    assert "Deleting the checkpoints, because training is finished. To keep the latest one, set keep_last=1." in printed


@pytest.mark.parametrize("kept", [{"keep_last": 1}, {"keep_best": "reward"}, {"keep_last": 2}])
def test_checkpoints_that_the_user_asked_for_stay(base, tmp_path, kept, capsys):
    trainer(base, tmp_path / "run", **kept).train()
    assert "step-000002" in names(tmp_path / "run") and len(names(tmp_path / "run")) <= kept.get("keep_last", 2)
    assert "deleted when" not in capsys.readouterr().err
    more = trainer(base, tmp_path / "run", resume=True, **kept, max_steps=4, allow_changes="max_steps")
    stopping(more, 2)
    with pytest.raises(Interrupted):
        more.train()
    assert read_finished(tmp_path / "run") is None  # otherwise a run without its checkpoints would look finished
    again = trainer(base, tmp_path / "run", resume=True, **kept, max_steps=4, allow_changes="max_steps")
    assert [metrics["step"] for metrics in tiny.train(again)] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["reward", "sft"])
def test_supervised_trainings_delete_their_checkpoints_too(base, pairs_csv, tmp_path, kind, monkeypatch):
    train_supervised(kind, base, pairs_csv, tmp_path / "kept", keep_best="-loss")
    assert names(tmp_path / "kept")
    send_sigterm_after(4, monkeypatch)
    with pytest.raises(Interrupted):
        train_supervised(kind, base, pairs_csv, tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000001"]
    train_supervised(kind, base, pairs_csv, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("kept", "run"))
    assert one == other


def test_nothing_is_deleted_if_the_model_is_not_saved(base, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    run = trainer(base, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(trainer_methods, "save_model", full)
        with pytest.raises(OSError, match="No space left"):
            run.train()
    assert names(tmp_path / "run") == ["step-000002"] and read_finished(tmp_path / "run") is None
    trainer(base, tmp_path / "run", resume=True).train()
    assert not names(tmp_path / "run")


# --- resume a finished run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"use_peft": True}, {"save_every": 50}], ids=["full", "lora", "short"])
def test_resuming_a_finished_run_trains_nothing(base, tmp_path, settings, capsys):
    log = tiny.train(trainer(base, tmp_path / "run", **settings))
    before = contents(tmp_path / "run")
    again = trainer(base, tmp_path / "run", resume=True, **settings)
    assert tiny.train(again) == tiny.train(again) == log
    assert contents(tmp_path / "run") == before
    printed = capsys.readouterr().err
    assert "steps. Checking that its data and models are unchanged ..." in printed
    assert "Nothing to train: the run in" in printed
    again.save_model(tmp_path / "copy")
    one, other = (load_policy(str(tmp_path / name)).state_dict() for name in ("run", "copy"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["reward", "sft"])
def test_resuming_a_finished_supervised_training_returns_its_result(base, pairs_csv, tmp_path, kind):
    data = tmp_path / "data.csv"
    data.write_text(pairs_csv.read_text())
    result = train_supervised(kind, base, data, tmp_path / "run")
    before = contents(tmp_path / "run")
    again = train_supervised(kind, base, data, tmp_path / "run", resume=True)
    assert again == result if kind == "sft" else again.card.fingerprint == result.card.fingerprint
    with pytest.raises(ConfigError, match=DELETED + r".*\(num_train_epochs was 1 and is 2\)"):
        train_supervised(kind, base, data, tmp_path / "run", resume=True, num_train_epochs=2)
    data.write_text(pairs_csv.read_text() + "One more?,Yes,No\n")
    with pytest.raises(ConfigError, match=DELETED + r".*\(data was "):
        train_supervised(kind, base, data, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_more_steps_than_a_finished_run_made_are_an_error_with_the_fix(base, tmp_path):
    trainer(base, tmp_path / "run").train()
    fix = rf".*Start a new run from its model \(model='{tmp_path / 'run'}' and another output_dir\).* add keep_last=1\."
    for changes in ({}, {"allow_changes": "max_steps"}):
        with pytest.raises(ConfigError, match=DELETED + r".*\(max_steps was 2 and is 4\)" + fix):
            trainer(base, tmp_path / "run", resume=True, max_steps=4, **changes)
    with pytest.raises(ModelError, match=r"step-000001: the run in .* " + DELETED + fix):
        trainer(base, tmp_path / "new", resume=str(tmp_path / "run/checkpoints/step-000001"))
    trainer(base, tmp_path / "short", save_every=50).train()
    with pytest.raises(
        ConfigError, match=r"finished after 2 steps and it has no checkpoint.* save_every=2 and keep_last=1"
    ):
        trainer(base, tmp_path / "short", save_every=50, resume=True, max_steps=4)


# --- killed while the checkpoints are deleted -------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("deleted", [0, 1], ids=["before", "during"])
def test_a_run_killed_while_it_deletes_checkpoints_is_finished(base, tmp_path, monkeypatch, deleted):
    def killed(run):
        folder = run / "checkpoints" / "step-000002"
        for file in sorted(folder.iterdir())[: 3 * deleted]:
            file.unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "delete_all", killed)
        with pytest.raises(Killed):
            trainer(base, tmp_path / "run").train()
    assert names(tmp_path / "run") == ["step-000002"]
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    log = tiny.train(trainer(base, tmp_path / "run", resume=True))
    assert [metrics["step"] for metrics in log] == [1, 2]
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "run.lock").exists()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
