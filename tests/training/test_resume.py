"""Stop, save and resume: signals, checkpoints in the middle of a step, damage, full disks, changed settings."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from training.termination import send_sigterm_after

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.config import RewardModelConfig
from reinforcepp.errors import ConfigError, EngineLost, ModelError, RewardError
from reinforcepp.files import whole_folder, write_json
from reinforcepp.models.loading import load_policy
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.run_dir import write_finished
from reinforcepp.training import checkpoint
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.setup import encode
from scripts import SOURCE

PROMPTS = [{"prompt": f"How do I check host {i}?"} for i in range(11)]
SEVERAL = {"micro_batch_size": 2, "gradient_accumulation_steps": 1, "num_iterations": 2}
FLASH = {"estimator": "flash_reinforce", "importance_correction": "binary_kl", "negative_token_fraction": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """Return a function: the folder of a run with these settings that was never stopped. Each is trained once."""
    folders = {}

    def run(**settings):
        key = repr(sorted(settings.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            folders[key].rmdir()
            trainer(base, folders[key], **settings).train()
        return folders[key]

    return run


def noisy(prompts, completions, completion_ids, **_):
    """It draws from a global generator, whose state a checkpoint therefore has to hold."""
    return [sum(ids) % 7 / 7 + random.random() + float(torch.rand(())) for ids in completion_ids]


def trainer(base, folder, reward=noisy, **settings):
    defaults = {
        "max_new_tokens": 6,
        "max_prompt_length": 40,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "seed": 5,
        "max_steps": 4,
        "save_every": 1,
        "keep_last": 2,
        "lr_scheduler_type": "cosine",
        "rollout": "transformers",
    }
    return ReinforceTrainer(base, reward, ReinforceConfig(output_dir=str(folder), **(defaults | settings)), PROMPTS)


def files(folder):
    named = [folder / "model.safetensors", folder / "metrics.jsonl", *folder.glob("completions/*")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in named}


def steps(folder):
    return [path.name for path in checkpoint.list_checkpoints(folder)]


# --- signals ----------------------------------------------------------------------------------------------------------


def stopping(run, moment, number=signal.SIGTERM):
    """Send the process a signal at the ``moment``-th point between micro-batches."""
    seen = []
    safe_point = run.guard.heartbeat.safe_point

    def ask():
        seen.append(1)
        if len(seen) == moment:
            os.kill(os.getpid(), number)
        safe_point()

    run.guard.heartbeat.safe_point = ask


@pytest.mark.parametrize(
    ("kind", "moment", "name"),
    [
        ({}, 1, "step-000000"),  # before anything was trained
        ({}, 5, "step-000002"),  # a batch of 8 is one micro-batch and one optimizer step
        (SEVERAL, 4, "step-000000+1"),
        (SEVERAL, 22, "step-000001+2"),
        (SEVERAL | {"estimator": "ppo"}, 8, "step-000000+3"),
        (SEVERAL | {"sync_ref_model": True, "ref_model_sync_steps": 6}, 22, "step-000001+2"),
        (SEVERAL | {"mixed_precision": "bf16"}, 8, "step-000000+3"),
        (SEVERAL | {"estimator": "reinforce_plus_plus_baseline", "num_generations": 2}, 8, "step-000000+3"),
        pytest.param(SEVERAL | FLASH, 8, "step-000000+3", marks=pytest.mark.full),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value),
)
def test_a_signal_in_the_middle_of_a_step_loses_nothing(base, undisturbed, tmp_path, capsys, kind, moment, name):
    whole = undisturbed(**kind)
    run = trainer(base, tmp_path / "run", **kind)
    stopping(run, moment)
    with pytest.raises(Interrupted) as stop:
        run.train()
    assert stop.value.exit_code == 143
    assert steps(tmp_path / "run")[-1] == name
    assert "SIGTERM: saving and stopping" in capsys.readouterr().err
    trainer(base, tmp_path / "run", resume=True, **kind).train()
    assert files(tmp_path / "run") == files(whole)


def test_a_signal_while_completions_are_made_does_not_wait_for_them(base, undisturbed, tmp_path):
    whole = undisturbed()
    run = trainer(base, tmp_path / "run")
    calls = []

    def interrupted(prompts, completions, completion_ids, **_):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")
        return noisy(prompts, completions, completion_ids)

    interrupted.__name__ = "noisy"
    run.rewards.functions[0] = interrupted
    with pytest.raises(Interrupted) as stop:
        run.train()
    assert (stop.value.exit_code, str(stop.value)) == (130, "after step 2 of 4")
    assert run.engine is not None and steps(tmp_path / "run")[-1] == "step-000002"
    trainer(base, tmp_path / "run", resume=True).train()
    assert files(tmp_path / "run") == files(whole)


@pytest.mark.parametrize("method", ["generate", "load_weights"])
def test_a_lost_engine_loses_no_step(base, undisturbed, tmp_path, method):
    """In the second step, where it begins or where it ends."""
    whole = undisturbed()
    run, calls = trainer(base, tmp_path / "run"), []
    inner = getattr(run.engine, method)

    def lost(*given):
        calls.append(1)
        if len(calls) == 2:
            raise EngineLost("Nobody is left.")
        return inner(*given)

    setattr(run.engine, method, lost)
    with pytest.raises(
        EngineLost, match=r"Nobody is left\. Saved the run after step 1 of 4\. Resume it with resume=True"
    ):
        run.train()
    trainer(base, tmp_path / "run", resume=True).train()
    assert files(tmp_path / "run") == files(whole)


@pytest.mark.parametrize("failing_call", [1, 3], ids=["before-the-first-step", "after-two-steps"])
def test_train_continues_after_an_error_and_does_nothing_after_the_end(base, undisturbed, tmp_path, failing_call):
    calls = []

    def failing(prompts, completions, completion_ids, **_):
        calls.append(1)
        if len(calls) == failing_call:
            raise RuntimeError("the server is down")
        return noisy(prompts, completions, completion_ids)

    failing.__name__ = "noisy"
    run = trainer(base, tmp_path / "run", failing)
    with pytest.raises(RewardError, match="the server is down"):
        run.train()
    metrics = tiny.train(run)
    assert files(tmp_path / "run") == files(undisturbed())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert tiny.train(run) == metrics and len(metrics) == 4
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_train_never_deletes_a_run_that_it_can_not_continue(base, tmp_path):
    def failing(*arguments, **columns):
        raise KeyError("not an error of a reward")

    run = trainer(base, tmp_path / "run", save_every=0)
    run.update.run = failing
    with pytest.raises(KeyError):
        run.train()
    before = sorted((tmp_path / "run").rglob("*"))
    with pytest.raises(ConfigError, match="stopped before its first checkpoint"):
        run.train()
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_a_trainer_sets_the_run_aside_that_another_one_finished_meanwhile(base, tmp_path):
    first, second = trainer(base, tmp_path / "run", max_steps=1), trainer(base, tmp_path / "run", max_steps=1)
    first.train()
    before = contents(tmp_path / "run")
    second.train()
    moved = tmp_path / "run" / "earlier_runs" / "1"
    assert contents(moved) == {moved / path.relative_to(tmp_path / "run"): text for path, text in before.items()}


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_evaluation_before_training_that_is_stopped_is_part_of_the_resumed_run(base, tmp_path):
    config = {"max_steps": 1, "save_every": 0}
    run = trainer(base, tmp_path / "run", **config)
    run.evaluator.sets = {"": run.prompts[:1]}
    evaluate = run.evaluator.evaluate
    run.evaluator.evaluate = lambda limit: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        run.train()
    run.evaluator.evaluate = evaluate
    run.train()
    assert list(json.loads((tmp_path / "run" / "evaluation.json").read_text())) == ["before", "after"]
    assert sorted(path.name for path in (tmp_path / "run" / "evaluations").iterdir()) == [
        "after.parquet",
        "before.parquet",
    ]


def test_a_signal_in_an_evaluation(base, tmp_path):
    """The evaluation is made when the run goes on."""
    held_out = [{"prompt": "Why does the router drop packets?"}]
    runs = []
    for name in ("whole", "run"):
        run = trainer(base, tmp_path / name, eval_every=2)
        run.evaluator.sets = {
            "": encode(run.tokenizer, [tiny_row(row) for row in held_out], "held-out", run.config, 128)
        }
        runs.append(run)
    runs[0].train()
    evaluate = runs[1].evaluator.evaluate

    def asked(limit):
        if runs[1].run.state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(limit)

    runs[1].evaluator.evaluate = asked
    with pytest.raises(Interrupted):
        runs[1].train()
    again = trainer(base, tmp_path / "run", eval_every=2, resume=True, allow_changes="data")
    again.evaluator.sets = runs[0].evaluator.sets
    again.train()
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == (tmp_path / "whole" / "evaluation.json").read_bytes()
    assert files(tmp_path / "run") == files(tmp_path / "whole")


def test_a_signal_while_a_run_is_being_resumed_costs_nothing(base, undisturbed, tmp_path):
    shutil.copytree(undisturbed(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = trainer(base, tmp_path / "run", resume=True)
    again.evaluator.sets = {"": again.prompts[:1]}
    again.evaluator.evaluate = lambda limit: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        again.train()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def tiny_row(row):
    from reinforcepp.data import prompt_rows

    return prompt_rows([row], "x")[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_the_process_at_once(number, code):
    program = f"""
