"""Reward models and warm-ups by several processes, in real processes: as by one, told once, stopped and gone on together."""

import csv
import json
import random

import pytest
import tiny
from safetensors.torch import load_file

import scripts
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.card import read_card

TRAININGS = """
import json, os, signal, sys
from pathlib import Path
from reinforcepp.training import resumable, reward_trainer, sft_trainer
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.runtime import started
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model

folder = Path(sys.argv[1])
usual = {"model": str(folder / "model"), "batch_size": 6, "num_train_epochs": 2, "learning_rate": 1e-3}
told = {}

def trained(kind, name, rows="even", **settings):
    config_class, train = {"reward": (RewardModelConfig, train_reward_model), "sft": (SftConfig, train_language_model)}[kind]
    given = {"data": str(folder / f"{rows}.csv"), "heldout_fraction": 0.2, "micro_batch_size": 3, "save_every": 0}
    return train(config_class(**usual | given | settings, output_dir=str(folder / f"{name}-{started()}")))

def stop_after_three(keeper, args, state, control, **named):
    if state.global_step == 3 and os.environ.get("RANK", "0") == str(started() - 1):
        os.kill(os.getpid(), signal.SIGTERM)  # of which the others know nothing
    return as_ever(keeper, args, state, control, **named)

told["saved"] = []
for trainer in (reward_trainer, sft_trainer):
    def save_and_tell(*given, save=trainer.save_model):
        told["saved"].append(str(given[-1].name))
        save(*given)
    trainer.save_model = save_and_tell
write_page = reward_trainer.write_page
reward_trainer.write_page = lambda *given: told["saved"].append("page") or write_page(*given)

card = trained("reward", "reward")
told["pairs"] = [card.train_pairs, card.heldout_pairs, card.train_accuracy]
figures = trained("sft", "sft")
told["losses"] = [figures["before"].loss, figures["after"].loss]
trained("reward", "uneven", "uneven", num_train_epochs=1, keep_best="accuracy", save_every=2)
if started() == 2:
    as_ever, resumable.TrainingCallback.on_step_end = resumable.TrainingCallback.on_step_end, stop_after_three
    try:
        trained("reward", "stopped")
    except Interrupted as stop:
        told["stopped"] = str(stop)
    resumable.TrainingCallback.on_step_end = as_ever
    trained("reward", "stopped", resume=True)
else:
    trained("reward", "gone on", resume=str(folder / "stopped-2/checkpoints/step-000003"))
if started() > 1:
    try:
        trained("sft", "refused", batch_size=7, micro_batch_size=7)
    except ConfigError as error:
        told["refused"] = str(error)
(folder / f"told-{started()}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(told))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of what one, two and three processes trained; and what was printed by each number of them."""
    folder = tmp_path_factory.mktemp("together")
    tiny.save(folder / "model", "llama")  # without dropout, and without weights whose gradient is rounding
    (folder / "trainings.py").write_text(TRAININGS)
    for name, number in (("even", 30), ("uneven", 31)):
        dice = random.Random(0)
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = [
                (f"question {i}", "yes " * dice.randint(1, 6) + str(i), "no " * dice.randint(1, 6))
                for i in range(number)
            ]
            csv.writer(file).writerows([("prompt", "chosen", "rejected"), *rows])
    printed = {}
    for processes in (2, 1, 3):  # the others go on from what two have left
        done = scripts.launched(processes, folder / "trainings.py", folder)
        assert done.returncode == 0, done.stderr
        printed[processes] = done.stderr
    return folder, printed


def told(folder, processes):
    return [json.loads((folder / f"told-{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("kind", ["reward", "sft"])
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_trains_alike(runs, kind, processes):
    folder, _ = runs
    one, several = (load_file(folder / f"{kind}-{n}" / "model.safetensors") for n in (1, processes))
    begin = load_file(folder / "model/model.safetensors")
    assert max(float((one[name] - begin[name]).abs().max()) for name in one.keys() & begin.keys()) > 1e-3
    assert max(float((one[name] - several[name]).abs().max()) for name in one) <= 1e-5
    logs = [read_metrics(folder / f"{kind}-{n}") for n in (1, processes)]
    assert len(logs[0]) == len(logs[1]) == 8
    for step, same in zip(*logs, strict=True):
        assert step["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_are_given_what_the_first_one_measured(runs, processes):
    folder, _ = runs
    (alone,) = told(folder, 1)
    several = told(folder, processes)
    assert several[0]["pairs"] == alone["pairs"] and alone["pairs"][:2] == [24, 6]
    assert several[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert all(own["pairs"] == several[0]["pairs"] and own["losses"] == several[0]["losses"] for own in several)
    assert read_card(folder / f"reward-{processes}").train_pairs == 24
    assert several[0]["saved"][:2] == ["page", f"sft-{processes}"] and not any(own["saved"] for own in several[1:])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_that_do_not_divide_make_no_more_steps(runs, processes):
    folder, _ = runs
    log = read_metrics(folder / f"uneven-{processes}")
    assert len(log) == 5 and all(step["loss"] > 0 for step in log)
    assert len(list((folder / f"uneven-{processes}/checkpoints").iterdir())) == 2


def test_one_that_is_told_to_stop_stops_all_and_they_go_on(runs):
    folder, printed = runs
    assert [own["stopped"] for own in told(folder, 2)] == ["after step 3 of 8"] * 2
    one, stopped = (load_file(folder / f"{name}-2" / "model.safetensors") for name in ("reward", "stopped"))
    assert max(float((one[name] - stopped[name]).abs().max()) for name in one) <= 1e-6
    assert [step["step"] for step in read_metrics(folder / "stopped-2")] == list(range(1, 9))
    assert "Going on after step 3 of 8" in printed[2]


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_goes_on(runs, processes):
    folder, _ = runs
    one, other = (load_file(folder / name / "model.safetensors") for name in ("reward-1", f"gone on-{processes}"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5
    steps = [step["step"] for step in read_metrics(folder / f"gone on-{processes}")]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(("processes", "fitting"), [(2, 8), (3, 6)])
def test_a_batch_that_they_can_not_share_is_refused(runs, processes, fitting):
    folder, _ = runs
    for own in told(folder, processes):
        assert (
            f"{processes} processes: give a batch_size that they can share evenly, such as {fitting}" in own["refused"]
        )
    assert not (folder / f"refused-{processes}").exists()


def test_it_is_told_once(runs):
    _, printed = runs
    for text in printed.values():
        assert text.count("Saved the model to") == 1 and text.count("reward model 8/8") >= 1
        assert "Traceback" not in text and "Warning" not in text, text


def test_shards_are_refused_in_one_sentence(tmp_path, model_folder, pairs_csv):
    named = {"--mode": "train_reward", "--model_name": model_folder, "--data_path": pairs_csv}
    words = [word for pair in named.items() for word in pair]
    done = scripts.launched(
        2, scripts.ROOT / "reinforce_cli.py", *words, "--reward_model_path", tmp_path / "run", **scripts.FSDP2
    )
    assert done.returncode != 0
    assert (
        done.stderr.count("error: A reward model is trained whole on each process: leave FSDP and DeepSpeed out") == 1
    )
    assert not (tmp_path / "run").exists()
