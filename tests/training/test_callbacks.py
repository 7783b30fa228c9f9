"""Callbacks of transformers: their events, what they can ask for, and that their state survives a resume."""

import pytest
import tiny
import torch
from small_trainer import PROMPTS, spread, trainer
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from reinforcepp import ConfigError, load_policy
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.run_dir import read_finished
from scripts import ROOT

EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def with_callbacks(base, folder, *callbacks, reward=spread, **settings):
    return trainer(base, folder, reward, PROMPTS, PROMPTS[:2], arguments={"callbacks": callbacks}, **settings)


class Recorder(TrainerCallback):
    """Records each event with the step."""

    def __init__(self):
        self.seen, self.arguments = [], {}

    def event(self, name, args, state, control, **others):
        self.seen.append((name.removeprefix("on_"), state.global_step))
        self.arguments[name] = {"args": args, **others}


for event_name in EVENTS:

    def record(self, args, state, control, name=event_name, **others):
        self.event(name, args, state, control, **others)

    setattr(Recorder, event_name, record)


def test_events_come_in_the_order_of_transformers(base, tmp_path):
    recorder = Recorder()
    run = with_callbacks(base, tmp_path / "run", recorder, max_steps=3, eval_every=2, save_every=2)
    run.train()
    step = [("step_begin", 0), ("step_end", 1), ("log", 1)]
    second = [("step_begin", 1), ("step_end", 2), ("log", 2), ("log", 2), ("evaluate", 2), ("save", 2)]
    last = [("step_begin", 2), ("step_end", 3), ("log", 3), ("log", 3), ("evaluate", 3), ("epoch_end", 3)]
    begin = [("init_end", 0), ("train_begin", 0), ("epoch_begin", 0)]
    assert recorder.seen == [*begin, *step, *second, *last, ("log", 3), ("train_end", 3)]
    given = recorder.arguments["on_evaluate"]
    assert (
        given["args"] is run.args and given["model"] is run.model and given["processing_class"] is run.processing_class
    )
    assert given["metrics"]["eval_reward"] == pytest.approx(run.evaluations["after"].reward)
    assert given["optimizer"].param_groups and given["lr_scheduler"].get_last_lr()


