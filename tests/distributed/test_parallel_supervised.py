"""Reward model training and SFT on several ranks: same result as on one, one report, and stopping and resuming together."""

import csv
import json
import random

import pytest
import tiny
import torch
from safetensors.torch import load_file

import scripts
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.card import read_card

TRAININGS = """
import json, os, signal, sys
from pathlib import Path
from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.runtime.process import started
from reinforcepp.training import reward_card, sft_trainer, supervised_loop
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model

folder = Path(sys.argv[1])
common = {"model": str(folder / "model"), "batch_size": 6, "num_train_epochs": 2, "learning_rate": 1e-3, "keep_last": 2}
results = {}

def trained(kind, name, rows="even", **settings):
    config_class, train = {"reward": (RewardModelConfig, train_reward_model), "sft": (SftConfig, train_language_model)}[kind]
    given = {"data": str(folder / f"{rows}.csv"), "heldout_fraction": 0.2, "micro_batch_size": 3, "save_every": 0}
    return train(config_class(**common | given | settings, output_dir=str(folder / f"{name}-{started()}")))

def stop_after_three(callback, args, state, control, **named):
    if state.global_step == 3 and os.environ.get("RANK", "0") == str(started() - 1):
        os.kill(os.getpid(), signal.SIGTERM)  # on one rank only
    return original(callback, args, state, control, **named)

results["saved"] = []
for module in (reward_card, sft_trainer):
    def save_and_record(*given, save=module.save_model):
        results["saved"].append(str(given[-1].name))
        save(*given)
    module.save_model = save_and_record
write_page = reward_card.write_page
reward_card.write_page = lambda *given: results["saved"].append("page") or write_page(*given)

card = trained("reward", "reward").card
results["pairs"] = [card.train_pairs, card.heldout_pairs, card.train_accuracy]
deleting = {"keep_last": None, "save_every": 4}
figures = trained("sft", "sft", **deleting)
results["losses"] = [figures["before"].loss, figures["after"].loss]
results["same"] = trained("sft", "sft", resume=True, **deleting) == figures
trained("reward", "criteria", "judged", num_train_epochs=1, criteria=("yes", "short=-length"))
trained("reward", "uneven", "uneven", num_train_epochs=1, keep_best="accuracy", save_every=2)
if started() == 2:
    original, supervised_loop.TrainingCallback.on_step_end = supervised_loop.TrainingCallback.on_step_end, stop_after_three
    try:
        trained("reward", "stopped")
    except Interrupted as stop:
        results["stopped"] = str(stop)
    supervised_loop.TrainingCallback.on_step_end = original
    trained("reward", "stopped", resume=True)
else:
    trained("reward", "resumed", resume=str(folder / "stopped-2/checkpoints/step-000003"))
if started() > 1:
    try:
        trained("sft", "refused", batch_size=7, micro_batch_size=7)
    except ConfigError as error:
        results["refused"] = str(error)
(folder / f"results-{started()}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs on one and two ranks, and a function that trains on a number of ranks and returns their output."""
    folder = tmp_path_factory.mktemp("together")
    tiny.save(folder / "model", "llama")  # no dropout, and no weights whose gradient is only rounding error
    (folder / "trainings.py").write_text(TRAININGS)
    for name, number in (("even", 30), ("uneven", 31)):
        dice = random.Random(0)
        with open(folder / f"{name}.csv", "w", newline="") as file:
            rows = [
                (f"question {i}", "yes " * dice.randint(1, 6) + str(i), "no " * dice.randint(1, 6))
                for i in range(number)
            ]
            csv.writer(file).writerows([("prompt", "chosen", "rejected"), *rows])
    words = ("chosen", "", "tie", "rejected")
    with open(folder / "judged.csv", "w", newline="") as file:  # the rows of a rank can lack a criterion
        judged = [(words[i // 3 % 4], i % 5, "" if words[i // 3 % 4] and i % 2 else 2, i % 4 / 2) for i in range(30)]
        names = ("prompt", "chosen", "rejected", "yes", "chosen_length", "rejected_length", "weight")
        csv.writer(file).writerows([names, *((*row, *each) for row, each in zip(rows, judged, strict=False))])
    printed: dict[int, str] = {}

    def trained(processes: int) -> str:
        if processes not in printed:
            done = scripts.forked(processes, folder / "trainings.py", folder)
            assert done.returncode == 0, done.stderr
            printed[processes] = done.stderr
        return printed[processes]

    trained(2)  # first, because the others resume from its checkpoint
    trained(1)
    return folder, trained


THREE = pytest.param(3, marks=pytest.mark.full)


def results_of(folder, processes):
    return [json.loads((folder / f"results-{processes}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_on_several_ranks_deletes_its_checkpoints_and_is_finished_for_all(runs, processes):
    folder, _ = runs
    assert all(rank["same"] for rank in results_of(folder, processes))
    assert (folder / f"sft-{processes}/model.safetensors").is_file()
    assert not (folder / f"sft-{processes}/checkpoints").exists()


@pytest.mark.parametrize("kind", ["reward", "sft"])
@pytest.mark.parametrize("processes", [2, THREE])
def test_any_number_of_ranks_trains_the_same_model(runs, kind, processes):
    folder, trained = runs
    trained(processes)
    one, several = (load_file(folder / f"{kind}-{n}" / "model.safetensors") for n in (1, processes))
    begin = load_file(folder / "model/model.safetensors")
    common = one.keys() & begin.keys()  # The embeddings of a reward model have one more row, for its pad token.
    assert max(float((one[name][: len(begin[name])] - begin[name]).abs().max()) for name in common) > 1e-3
    # AdamW divides a gradient by its size, so the few weights whose gradient is mostly rounding error may differ more: by a
    # tenth of the learning rate. A wrong gradient moves most weights by the learning rate.
    differences = torch.cat([(one[name] - several[name]).abs().flatten() for name in one])
    assert float((differences > 1e-5).float().mean()) <= 1e-4 and float(differences.max()) <= 1e-4
    logs = [read_metrics(folder / f"{kind}-{n}") for n in (1, processes)]
    assert len(logs[0]) == len(logs[1]) == 8
    for step, same in zip(*logs, strict=True):
        assert step["loss"] == pytest.approx(same["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-4)


def test_several_ranks_train_the_same_outputs(runs):
    folder, _ = runs
    one, two = (load_file(folder / f"criteria-{n}" / "model.safetensors") for n in (1, 2))
    assert one["score.weight"].shape[0] == 2
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5
    for step, same in zip(*(read_metrics(folder / f"criteria-{n}") for n in (1, 2)), strict=True):
        assert step["loss"] == pytest.approx(same["loss"], abs=1e-5)
    cards = [read_card(folder / f"criteria-{n}") for n in (1, 2)]
    assert cards[0].fingerprint == pytest.approx(cards[1].fingerprint, abs=1e-5)


@pytest.mark.parametrize("processes", [2, THREE])
def test_all_ranks_get_the_metrics_of_rank_0(runs, processes):
    folder, trained = runs
    trained(processes)
    (alone,) = results_of(folder, 1)
    several = results_of(folder, processes)
    assert several[0]["pairs"] == alone["pairs"] and alone["pairs"][:2] == [24, 6]
    assert several[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    assert all(rank["pairs"] == several[0]["pairs"] and rank["losses"] == several[0]["losses"] for rank in several)
    assert read_card(folder / f"reward-{processes}").train_pairs == 24
    assert several[0]["saved"][:2] == ["page", f"sft-{processes}"] and not any(rank["saved"] for rank in several[1:])


@pytest.mark.parametrize("processes", [1, 2, THREE])
def test_rows_that_do_not_divide_evenly_add_no_step(runs, processes):
    folder, trained = runs
    trained(processes)
    log = read_metrics(folder / f"uneven-{processes}")
    assert len(log) == 5 and all(step["loss"] > 0 for step in log)
    assert len(list((folder / f"uneven-{processes}/checkpoints").iterdir())) == 2


def test_a_signal_on_one_rank_stops_all_and_they_resume(runs):
    folder, trained = runs
    assert [rank["stopped"] for rank in results_of(folder, 2)] == ["after step 3 of 8"] * 2
    one, stopped = (load_file(folder / f"{name}-2" / "model.safetensors") for name in ("reward", "stopped"))
    assert max(float((one[name] - stopped[name]).abs().max()) for name in one) <= 1e-6
    assert [step["step"] for step in read_metrics(folder / "stopped-2")] == list(range(1, 9))
    assert "Resuming after step 3 of 8" in trained(2)


@pytest.mark.parametrize("processes", [1, THREE])
def test_another_number_of_ranks_can_resume(runs, processes):
    folder, trained = runs
    trained(processes)
    one, other = (load_file(folder / name / "model.safetensors") for name in ("reward-1", f"resumed-{processes}"))
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= 1e-5
    steps = [step["step"] for step in read_metrics(folder / f"resumed-{processes}")]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(("processes", "divisible"), [(2, 8), pytest.param(3, 6, marks=pytest.mark.full)])
def test_a_batch_size_that_ranks_cannot_share_raises(runs, processes, divisible):
    folder, trained = runs
    trained(processes)
    for rank in results_of(folder, processes):
        assert f"over {processes} processes" in rank["refused"] and f"batch_size to {divisible}" in rank["refused"]
    assert not (folder / f"refused-{processes}").exists()


def test_messages_are_printed_once(runs):
    _, trained = runs
    for text in map(trained, (1, 2)):
        assert text.count("Saved model to") == 1 and text.count("reward model 8/8") >= 1
        assert "Traceback" not in text and "Warning" not in text, text


def test_sharding_raises_a_short_error(tmp_path, model_folder, pairs_csv):
    named = {"--mode": "train_reward", "--model_name": model_folder, "--data_path": pairs_csv}
    words = [word for pair in named.items() for word in pair]
    words += ["--reward_model_path", tmp_path / "run"]
    done = scripts.forked(2, scripts.ROOT / "reinforce_cli.py", *words, **scripts.FSDP2)
    assert done.returncode != 0
    assert done.stderr.count("error: FSDP and DeepSpeed: reward model training keeps the whole model on each rank") == 1
    assert not (tmp_path / "run").exists()