import os
from reinforcepp.monitoring.signals import stop_signals
with stop_signals() as stop:
    os.kill(os.getpid(), {int(number)})
    print("first", flush=True)
    os.kill(os.getpid(), {int(number)})
    print("second", flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "first\n"), done.stderr
    assert "Stopped immediately" in done.stderr


# --- which checkpoint -------------------------------------------------------------------------------------------------


def test_only_the_last_ones_are_kept(base, tmp_path):
    trainer(base, tmp_path / "run", max_steps=6, keep_last=3).train()
    assert steps(tmp_path / "run") == ["step-000004", "step-000005", "step-000006"]


def test_checkpoints_from_before_a_rollback_are_deleted(tmp_path):
    for name in ("step-000001", "step-000002", "step-000002+3", "step-000003", "step-000004", "step-000005.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    checkpoint._prune(tmp_path, (3, 0), 2, "step-000001")
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step-000001", "step-000002+3", "step-000003"}


@pytest.mark.parametrize(("metric", "choose"), [("reward", max), ("-reward", min)])
def test_the_best_one_is_kept_too(base, tmp_path, metric, choose):
    log = tiny.train(trainer(base, tmp_path / "run", max_steps=6, keep_last=1, keep_best=metric))
    rewards = [m["reward"] for m in log]
    best = f"step-{rewards.index(choose(rewards)) + 1:06d}"
    assert set(steps(tmp_path / "run")) == {best, "step-000006"}


def test_keep_best_with_an_unknown_metric_raises(base, tmp_path):
    with pytest.raises(ConfigError, match=r"keep_best: .*'rewrad'.*Did you mean 'reward'"):
        trainer(base, tmp_path / "run", keep_best="rewrad").train()


def test_a_checkpoint_is_a_model(base, tmp_path):
    run = trainer(base, tmp_path / "run")
    run.train()
    saved = load_policy(str(tmp_path / "run" / "checkpoints" / "step-000004")).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in run.policy.state_dict().items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(base, undisturbed, tmp_path, capsys):
    whole = undisturbed()
    shutil.copytree(undisturbed(), tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "step-000004" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    run = trainer(base, tmp_path / "run", resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "step-000004 is damaged (the contents of model.safetensors have changed)" in said
    run.train()
    assert files(tmp_path / "run") == files(whole)


def test_a_run_with_only_damaged_checkpoints_is_refused(base, undisturbed, tmp_path):
    shutil.copytree(undisturbed(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(ModelError, match=r"all checkpoints are damaged.*overwrite=True"):
        trainer(base, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_can_resume_from_an_earlier_checkpoint_in_another_folder(base, undisturbed, tmp_path):
    whole = undisturbed(keep_last=9)
    shutil.copytree(whole, tmp_path / "run")
    second = str(tmp_path / "run" / "checkpoints" / "step-000002")
    for output in ("run", "elsewhere"):
        again = trainer(base, tmp_path / output, resume=second, keep_last=9)
        assert again.run.resumed.step == 2
        again.train()
        assert files(tmp_path / output) == files(whole)
    assert steps(tmp_path / "elsewhere") == ["step-000003", "step-000004"]


@pytest.mark.parametrize(
    ("path", "named"),
    [("nowhere", "nowhere: not a checkpoint"), ("run", "run: not a checkpoint"), ("harmed", "harmed: .* is damaged")],
)
def test_an_invalid_checkpoint_is_refused(base, undisturbed, tmp_path, path, named):
    shutil.copytree(undisturbed(), tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-000003", tmp_path / "harmed")
    (tmp_path / "harmed" / "metrics.jsonl").unlink()
    with pytest.raises(ModelError, match=named):
        trainer(base, tmp_path / "new", resume=str(tmp_path / path))
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_checkpoint_starts_over(base, undisturbed, tmp_path, capsys):
    whole = undisturbed()
    shutil.copytree(undisturbed(), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    write_finished(tmp_path / "run", None)
    trainer(base, tmp_path / "run", resume=True).train()
    assert "stopped before its first checkpoint" in capsys.readouterr().err
    assert files(tmp_path / "run") == files(whole)


def test_kl_coefficient_and_guardrail_state_are_restored(base, tmp_path):
    adaptive = {"kl_target": 1e-4, "kl_horizon": 40.0, "keep_last": 9}
    whole = trainer(base, tmp_path / "whole", **adaptive)
    whole.train()
    second = str(tmp_path / "whole" / "checkpoints" / "step-000002")
    run = trainer(base, tmp_path / "run", resume=second, **adaptive)
    run.train()
    assert files(tmp_path / "run") == files(tmp_path / "whole")
    assert (
        run.update.guardrails.state == whole.update.guardrails.state
        and run.update.guardrails.state.at_first["entropy"] > 0
    )


def test_other_library_versions_are_reported(base, undisturbed, tmp_path, capsys, monkeypatch):
    shutil.copytree(undisturbed(), tmp_path / "run")
    assert checkpoint.latest(tmp_path / "run").state["versions"].keys() >= {"torch", "transformers"}
    monkeypatch.setattr(checkpoint, "_versions", lambda: {"torch": "9.9"})
    trainer(base, tmp_path / "run", resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"torch {torch.__version__.split('+')[0]}" in said and "now 9.9" in said


# --- other settings, other inputs -------------------------------------------------------------------------------------


def test_changed_settings_are_listed_and_may_be_allowed(base, undisturbed, tmp_path):
    shutil.copytree(undisturbed(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.001 and is 0\.01; max_steps was 4 and is 6") as caught:
        trainer(base, tmp_path / "run", resume=True, learning_rate=0.01, max_steps=6)
    assert "allow_changes='learning_rate,max_steps'" in str(caught.value)
    changed = {"learning_rate": 0.01, "max_steps": 6, "allow_changes": "max_steps, learning_rate"}
    log = tiny.train(trainer(base, tmp_path / "run", resume=True, **changed))
    assert [m["step"] for m in log] == list(range(1, 7))


def as_version_0_1_0(folder):
    """Rewrite the settings in a run directory as version 0.1.0 stored them, with ``mini_batch_size``."""

    def renamed(state):
        state["settings"] = {name.replace("micro_batch", "mini_batch"): v for name, v in state["settings"].items()}
        return state

    write_json(folder / "run.json", renamed(json.loads((folder / "run.json").read_text())))
    for old in checkpoint.list_checkpoints(folder):
        copied = folder / "copy"
        old.rename(copied)
        with whole_folder(old) as new:
            for path in copied.iterdir():
                if path.name not in ("manifest.json", "state.json"):
                    shutil.copy(path, new)
            state = renamed(json.loads((copied / "state.json").read_text()))
            write_json(new / "state.json", state | {"versions": state["versions"] | {"reinforcepp": "0.1.0"}})
        shutil.rmtree(copied)


def test_a_run_of_version_0_1_0_resumes_and_its_settings_are_compared(base, undisturbed, tmp_path):
    """It called ``micro_batch_size`` ``mini_batch_size``."""
    whole = undisturbed(**SEVERAL)
    run = trainer(base, tmp_path / "run", **SEVERAL)
    stopping(run, 22)
    with pytest.raises(Interrupted):
        run.train()
    as_version_0_1_0(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-000001+2" / "state.json").read_text())
    assert state["settings"]["mini_batch_size"] == 2 and "micro_batch_size" not in state["settings"]
    with pytest.raises(ConfigError, match="micro_batch_size was 2 and is 4"):
        trainer(base, tmp_path / "run", resume=True, **(SEVERAL | {"micro_batch_size": 4}))
    trainer(base, tmp_path / "run", resume=True, **SEVERAL).train()
    assert files(tmp_path / "run") == files(whole)


@pytest.mark.parametrize("what", ["data", "model", "reward_model"])
def test_changed_inputs_of_the_same_name_are_refused(base, tmp_path, what, monkeypatch):
    shutil.copytree(base, tmp_path / "base")
    trainer(str(tmp_path / "base"), tmp_path / "run").train()
    reward = noisy
    if what == "data":
        monkeypatch.setitem(PROMPTS[0], "prompt", "Is it raining?")
    elif what == "model":
        tiny.save(tmp_path / "base", seed=1)
    else:
        reward = lambda prompts, completions, **_: [0.0] * len(prompts)  # noqa: E731
    with pytest.raises(ConfigError, match=f"{what} was .* and is "):
        trainer(str(tmp_path / "base"), tmp_path / "run", reward, resume=True)
    trainer(str(tmp_path / "base"), tmp_path / "run", reward, resume=True, allow_changes=what)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            {"allow_changes": "lerning_rate", "resume": True},
            "allow_changes.*'lerning_rate'.*Did you mean 'learning_rate'",
        ),
        ({"allow_changes": "learning_rate"}, "resume=True"),
        ({"keep_best": "reward", "save_every": 0}, "save_every is 0"),
        ({"keep_best": "-"}, "keep_best is empty"),
        ({"keep_last": 0}, "keep_last must be greater than 0"),
        ({"resume": ""}, "resume is empty"),
    ],
)
def test_contradicting_settings_raise(settings, named):
    with pytest.raises(ConfigError, match=named):
        ReinforceConfig(**settings)


# --- disks and malice -------------------------------------------------------------------------------------------------


def test_a_full_disk_is_reported_and_training_continues(base, undisturbed, tmp_path, capsys, monkeypatch):
    whole = undisturbed()
    saved = []

    def full(tensors, path, **_):
        saved.append(path)
        if len(saved) in (2, 3):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    trainer(base, tmp_path / "run").train()
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "Step 2: checkpoint not saved (No space left on device). The last one is step-000001; training continues"
        in said
    )
    assert "Step 3: checkpoint not saved" in said
    assert steps(tmp_path / "run") == ["step-000001", "step-000004"]
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    assert files(tmp_path / "run") == files(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two mebibytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs rights that this user hasn't")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_on_a_disk_that_really_is_full(base, undisturbed, small_disk, tmp_path, capsys, monkeypatch):
    """One checkpoint fits, a second doesn't, and at the end the model doesn't either; with more room it goes on."""
    whole = undisturbed()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device"):
        trainer(base, small_disk / "run").train()
    kept = checkpoint.list_checkpoints(small_disk / "run")
    assert [folder.name for folder in kept] == ["step-000001"] and checkpoint.damage(kept[0]) is None
    assert "not saved (No space left on device)" in " ".join(capsys.readouterr().err.split())
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    trainer(base, small_disk / "run", resume=True).train()
    assert files(small_disk / "run") == files(whole)


def test_a_pickle_in_a_checkpoint_is_not_loaded(base, undisturbed, tmp_path):
    """Even with a manifest that vouches for it: weights and optimizer state are read as safetensors, nothing else."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    shutil.copytree(undisturbed(), tmp_path / "run")
    good = tmp_path / "run" / "checkpoints" / "step-000004"
    for name in ("policy_optimizer.safetensors", "model.safetensors"):
        with whole_folder(tmp_path / "evil") as folder:
            for path in good.iterdir():
                if path.name != "manifest.json":
                    shutil.copy(path, folder)
            (folder / name).write_bytes(pickle.dumps(Evil()))
            if name == "model.safetensors":
                (folder / name).rename(folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="safetensors"):
            trainer(base, tmp_path / name, resume=str(tmp_path / "evil")).train()
        assert not (tmp_path / "harm").exists()


def test_no_pickle_is_written(base, tmp_path):
    trainer(base, tmp_path / "run", estimator="ppo").train()
    suffixes = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".parquet", ".md"}


# --- reward models ----------------------------------------------------------------------------------------------------


def reward_config(base, pairs_csv, folder, **settings):
    usual = {"batch_size": 4, "micro_batch_size": 2, "num_train_epochs": 3, "save_every": 2, "keep_last": 2, "seed": 1}
    return RewardModelConfig(
        **(usual | settings),
        model=str(base),
        data=str(pairs_csv),
        output_dir=str(folder),
    )


def reward_files(folder):
    card = json.loads((folder / "reward_model.json").read_text()) | {"settings": None}
    return files(folder) | {"card": card}


@pytest.mark.parametrize(
    ("moment", "settings"),
    [(1, {}), (2, {}), (5, {}), (6, {}), (3, {"num_train_epochs": 1.5, "save_every": -1})],
)
def test_reward_training_stopped_by_a_signal_resumes_exactly(base, pairs_csv, tmp_path, monkeypatch, moment, settings):
    """The scores draw from torch's generator, as dropout would, so resuming must restore its state."""
    from reinforcepp.training import reward_trainer

    new = reward_trainer.new_reward_model

    def with_noise(*positional, **named):
        model = new(*positional, **named)
        model.score.register_forward_hook(lambda module, inputs, output: output + 0.1 * torch.rand_like(output))
        return model

    monkeypatch.setattr(reward_trainer, "new_reward_model", with_noise)
    train_reward_model(reward_config(base, pairs_csv, tmp_path / "whole", **settings))
    send_sigterm_after(moment, monkeypatch)
    with pytest.raises(Interrupted) as stop:
        train_reward_model(reward_config(base, pairs_csv, tmp_path / "run", **settings))
    assert stop.value.exit_code == 143
    train_reward_model(reward_config(base, pairs_csv, tmp_path / "run", resume=True, **settings))
    assert reward_files(tmp_path / "run") == reward_files(tmp_path / "whole")


def test_reward_training_keeps_its_best(base, pairs_csv, tmp_path):
    train_reward_model(reward_config(base, pairs_csv, tmp_path / "run", save_every=1, keep_last=1, keep_best="-loss"))
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = min(log, key=lambda m: m["loss"])["step"]
    assert set(steps(tmp_path / "run")) == {f"step-{best:06d}", f"step-{len(log):06d}"}


def test_reward_training_skips_a_gradient_that_is_not_finite(base, pairs_csv, tmp_path, monkeypatch):
    from reinforcepp.errors import TrainingDiverged
    from reinforcepp.training import reward_trainer

    new = reward_trainer.new_reward_model

    def poisoned(*positional, **named):
        model = new(*positional, **named)
        seen = []

        def hook(gradient):
            seen.append(1)
            return gradient * float("nan") if len(seen) in bad else gradient

        model.score.weight.register_hook(hook)
        return model

    monkeypatch.setattr(reward_trainer, "new_reward_model", poisoned)
    bad = (3,)  # two micro-batches a step, so the second step
    train_reward_model(reward_config(base, pairs_csv, tmp_path / "run"))
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["skipped_updates"] for m in log] == [0, 1] + [0] * (len(log) - 2)
    bad = range(99)
    with pytest.raises(TrainingDiverged, match="Step 4: the gradient isn't finite"):
        train_reward_model(reward_config(base, pairs_csv, tmp_path / "other"))