def test_callbacks_do_not_change_the_training(base, tmp_path):
    plain = trainer(base, tmp_path / "plain", spread, PROMPTS, PROMPTS[:2], eval_every=1)
    plain.train()
    watched = with_callbacks(base, tmp_path / "watched", Recorder, eval_every=1)
    watched.train()
    for name in ("metrics.jsonl", "model.safetensors", "evaluation.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "watched" / name).read_bytes()


def test_what_a_callback_adds_to_the_log_is_written(base, tmp_path):
    class Adds(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            logs["mine"] = 2.0 * state.global_step
            logs["note"] = "text"

    run = with_callbacks(base, tmp_path / "run", Adds(), keep_best="mine", save_every=1)
    run.train()
    assert [entry["mine"] for entry in read_metrics(tmp_path / "run")] == [2, 4]
    assert run.state.log_history[0]["note"] == "text" and run.state.best_global_step == 2


class At(TrainerCallback):
    """Sets switches of the control after a step."""

    def __init__(self, step, *switches):
        self.step, self.switches = step, switches

    def on_step_end(self, args, state, control, **others):
        if state.global_step == self.step:
            vars(control).update(dict.fromkeys(self.switches, True))


def test_a_callback_that_stops_the_training_leaves_a_finished_run(base, tmp_path, capsys):
    run = with_callbacks(base, tmp_path / "run", At(2, "should_training_stop"), max_steps=4, save_every=1)
    output = run.train()
    assert (output.global_step, run.state.max_steps, len(read_metrics(tmp_path / "run"))) == (2, 4, 2)
    assert "ended training after step 2 of 4" in " ".join(capsys.readouterr().err.split())
    assert list(run.evaluations) == ["before", "after"]
    assert read_finished(tmp_path / "run")["steps"] == 2 and read_run(tmp_path / "run").finished
    assert torch.equal(load_policy(str(tmp_path / "run")).lm_head.weight, run.model.lm_head.weight)
    assert run.train() == output
    resumed = with_callbacks(base, tmp_path / "run", max_steps=4, save_every=1, resume=True)
    assert resumed.train().global_step == 2


def test_a_callback_can_ask_for_a_checkpoint_and_an_evaluation(base, tmp_path):
    recorder = Recorder()
    asks = At(1, "should_save", "should_evaluate")
    run = with_callbacks(base, tmp_path / "run", asks, recorder, save_every=0, keep_last=1)
    run.train()
    assert [step for name, step in recorder.seen if name == "save"] == [1]
    assert list(run.evaluations) == ["before", "step 1", "after"]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_the_rest_of_an_epoch_can_be_skipped(base, tmp_path):
    """The prompts of the next epoch are the same as without the skip, also if the run was resumed at the skip."""
    run = with_callbacks(base, tmp_path / "run", At(1, "should_epoch_stop"), max_steps=5, save_every=1, keep_last=9)
    run.train()
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == [1, 4, 5]
    saved = tmp_path / "run" / "checkpoints" / "step-000001"
    trainer_ = with_callbacks(
        base, tmp_path / "again", At(9), max_steps=5, save_every=1, keep_last=9, resume=str(saved)
    )
    trainer_.train()
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


class Counter(TrainerCallback, ExportableState):
    def __init__(self):
        self.count = 0

    def on_step_end(self, *positional, **others):
        self.count += 1

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


def test_the_state_of_a_callback_survives_a_resume(base, tmp_path):
    with_callbacks(base, tmp_path / "run", Counter, max_steps=3, save_every=1, keep_last=2).train()
    counter = Counter()
    saved = str(tmp_path / "run" / "checkpoints" / "step-000002")
    with_callbacks(base, tmp_path / "new", counter, max_steps=3, save_every=1, keep_last=2, resume=saved).train()
    assert counter.count == 3


def falling(completion_ids, trainer_state, **_):
    return [(sum(ids) % 7) / 70 - trainer_state.global_step for ids in completion_ids]


def test_early_stopping_and_the_best_model(base, tmp_path):
    """The held-out reward falls, so the first evaluation is the best one, and training stops after two worse ones."""
    settings = {
        "max_steps": 6,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    settings |= {"metric_for_best_model": "reward", "greater_is_better": True}
    early = EarlyStoppingCallback(early_stopping_patience=2)
    run = with_callbacks(base, tmp_path / "run", early, reward=falling, **settings)
    output = run.train()
    assert output.global_step == 3 and run.state.best_global_step == 1
    assert run.state.best_metric == pytest.approx(run.evaluations["step 1"].reward)
    best = tmp_path / "run" / "checkpoints" / "step-000001"
    assert run.state.best_model_checkpoint == str(best)
    kept, saved = (load_policy(str(folder)).state_dict() for folder in (best, tmp_path / "run"))
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    after, first = run.evaluations["after"], run.evaluations["step 1"]
    assert [c.ids for c in after.completions] == [c.ids for c in first.completions]


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    section = (ROOT / "docs/python.md").read_text(encoding="utf-8").split("## Train with callbacks\n")[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section.split("```python\n")[1].split("```")[0], names)
    printed = capsys.readouterr().out
    assert "step 1 of 4: reward -" in printed and printed.endswith(f"{names['trainer'].state.best_global_step}\n")
    assert all(entry["reward/chars"] == -entry["reward"] for entry in read_metrics(tmp_path / "runs/short"))


def test_callbacks_are_added_and_removed(base, tmp_path):
    run = with_callbacks(base, tmp_path / "run")
    recorder = Recorder()
    run.add_callback(recorder)
    run.add_callback(PrinterCallback)
    assert run.pop_callback(PrinterCallback).__class__ is PrinterCallback
    assert run.pop_callback(PrinterCallback) is None
    run.remove_callback(recorder)
    run.train()
    assert recorder.seen == []
    with pytest.raises(ConfigError, match=r"callbacks: .* isn't a transformers\.TrainerCallback"):
        run.add_callback(print)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end: there is no best checkpoint"),
        ({"keep_best": "eval_reward"}, "keep_best: eval_reward needs evaluations during training"),
        (
            {"load_best_model_at_end": True, "keep_best": "-eval_kl", "eval_every": 3, "save_every": 4},
            "save_every 4 isn't a multiple of eval_every 3",
        ),
        ({"greater_is_better": False}, "greater_is_better needs metric_for_best_model"),
    ],
)
def test_a_best_checkpoint_needs_evaluations(base, tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        with_callbacks(base, tmp_path / "run", **settings)


def test_evaluations_without_held_out_rows_are_reported(base, tmp_path, capsys):
    trainer(base, tmp_path / "run", eval_every=1)
    assert "eval_every: nothing is evaluated" in capsys.readouterr().err


def test_a_best_checkpoint_by_evaluations_needs_held_out_rows_and_a_metric_that_exists(base, tmp_path):
    settings = {"eval_every": 1, "save_every": 1}
    with pytest.raises(ConfigError, match="eval_reward needs an eval_dataset"):
        trainer(base, tmp_path / "run", keep_best="eval_reward", **settings)
    run = with_callbacks(base, tmp_path / "run", keep_best="eval_rewrad", **settings)
    with pytest.raises(ConfigError, match=r"metric 'eval_rewrad' not found.*eval_reward"):
        run.train()


def test_the_state_names_the_best_checkpoint_by_a_metric_that_falls(base, tmp_path):
    run = with_callbacks(
        base,
        tmp_path / "run",
        Recorder(),
        max_steps=3,
        eval_every=1,
        save_every=1,
        keep_best="-eval_kl",
        learning_rate=0.01,
    )
    run.train()
    found = {entry["step"]: entry["eval_kl"] for entry in run.state.log_history if "eval_kl" in entry}
    best = min(found, key=lambda step: (found[step], step))
    assert len(set(found.values())) == 3 and run.state.best_global_step == best
    assert run.state.best_metric == found[best] and f"{best:06d}" in run.state.best_model_checkpoint


def test_a_request_before_a_step_holds_at_its_end(base, tmp_path):
    class Asks(TrainerCallback):
        def on_step_begin(self, args, state, control, **others):
            control.should_save = control.should_evaluate = state.global_step == 0

    recorder = Recorder()
    with_callbacks(base, tmp_path / "run", Asks(), recorder, max_steps=2).train()
    assert ("save", 1) in recorder.seen and ("evaluate", 1) in recorder.seen and ("save", 2) not in recorder.seen


def test_logs_have_the_means_since_the_last_one(base, tmp_path):
    recorder = Recorder()
    settings = {"max_steps": 5, "logging_steps": 2, "lr_scheduler_type": "linear", "save_every": 3, "keep_last": 1}
    run = with_callbacks(base, tmp_path / "run", recorder, **settings)
    output = run.train()
    steps = read_metrics(tmp_path / "run")
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4] and [at for event, at in recorder.seen if event == "log"][
        :2
    ] == [2, 4]
    for entry, (first, second) in zip(logs, [steps[:2], steps[2:4]], strict=True):
        for name in ("loss", "reward", "kl"):
            assert entry[name] == pytest.approx((first[name] + second[name]) / 2, abs=1e-7)
        assert all(entry[name] == second[name] for name in ("learning_rate", "grad_norm", "num_tokens", "epoch"))
    assert output.training_loss == pytest.approx(sum(step["loss"] for step in steps) / 5, abs=1e-7)

    resumed = with_callbacks(base, tmp_path / "run", resume=True, **settings)
    assert resumed.train().training_loss == pytest.approx(output.training_loss, abs=1e-7)
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    for entry, before in zip(again, logs, strict=True):
        same = {name for name in entry if not name.startswith(("time/", "step_time"))}
        assert [entry[name] for name in same] == pytest.approx([before[name] for name in same], abs=1e-7)
